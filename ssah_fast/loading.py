"""A model and its tokenizer from a folder or the hub, with one clear line for whatever can be wrong with them."""

import contextlib
import json
import os
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from ssah_fast.errors import SsahError
from ssah_fast.units import check_architecture, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
# Ways to quantise that transformers undoes while it loads, on any device.
_QUANTISED = ("fp8", "mxfp4")
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
    UnpicklingError,
)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    pickled: bool = False,
    any_architecture: bool = False,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        name: A folder in Hugging Face format, or a hub id.
        revision: Branch, tag or commit of a hub id.
        dtype: "auto" (the checkpoint's), "bf16", "fp16", "fp32" or "fp64".
        device: "auto" (cuda where there is one), "cpu", "cuda", "cuda:1", ...
        device_map: accelerate's, such as "auto", to spread a model over several GPUs; replaces ``device``.
        trust_remote_code: Run code that comes with the checkpoint.
        pickled: Read pickled weights (.bin), of which torch's reader takes tensors alone, instead of safetensors.
        any_architecture: Whether a model whose units are not known is accepted too; it must not be quantised.

    Returns:
        The model, with no weight left at its random initialisation, and the tokenizer.

    Raises:
        SsahError: The checkpoint is missing, incomplete, damaged, not in safetensors, gated, or of an unsupported
            architecture.
    """
    check_dtype(dtype)
    torch_device(device)
    check_folder(name)
    if not pickled:
        check_weights(name)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with silent(), explained(name):
        config = load_config(name, common, any_architecture)
        tokenizer = load_tokenizer(name, common)
    if any_architecture and stored_quantization(config) is not None:
        raise SsahError(f"{name} is quantised; give the checkpoint that it was made from")
    where: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map, "pickled": pickled}
    return load_weights(name, config, **where, **common), tokenizer


def load_weights(
    name: str,
    config: PretrainedConfig,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    pickled: bool = False,
) -> "PreTrainedModel":
    """Load the model of a checkpoint whose files were checked already.

    Args:
        name: As for `load_model`. Likewise all but the config:
        config: Of the checkpoint (`load_config`).
        revision: See there.
        dtype: See there.
        device: See there.
        device_map: See there.
        trust_remote_code: See there.
        pickled: See there.

    Raises:
        SsahError: The tensors are not those of the config, or cannot be read.
    """
    target, common = torch_device(device), {"revision": revision, "trust_remote_code": trust_remote_code}
    with silent(), explained(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=DTYPES[dtype],
            device_map=device_map,
            use_safetensors=not pickled,
            ignore_mismatched_sizes=True,  # so that they are listed in info, instead of an error that refers to the log
            output_loading_info=True,
            **common,
        )
        model, info = loaded
        check_complete(name, info, model)
        if stored_quantization(config):
            settle_dtype(model.parameters(), model.config.dtype)
        return (model if device_map else model.to(target)).eval()


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
    check_dtype(dtype)
    check_folder(name)
    with silent(), explained(name):
        config = load_config(name, {"revision": revision, "trust_remote_code": trust_remote_code}, any_architecture)
        chosen: Any = config.dtype if dtype == "auto" else DTYPES[dtype]
        return skeleton(config, chosen, trust_remote_code)


def skeleton(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> "PreTrainedModel":
    """Build the model of a config on the meta device, in evaluation mode."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()


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


def load_config(name: str, common: dict[str, Any], any_architecture: bool = False) -> PretrainedConfig:
    """Load a config, of a supported architecture and quantisation unless any will do; no weight is read.

    Args:
        name: A folder in Hugging Face format, or a hub id.
        common: The arguments revision and trust_remote_code of ``from_pretrained``.
        any_architecture: Whether a model whose units are not known is accepted too.

    Raises:
        SsahError: It is not supported.
    """
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
        _dequantise(name, config)
    return config


def stored_quantization(config: PretrainedConfig) -> Any:
    """How the weights of a checkpoint are quantised, as its config has it; None where they are not."""
    own = getattr(config, "quantization_config", None)
    return own or getattr(config.get_text_config(decoder=True), "quantization_config", None)


def _dequantise(name: str, config: PretrainedConfig) -> None:
    """Have quantised weights dequantised while they are loaded, on every device."""
    stored = stored_quantization(config)
    if stored is None:
        return
    method = stored.get("quant_method")
    if method not in _QUANTISED:
        raise SsahError(
            f"{name} is quantised with {method}; only {' and '.join(_QUANTISED)} checkpoints are dequantised while "
            "they are loaded, so give the checkpoint that it was made from"
        )
    stored["dequantize"] = True


def settle_dtype(parameters: Iterable[torch.nn.Parameter], dtype: torch.dtype) -> None:
    """Give the weights of a dequantised model one dtype, except fp32 ones of a 16-bit model.

    transformers (5.23) leaves what was not quantised in the dtype that it is stored in; layers of two do not run.
    """
    for parameter in parameters:
        if parameter.dtype != dtype and not (parameter.dtype == torch.float32 and dtype.itemsize == 2):
            parameter.data = parameter.data.to(dtype)


def load_tokenizer(name: str, common: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that belongs to a model.

    Raises:
        SsahError: There is none.
    """
    folder = Path(name)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES):
        raise SsahError(f"{name} has no tokenizer; copy it from the base model with tokenizer.save_pretrained")
    with explained(f"the tokenizer of {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, **common)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a class without its files
        raise SsahError(f"{name}: its tokenizer has no vocabulary; copy the base model's tokenizer files there")
    return tokenizer


def check_dtype(dtype: str) -> None:
    """Refuse a ``--dtype`` that does not exist."""
    if dtype not in DTYPES:
        raise SsahError(f"--dtype {dtype} is unknown; choose one of {', '.join(DTYPES)}")


def check_folder(name: str) -> None:
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


def check_weights(name: str) -> None:
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
        with safe_open(file, framework="np"):  # torch's mapping is refused for a file larger than the memory
            return
    except SafetensorError as error:
        raise SsahError(f"{file} is truncated or not a safetensors file ({error}); download it again") from error
    except OSError as error:
        raise SsahError(f"cannot read {file}: {error.strerror or error}") from error


def check_complete(name: str, info: dict[str, Any], model: "PreTrainedModel") -> None:
    """Refuse a checkpoint whose tensors are not those of its config.

    Args:
        name: What it is called.
        info: What transformers reports of loading: mismatched_keys, missing_keys and unexpected_keys.
        model: Built from the config.

    Raises:
        SsahError: A weight has another shape, is missing, or is one of a decoder layer that the model does not have.
    """
    mismatched = sorted(info.get("mismatched_keys") or ())
    if mismatched:
        weight, stored, expected = mismatched[0]
        raise SsahError(
            f"{name}: the weight {weight} is {list(stored)}, but config.json implies {list(expected)}; "
            "the two are not of one model"
        )
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise SsahError(
            f"{name} is incomplete: the weight {missing[0]} is missing{_more(missing)}; download or save it again"
        )
    unused = _unused(model, info.get("unexpected_keys") or ())
    if unused:
        raise SsahError(
            f"{name} holds the weight {unused[0]}{_more(unused)}, for which its config.json has no place; "
            "the two are not of one model"
        )


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _unused(model: "PreTrainedModel", unexpected: Iterable[str]) -> list[str]:
    """Stored weights of decoder layers, and biases of modules with a weight, that a model has no place for.

    Other things that old checkpoints hold, such as masks and rotary frequencies, change nothing.
    """
    prefix, modules = decoder_layers(model)[0], dict(model.named_modules())
    found = []
    for key in sorted(unexpected):
        module, _, figure = key.rpartition(".")
        weight = figure == "weight" or (figure == "bias" and hasattr(modules.get(module), "weight"))
        if weight and key.startswith(f"{prefix}."):
            found.append(key)
    return found


def _reason(error: Exception) -> str:
    """One line out of an exception of transformers, huggingface_hub or safetensors."""
    if isinstance(error, UnpicklingError):  # torch would advise to let it run code
        return "its pickled weights are damaged, or hold more than tensors"
    text = " ".join(str(error).split())
    lowered = text.lower()
    if "gated repo" in lowered or "401 client error" in lowered:
        return "the repository is gated or private; accept its terms on the hub and set HF_TOKEN"
    if "couldn't connect" in lowered or "offline" in lowered or "localentrynotfound" in lowered:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        return f"it is neither a folder here nor in the local hub cache, and the hub was not reached{offline}"
    return textwrap.shorten(text, 300, placeholder=" ...")
