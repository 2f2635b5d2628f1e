"""Writes a checkpoint with random weights, of any size and with little memory, so that scale can be measured.

    python bench/make_checkpoint.py llama-2-7b|llama-2-13b|mixtral[:LAYERS]|CONFIG.json FOLDER

The folder is what `save_pretrained` would write for a model of that config: sharded safetensors under the names of
checkpoints (Mixtral's experts apart, each with w1, w2 and w3), their index, config.json, and a tokenizer of one token
per word (w0, w1, ...) with a chat template.

All weights come from one block of normal noise, read round and round; a tensor starts somewhere in it and has the
standard deviation 1 / sqrt(last dimension). Norms are ones. So the numbers mean nothing, but none of a layer's
activations grows or dies out, and no two rows of a weight are equal.
"""

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion

from ssah_fast.errors import SsahError
from ssah_fast.files import atomic_writer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # in a safetensors header
BLOCK = (4 << 20) - 3  # elements; odd, so that rows of a usual length never start at the same place twice
SPARE = 64 << 20  # bytes left on the disk: for the tokenizer and the file system itself
WORDS = 1000
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} <turn> {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <answer>{% endif %}"
)


def known(name: str) -> PretrainedConfig | None:
    """Return the config of a model by its name; None where there is no such name."""
    kind, _, layers = name.partition(":")
    if kind == "llama-2-7b":
        config: PretrainedConfig = LlamaConfig()  # whose defaults are that model
    elif kind == "llama-2-13b":
        config = LlamaConfig(
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
        )
    elif kind == "mixtral":
        config = MixtralConfig(max_position_embeddings=32768)
    else:
        return None
    if layers:
        set_layers(config, int(layers))
    return config


def read_config(name: str) -> PretrainedConfig:
    """Return the config that a name or a config.json stands for.

    Raises:
        SsahError: It is neither.
    """
    try:
        config = known(name)
        if config is not None:
            return config
        fields = json.loads(Path(name).read_text(encoding="utf-8"))
        return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SsahError(f"{name} is neither llama-2-7b, llama-2-13b, mixtral[:LAYERS] nor a config.json") from error


def set_layers(config: PretrainedConfig, layers: int) -> None:
    """Give a config fewer layers, or more of a single kind."""
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what a checkpoint of a model holds: its tensors on the meta device, by their names there."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return revert_weight_conversion(model, {k: v for k, v in model.state_dict().items() if k not in tied})


class Noise:
    """Normal noise of any length, scale and dtype out of one block."""

    def __init__(self, seed: int) -> None:
        """Draw the block."""
        self._generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(BLOCK, generator=self._generator)
        self._scaled: dict[tuple[float, torch.dtype], memoryview] = {}

    def pieces(self, name: str, tensor: Tensor) -> Iterator[memoryview]:
        """Yield the bytes of a tensor of this name, shape and dtype, some MiB at a time."""
        if tensor.ndim == 1 and name.endswith("weight"):  # of a norm
            yield raw(torch.ones(tensor.shape, dtype=tensor.dtype))
            return
        block = self._bytes(tensor.shape[-1] ** -0.5 if tensor.ndim else 1.0, tensor.dtype)
        start = int(torch.randint(BLOCK, (), generator=self._generator)) * tensor.element_size()
        left = tensor.numel() * tensor.element_size()
        while left:
            piece = block[start : start + left]
            left, start = left - len(piece), 0
            yield piece

    def _bytes(self, scale: float, dtype: torch.dtype) -> memoryview:
        if (scale, dtype) not in self._scaled:
            self._scaled[scale, dtype] = raw((self._block * scale).to(dtype))
        return self._scaled[scale, dtype]


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy."""
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")


@dataclass
class Shard:
    """Tensors that share a file."""

    tensors: dict[str, Tensor]
    size: int = 0

    def write(self, path: Path, noise: Noise) -> None:
        """Write the file, which is there only when it is whole."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in self.tensors.items():
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
        with atomic_writer(path) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in self.tensors.items():
                for piece in noise.pieces(name, tensor):
                    file.write(piece)


def shards_of(tensors: dict[str, Tensor], limit: int) -> list[Shard]:
    """Distribute tensors over files of at most `limit` bytes, in their order; a larger tensor has its own."""
    shards = [Shard({})]
    for name, tensor in tensors.items():
        if shards[-1].size and shards[-1].size + tensor.nbytes > limit:
            shards.append(Shard({}))
        shards[-1].tensors[name] = tensor
        shards[-1].size += tensor.nbytes
    return shards


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per word w0, w1, ..., BOS in front; ids stay below `vocabulary`."""
    special = ("<unk>", "<s>", "</s>", "<turn>", "<answer>")
    words = (*special, *(f"w{i}" for i in range(min(WORDS, vocabulary - len(special)))))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<turn>", "<answer>"],
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def write(
    config: PretrainedConfig,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: int = 2 * 10**9,
    seed: int = 0,
    progress: bool = False,
) -> int:
    """Write a checkpoint with random weights.

    Args:
        config: Of a causal language model.
        folder: Where to write; made if it is missing.
        dtype: Of the weights.
        shard_size: Bytes of a file, at most.
        seed: Of the noise.
        progress: Say on stderr how far it is.

    Returns:
        Bytes of all weights.

    Raises:
        SsahError: The folder is not empty, or the disk too small.
        RunError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SsahError(f"{folder} is not empty; give another folder")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shards = shards_of(stored_tensors(model), shard_size)
    total = sum(shard.size for shard in shards)
    free = shutil.disk_usage(folder).free
    if total + SPARE > free:
        raise SsahError(f"{folder}: the weights take {total / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB left")
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    word_tokenizer(config.get_text_config(decoder=True).vocab_size).save_pretrained(folder)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    noise, start, done = Noise(seed), time.perf_counter(), 0
    for name, shard in zip(names, shards, strict=True):
        shard.write(folder / name, noise)
        done += shard.size
        if progress:
            rate = done / 1e6 / (time.perf_counter() - start)
            print(f"\r{folder}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate:.0f} MB/s", end="", file=sys.stderr)
    if progress:
        print(file=sys.stderr)
    if len(shards) > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return total


def size_of(text: str) -> int:
    """Read a size such as 2GB, 500MB or 4GiB, in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GB")
    number, prefix, binary = found.groups()
    power = " KMGT".index((prefix or " ").upper())
    return int(float(number) * (1024 if binary else 1000) ** power)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="llama-2-7b, llama-2-13b, mixtral[:LAYERS] or a config.json")
    parser.add_argument("folder", type=Path, help="where to write; new or empty")
    parser.add_argument("--layers", type=int, help="another number of decoder layers")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shard-size", type=size_of, default=2 * 10**9, help="of a file, at most (default: 2GB)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        config = read_config(given.config)
        if given.layers is not None:
            set_layers(config, given.layers)
        write(
            config,
            given.folder,
            dtype=DTYPES[given.dtype],
            shard_size=given.shard_size,
            seed=given.seed,
            progress=True,
        )
    except SsahError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
