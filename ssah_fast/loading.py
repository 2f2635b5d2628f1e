"""A model and its tokenizer from a folder or the hub, with one clear line for whatever can be wrong with them."""

import contextlib
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from ssah_fast.errors import SsahError
from ssah_fast.units import check_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "auto": "auto",
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
# What a tokenizer keeps its vocabulary in, whatever its class.
_VOCABULARIES = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
# What transformers and the libraries below it raise for a checkpoint they cannot load; an odd config.json gives any.
_CANNOT_LOAD = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        name: A folder in Hugging Face format, or a hub id.
        revision: Branch, tag or commit of a hub id.
        dtype: "auto" (the checkpoint's), "bf16", "fp16", "fp32" or "fp64".
        device: "auto" (cuda where there is one), "cpu", "cuda", "cuda:1", ...
        device_map: accelerate's, such as "auto", to spread a model over several GPUs; replaces ``device``.
        trust_remote_code: Run code that comes with the checkpoint.

    Returns:
        The model, with no weight left at its random initialisation, and the tokenizer.

    Raises:
        SsahError: The checkpoint is missing, incomplete, damaged, not in safetensors, gated, or of an unsupported
            architecture.
    """
    _check_dtype(dtype)
    target = torch_device(device)
    _check_folder(name)
    _check_weights(name)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    with silent(), explained(name):
        config = _load_config(name, common)
        tokenizer = _load_tokenizer(name, common)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=DTYPES[dtype],
            device_map=device_map,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are listed in info, instead of an error that refers to the log
            output_loading_info=True,
            **common,
        )
        model, info = loaded
        _check_complete(name, info)
        return (model if device_map else model.to(target)).eval(), tokenizer


def empty_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    any_architecture: bool = False,
) -> "PreTrainedModel":
    """Build a model on the meta device from its config alone: names, shapes and dtypes, no weights.

    Args:
        name: A folder with a config.json, or a hub id.
        revision: Branch, tag or commit of a hub id.
        dtype: "auto" (the checkpoint's), "bf16", "fp16", "fp32" or "fp64".
        trust_remote_code: Run code that comes with the checkpoint.
        any_architecture: Whether a model whose units are not known is accepted too.

    Raises:
        SsahError: There is no config, or its architecture is not supported.
    """
    _check_dtype(dtype)
    _check_folder(name)
    with silent(), explained(name), torch.device("meta"):
        common = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = _load_config(name, common, any_architecture)
        chosen = config.dtype if dtype == "auto" else DTYPES[dtype]
        return AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=trust_remote_code).eval()


def torch_device(name: str) -> torch.device:
    """Return the device that a ``--device`` value names.

    Raises:
        SsahError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SsahError(f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise SsahError(f"--device {name}: scoring runs on CPUs and CUDA devices; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SsahError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; use --device cpu or auto"
        )
    return device


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep transformers from printing in this context: what matters of it becomes an error."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what the libraries raise while they load `what` into one line; our own errors, and a full device, pass.

    Raises:
        SsahError: Loading failed; the message begins "cannot load `what`: ".
    """
    try:
        yield
    except (SsahError, torch.OutOfMemoryError):
        raise
    except _CANNOT_LOAD as error:
        if "DefaultCPUAllocator" in str(error):  # the CPU's way to say that memory is full
            raise
        raise SsahError(f"cannot load {what}: {_reason(error)}") from error


def _load_config(name: str, common: dict[str, Any], any_architecture: bool = False) -> PretrainedConfig:
    """The config, of a supported architecture unless any will do; checked before any weight is read."""
    stored, _ = PretrainedConfig.get_config_dict(name, revision=common["revision"])
    model_type = stored.get("model_type") if isinstance(stored, dict) else None
    if model_type is None:
        raise SsahError(f"{name}: its config.json has no model_type; MODEL must be a model that transformers can load")
    # Of an unknown type transformers would advise an upgrade of itself, or to trust remote code.
    if model_type not in CONFIG_MAPPING and not any_architecture:
        check_architecture(model_type)
    config = AutoConfig.from_pretrained(name, **common)
    if not any_architecture:
        check_architecture(config.get_text_config(decoder=True).model_type)
    return config


def _load_tokenizer(name: str, common: dict[str, Any]) -> "PreTrainedTokenizerBase":
    folder = Path(name)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES):
        raise SsahError(f"{name} has no tokenizer; copy it from the base model with tokenizer.save_pretrained")
    with explained(f"the tokenizer of {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, **common)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a class without its files
        raise SsahError(f"{name}: its tokenizer has no vocabulary; copy the base model's tokenizer files there")
    return tokenizer


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise SsahError(f"--dtype {dtype} is unknown; choose one of {', '.join(DTYPES)}")


def _check_folder(name: str) -> None:
    """Explain a local path that is not a model folder; anything else is taken for a hub id."""
    if not name:
        raise SsahError("MODEL is empty; give a folder in Hugging Face format or a hub id")
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SsahError(f"{name} has no config.json; MODEL must be a folder in Hugging Face format or a hub id")
    elif path.exists():
        raise SsahError(f"{name} is a file; MODEL must be a folder in Hugging Face format or a hub id")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise SsahError(
            f"{name} does not exist; MODEL must be a folder in Hugging Face format or a hub id (owner/name)"
        )


def _check_weights(name: str) -> None:
    """Explain what is wrong with the weights of a local folder."""
    path = Path(name)
    if not path.is_dir():
        return
    index = path / "model.safetensors.index.json"
    weights = _shards(index) if index.is_file() else sorted(path.glob("*.safetensors"))
    if not weights:
        raise SsahError(
            f"{name} has no .safetensors weights; convert them with save_pretrained (pickled weights are not read)"
        )
    for file in weights:
        _check_readable(file)


def _shards(index: Path) -> list[Path]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SsahError(f"{index} is not a safetensors index; download the checkpoint again") from error
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise SsahError(
            f"{index} names {absent[0]}, which is missing ({len(absent)} of {len(shards)} shards); download it again"
        )
    return [index.parent / shard for shard in shards]


def _check_readable(file: Path) -> None:
    """Read the header of a .safetensors file; its length tells whether the file is whole."""
    try:
        with safe_open(file, framework="pt"):
            return
    except SafetensorError as error:
        raise SsahError(f"{file} is truncated or not a safetensors file ({error}); download it again") from error
    except OSError as error:
        raise SsahError(f"cannot read {file}: {error.strerror or error}") from error


def _check_complete(name: str, info: dict[str, Any]) -> None:
    mismatched = sorted(info.get("mismatched_keys") or ())
    if mismatched:
        weight, stored, expected = mismatched[0]
        raise SsahError(
            f"{name}: the weight {weight} is {list(stored)}, but config.json implies {list(expected)}; "
            "the two are not of one model"
        )
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SsahError(f"{name} is incomplete: the weight {missing[0]} is missing{more}; download or save it again")


def _reason(error: Exception) -> str:
    """One line out of an exception of transformers, huggingface_hub or safetensors."""
    text = " ".join(str(error).split())
    lowered = text.lower()
    if "gated repo" in lowered or "401 client error" in lowered:
        return "the repository is gated or private; accept its terms on the hub and set HF_TOKEN"
    if "couldn't connect" in lowered or "offline" in lowered or "localentrynotfound" in lowered:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        return f"it is neither a folder here nor in the local hub cache, and the hub was not reached{offline}"
    return textwrap.shorten(text, 300, placeholder=" ...")
