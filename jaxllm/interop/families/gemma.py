"""Gemma 2 and 3 (text)."""

from __future__ import annotations

from jaxllm.config import ConfigError, ModelConfig, RopeConfig
from jaxllm.interop import options
from jaxllm.interop.families.family import (
    ATTENTION_BIAS,
    GATED,
    HEAD,
    NORM_BOTH,
    PROJECTIONS,
    QK_NORM,
    SIZES,
    Family,
    tensors,
)  # fmt: skip
from jaxllm.interop.kinds import OBJECT, POSITIVE, SIZE, Reader, or_null
from jaxllm.interop.options import Option, Values, always, fixed, flag, grouped_heads, ignored, number, option, rope, typed_layers


def _gemma_scale(config: ModelConfig) -> float:
    """q.k is multiplied by query_pre_attn_scalar^-0.5."""
    exact = config.head_size if config.attention_scale is None else config.attention_scale**-2
    return round(exact) if abs(exact - round(exact)) < 1e-6 * exact else exact


_GEMMA = (
    *SIZES,
    fixed(norm_placement="both", norm_plus_one=True),
    grouped_heads(4, 256), ATTENTION_BIAS,
    number("rms_norm_eps", "norm_eps", default=1e-6),
    option("hidden_activation", "activation", default="gelu_pytorch_tanh", spellings=GATED), ignored("hidden_act"),
    flag("tie_word_embeddings", "tied_embeddings", default=True),
    Option(lambda theirs: {"embedding_scale": theirs.take("hidden_size", SIZE) ** 0.5}, lambda config: {}),
    Option(
        lambda theirs: {"attention_scale": theirs.take("query_pre_attn_scalar", POSITIVE, 256) ** -0.5},
        lambda config: {"query_pre_attn_scalar": _gemma_scale(config)},
    ),
    always(use_bidirectional_attention=False),
)  # fmt: skip


GEMMA2 = Family(
    "gemma2", "Gemma2ForCausalLM", "model.",
    (
        *_GEMMA, rope(), typed_layers(lambda theirs, i: i % 2 == 0), ignored("sliding_window_size"),
        number("attn_logit_softcapping", "attention_soft_cap", default=50.0, kind=or_null(POSITIVE)),
        number("final_logit_softcapping", "logit_soft_cap", default=30.0, kind=or_null(POSITIVE)),
    ),
    (*tensors("model.", (*PROJECTIONS, *NORM_BOTH)), HEAD),
)  # fmt: skip


def _gemma3_rope(theirs: Reader, kind: str, base_key: str, base: float) -> RopeConfig:
    """RoPE of one kind of layers: nested under its name (transformers 5), or beside `base_key`; only full layers are stretched."""
    nested = Reader(
        theirs.take("rope_parameters", or_null(OBJECT), None) or {}, "rope_parameters.", {"full_attention", "sliding_attention"}
    )
    for key in nested.surplus():
        raise ConfigError(f"'rope_parameters.{key}' is not covered; Gemma 3 has one object for each of {', '.join(sorted(nested.taken))}")
    params = nested.take(kind, or_null(OBJECT), None) or {}
    separate = theirs.take("rope_scaling", or_null(OBJECT), None) if kind == "full_attention" else None
    given = {"rope_theta": theirs.take(base_key, POSITIVE, base)} | params | (separate or {})
    inner = Reader(given, "rope_scaling." if separate else f"rope_parameters.{kind}.")
    size = theirs.take("head_dim", SIZE, 256)
    return options.read_rope(inner, max_length=theirs.take("max_position_embeddings", SIZE), head_size=size)


def _write_gemma3_rope(config: ModelConfig) -> Values:
    own = next((kind.rope for kind in config.layer_pattern if kind.window is not None), None) or config.rope
    scaling = options.write_rope(config.rope)
    return {"rope_theta": config.rope.base, "rope_scaling": scaling, "rope_local_base_freq": own.base}


GEMMA3 = Family(
    "gemma3_text", "Gemma3ForCausalLM", "model.",
    (
        *_GEMMA, fixed(qk_norm="head"), ignored("_sliding_window_pattern"),
        Option(lambda theirs: {"rope": _gemma3_rope(theirs, "full_attention", "rope_theta", 1_000_000.0)}, _write_gemma3_rope),
        typed_layers(
            lambda theirs, i: (i + 1) % theirs.take("sliding_window_pattern", SIZE, 6) > 0,
            lambda theirs: _gemma3_rope(theirs, "sliding_attention", "rope_local_base_freq", 10_000.0),
        ),
        number("final_logit_softcapping", "logit_soft_cap", default=None, kind=or_null(POSITIVE)),
        always(attn_logit_softcapping=None),  # a key that their model does not look at
    ),
    (*tensors("model.", (*PROJECTIONS, *NORM_BOTH, *QK_NORM)), HEAD),
)  # fmt: skip
