"""Llama and its relatives: Mistral, Qwen 2 and 3, OLMo 2, Phi-3."""

from __future__ import annotations

from jaxllm.interop.families.family import (
    ATTENTION_BIAS,
    DOWN,
    EMBED,
    HEAD,
    LLAMA_OPTIONS,
    LLAMA_ROWS,
    NORM_AFTER,
    NORM_BEFORE,
    OUT,
    PROJECTIONS,
    QK_NORM,
    Family,
    linear,
    tensors,
)  # fmt: skip
from jaxllm.interop.kinds import CHANCE, COUNT
from jaxllm.interop.layout import LINEAR, LINEAR_TO_HEADS, fused
from jaxllm.interop.options import always, fixed, flag, grouped_heads, ignored, number, one_window, rope, typed_layers

LLAMA = Family(
    "llama", "LlamaForCausalLM", "model.",
    (*LLAMA_OPTIONS, grouped_heads(), rope(), ATTENTION_BIAS, flag("mlp_bias", "mlp_bias", default=False),
     always(rope_interleaved=False), ignored("is_llama_config")),
    LLAMA_ROWS,
)  # fmt: skip

MISTRAL = Family(
    "mistral", "MistralForCausalLM", "model.", (*LLAMA_OPTIONS, grouped_heads(default_kv_heads=8), rope(), one_window(4096)), LLAMA_ROWS
)  # fmt: skip


_QWEN_LAYERS = typed_layers(lambda theirs, i: i >= theirs.take("max_window_layers", COUNT, 28), switch="use_sliding_window")

QWEN2 = Family(
    "qwen2", "Qwen2ForCausalLM", "model.",
    (*LLAMA_OPTIONS, fixed(qkv_bias=True), grouped_heads(default_kv_heads=32), rope(), _QWEN_LAYERS, always(use_mrope=False)), LLAMA_ROWS,
)  # fmt: skip

QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", "model.",
    (*LLAMA_OPTIONS, fixed(qk_norm="head"), grouped_heads(32, 128), rope(), ATTENTION_BIAS, _QWEN_LAYERS),
    (*LLAMA_ROWS, *tensors("model.", QK_NORM)),
)  # fmt: skip

OLMO2 = Family(
    "olmo2", "Olmo2ForCausalLM", "model.",
    (
        *LLAMA_OPTIONS, fixed(norm_placement="after", qk_norm="full"), grouped_heads(), rope(), ATTENTION_BIAS,
        number("rms_norm_eps", "norm_eps", default=1e-5), always(clip_qkv=None),
    ),
    (*tensors("model.", (*PROJECTIONS, *NORM_AFTER, *QK_NORM)), HEAD),
)  # fmt: skip

PHI3 = Family(
    "phi3", "Phi3ForCausalLM", "model.",
    (
        *LLAMA_OPTIONS, grouped_heads(), one_window(None), always(attention_bias=False),
        number("rms_norm_eps", "norm_eps", default=1e-5),
        number("embd_pdrop", "embedding_dropout", default=0.0, kind=CHANCE),
        number("resid_pdrop", "residual_dropout", default=0.0, kind=CHANCE),
        rope(fraction_key="partial_rotary_factor", scalings=("default",)),  # the others are LongRoPE
        ignored("original_max_position_embeddings"),
    ),
    (
        *tensors("model.", (
            *EMBED, *NORM_BEFORE, *OUT, *DOWN,
            *linear("layers.{}.self_attn.qkv_proj", "attention/q attention/k attention/v", fused(LINEAR_TO_HEADS, 0)),
            *linear("layers.{}.mlp.gate_up_proj", "mlp/gate mlp/up", fused(LINEAR, 0)),
        )),
        HEAD,
    ),
)  # fmt: skip
