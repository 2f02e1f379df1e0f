"""GPT-1 and GPT-2."""

from __future__ import annotations

from jaxllm.interop.families.family import COMMON, GPT_PLAIN, HEAD, Family, linear, norm, tensors
from jaxllm.interop.kinds import CHANCE, DEPTH, FLAG, SIZE, Reader, or_null
from jaxllm.interop.layout import CONV_FROM_HEADS, CONV_TO_HEADS, FLAT, SAME, Layout, fused
from jaxllm.interop.options import Option, Values, always, equal_heads, fixed, flag, ignored, number, option, size


def _gpt_ff_width(theirs: Reader) -> Values:
    return {"ff_width": theirs.take("n_inner", or_null(SIZE), None) or 4 * theirs.take("n_embd", SIZE)}


_GPT = (
    *COMMON,
    fixed(norm="layer", norm_bias=True, position="learned", qkv_bias=True, attention_out_bias=True, mlp_bias=True),
    size("n_layer", "num_layers", kind=DEPTH), size("n_embd", "width"), size("n_head", "num_heads"), size("n_positions", "max_length"),
    equal_heads("n_embd", "n_head"),
    number("layer_norm_epsilon", "norm_eps", default=1e-5),
    number("embd_pdrop", "embedding_dropout", default=0.1, kind=CHANCE),
    number("attn_pdrop", "attention_dropout", default=0.1, kind=CHANCE),
    number("resid_pdrop", "residual_dropout", default=0.1, kind=CHANCE),
    flag("tie_word_embeddings", "tied_embeddings", default=True),
    ignored("n_ctx"),
)  # fmt: skip


def _gpt_layers(norms: tuple[str, str]) -> tuple[tuple[str, str, Layout], ...]:
    """Blocks of GPT-1 and GPT-2; Conv1D keeps its kernels [in, out]."""
    return (
        *linear("h.{}.attn.c_attn", "attention/q attention/k attention/v", fused(CONV_TO_HEADS, 1), fused(FLAT, 0)),
        *linear("h.{}.attn.c_proj", "attention/o", CONV_FROM_HEADS),
        *linear("h.{}.mlp.c_fc", "mlp/up", SAME),
        *linear("h.{}.mlp.c_proj", "mlp/down", SAME),
        *norm("h.{}.ln_1", f"layers/{norms[0]}"),
        *norm("h.{}.ln_2", f"layers/{norms[1]}"),
    )


GPT1 = Family(
    "openai-gpt", "OpenAIGPTLMHeadModel", "transformer.",
    (
        *_GPT,
        fixed(norm_placement="after_residual", final_norm=False),
        Option(lambda theirs: {"ff_width": 4 * theirs.take("n_embd", SIZE)}, lambda config: {}),
        option("afn", "activation", default="gelu", spellings={"gelu": "gelu_tanh"}),  # their "gelu" is the tanh form
        ignored("n_special", "predict_special_tokens"),
    ),
    (
        *tensors("transformer.", (
            ("tokens_embed.weight", "embed/tokens", SAME), ("positions_embed.weight", "embed/positions", SAME),
            *_gpt_layers(("attention_post_norm", "mlp_post_norm")),
        )),
        HEAD,
    ),
)  # fmt: skip

GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", "transformer.",
    (
        *_GPT,
        Option(_gpt_ff_width, lambda config: {"n_inner": config.ff_width}),
        option("activation_function", "activation", default="gelu_new", spellings=GPT_PLAIN),
        Option(
            lambda theirs: {"attention_scale": None if theirs.take("scale_attn_weights", FLAG, True) else 1.0},
            lambda config: {"scale_attn_weights": config.attention_scale != 1.0},
        ),
        always(scale_attn_by_inverse_layer_idx=False), ignored("reorder_and_upcast_attn", "n_special", "predict_special_tokens"),
    ),
    (
        *tensors("transformer.", (
            ("wte.weight", "embed/tokens", SAME), ("wpe.weight", "embed/positions", SAME),
            *_gpt_layers(("attention_norm", "mlp_norm")), *norm("ln_f", "final_norm"),
        )),
        HEAD,
    ),
)  # fmt: skip
