"""Random models for the cases that run a whole one."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

HEAD = 128  # channels


class Size(NamedTuple):
    """Of a Llama and of what it is given; the first five are the column ``shape``.

    Attributes:
        groups: Heads of k and v; 0: as many as of q.
        vocabulary: 256 where the embeddings should not matter.
    """

    layers: int
    hidden: int
    intermediate: int
    sequences: int
    tokens: int
    groups: int = 0
    vocabulary: int = 256

    @property
    def shape(self) -> tuple[int, ...]:
        """What the column ``shape`` says."""
        return tuple(self[:5])

    @property
    def heads(self) -> int:
        """Heads of q."""
        return max(2, self.hidden // HEAD)

    def products(self) -> int:
        """Floating-point operations of the backbone's matrix products over all tokens, causal attention with them."""
        kv = self.hidden * (self.groups or self.heads) // self.heads
        weights = 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.intermediate
        per_token = 2 * weights + 2 * self.tokens * self.hidden  # q k and p v: half of 2 * 2 * tokens * hidden each
        return self.layers * self.sequences * self.tokens * per_token


def config(size: Size) -> LlamaConfig:
    """Return the config of a Llama."""
    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups or size.heads,
    )


def build(size: Size, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return a random Llama in evaluation mode, and always the same."""
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM._from_config(config(size), dtype=dtype).eval()


def random_tokens(size: Size) -> Tensor:
    """Return token ids [sequences, tokens], on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(size.vocabulary, (size.sequences, size.tokens), generator=generator)
