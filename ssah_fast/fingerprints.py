"""What a model, a tokenizer and an installation are recognised by, for files that say where their numbers come from."""

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedModel

import ssah_fast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fields of a config that saving, or the way of loading, changes. "architectures" is set by save_pretrained.
_VOLATILE = frozenset(
    (
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "_attn_implementation",
        "use_cache",
    )
)


def versions() -> dict[str, str]:
    """The versions of what decides a result on given settings, by name."""
    return {
        "ssah_fast": ssah_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def model_fingerprint(model: PreTrainedModel, commit: str | None = None) -> dict[str, Any]:
    """What two score files of one model have in common, wherever it lies: architecture, config, size and dtype.

    Args:
        model: The model.
        commit: Of a hub id; None: the one in its config, where older versions of transformers note it.
    """
    config = json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str)
    return {
        "architecture": type(model).__name__,
        "config_sha256": sha256_text(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "commit": commit or getattr(model.config, "_commit_hash", None),
    }


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """What a result says of the model it was measured on: its name, fingerprint, weights and kind of device."""
    return {
        "name": model.config.name_or_path,
        **model_fingerprint(model),
        "weights_sha256": _weights_digest(model),
        "device": model.device.type,
    }


def _weights_digest(model: PreTrainedModel) -> str:
    """A hash of about 256 elements of every parameter, which tells fine-tunes of one model apart without reading all.

    Parameters that are not in memory (offloaded) are left out.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // 256)].cpu().contiguous()
            digest.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What two tokenizers have in common that give the same tokens: class, vocabulary with its rules, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = tokenizer.chat_template
    return {
        "class": type(tokenizer).__name__,
        "sha256": sha256_text(vocabulary),
        "template_sha256": None if template is None else sha256_text(json.dumps(template)),
    }


def sha256_text(text: str) -> str:
    """The SHA-256 of a text in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def _lasting(config: Any) -> Any:
    """A config without what differs between two loads of one model; configs may be nested."""
    if not isinstance(config, Mapping):
        return config
    return {key: _lasting(value) for key, value in config.items() if key not in _VOLATILE}
