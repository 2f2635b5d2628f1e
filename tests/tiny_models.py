"""A tiny model with random weights for every architecture that `ssah_fast.units` supports, and a tokenizer for them.

Sizes are chosen so that a confusion shows: three query heads per KV head, an MLP width that is no multiple of anything,
and a head_dim that differs from hidden / heads in some. Every bias and norm weight is random, too: zeros hide mistakes.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 96
HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, LAYERS = 48, 6, 2, 52, 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE_HEADS = {"head_dim": 12}
_NARROW_HEADS = {"head_dim": HIDDEN // HEADS}
_NO_GROUPS = {"num_key_value_heads": HEADS}  # no field of these configs; kept true for tests that read it
EXPERTS, EXPERT_WIDTH = 4, 24  # torch's grouped_mm wants rows of 16 bytes, in bf16 too
_EXPERTS = {"num_experts": EXPERTS, "num_experts_per_tok": 2}
_NARROW_EXPERTS = {**_EXPERTS, "moe_intermediate_size": EXPERT_WIDTH}

# model_type -> what differs from _COMMON
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": _WIDE_HEADS,
    "gemma2": _WIDE_HEADS,
    "gemma3_text": _WIDE_HEADS,
    "phi3": {},
    "gpt_neox": {"rotary_pct": 0.5, **_NO_GROUPS},
    "gpt2": {"n_inner": INTERMEDIATE, "n_positions": 128, **_NO_GROUPS},
    "opt": {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN, **_NO_GROUPS},
    "arcee": {"mlp_bias": True},
    "cohere": {"use_qk_norm": True},
    "cohere2": {},
    "ernie4_5": {"use_bias": True, **_NARROW_HEADS},
    "exaone4": {},
    "gemma": _WIDE_HEADS,
    "glm": {"attention_bias": True, **_NARROW_HEADS},
    "glm4": _NARROW_HEADS,
    "granite": {"attention_bias": True, "mlp_bias": True},
    "helium": _NARROW_HEADS,
    "ministral": _NARROW_HEADS,
    "ministral3": {**_WIDE_HEADS, "max_position_embeddings": 262144},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "phi": {},
    "seed_oss": _NARROW_HEADS,
    "smollm3": {},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "starcoder2": {},
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": EXPERT_WIDTH},
    "qwen3_moe": {**_NARROW_EXPERTS, **_WIDE_HEADS},
    "olmoe": {**_EXPERTS, "intermediate_size": EXPERT_WIDTH},
    "qwen2_moe": {**_NARROW_EXPERTS, "shared_expert_intermediate_size": 28, "mlp_only_layers": [0]},
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "intermediate_size": EXPERT_WIDTH,
        "sliding_window": 6,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4,
        },
        **_WIDE_HEADS,
    },
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_WIDTH,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        **_NO_GROUPS,
    },
}
# The others have experts: of two layers the first is dense in qwen2_moe and deepseek_v3.
MODEL_TYPES: tuple[str, ...] = tuple(_ARCHITECTURES)


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """Config of the tiny model; `overrides` are config fields."""
    return AutoConfig.for_model(model_type, **{**_COMMON, **_ARCHITECTURES[model_type], **overrides})


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Model in eval mode on the CPU; the same arguments give the same weights. `overrides` are config fields."""
    # Not .to(dtype): that would round the rotary frequencies, which from_pretrained leaves alone.
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # biases (0 at first) and norm weights (1, or 0 in Gemma)
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.15 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # DeepSeek's, 0 at first
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


TOKENS = ("<pad>", "<s>", "</s>", "<u>", "<a>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 6)))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} <u> {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <a>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the tiny models: one token per word w0 .. w89, BOS in front, a chat template of two more tokens."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<u>", "<a>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
