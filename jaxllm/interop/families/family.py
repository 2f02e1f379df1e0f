"""What a family is, and the options and rows that several families share.

A row is `(their name, our paths, layout)`; a `{}` in their name is the layer number, and the leaf is then stacked over
layers. Rows of leaves that a config does not have (a bias, an untied head) do not apply.

Source: the modelling code and config classes of transformers 5.23 (which also reads version 4's keys), a folder per `model_type`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxllm.interop.kinds import CHANCE, DEPTH, TOKEN_ID, either, list_of, or_null
from jaxllm.interop.layout import FLAT, LINEAR, LINEAR_FROM_HEADS, LINEAR_TO_HEADS, SAME, Layout, Row
from jaxllm.interop.options import Option, always, flag, ignored, number, option, size


class Family(NamedTuple):
    """One `model_type`."""

    model_type: str
    architecture: str
    """Their class, written to config.json."""
    prefix: str
    """Begins the name of every tensor but the head's; checkpoints of the bare model leave it out."""
    options: tuple[Option, ...]
    rows: tuple[Row, ...]


# --------------------------------------------------------------------------------------- options

GATED = {
    "silu": "swiglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh", "gelu": "geglu", "swish": "swiglu", "relu2": "reglu2",
}  # fmt: skip
PLAIN = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu2": "relu2"}
GPT_PLAIN = {"gelu_new": "gelu_tanh"} | PLAIN

COMMON = (
    size("vocab_size", "vocab_size"),
    number("initializer_range", "init_std", default=0.02),
    always(is_encoder_decoder=False, add_cross_attention=False, cross_attention_hidden_size=None, tie_encoder_decoder=False),
    always(pruned_heads={}), ignored("is_decoder"),
    ignored("bos_token_id", "eos_token_id", "pad_token_id", kind=or_null(either(TOKEN_ID, list_of(TOKEN_ID)))),  # hf_text reads them
)  # fmt: skip
SIZES = (
    *COMMON,
    size("num_hidden_layers", "num_layers", kind=DEPTH),
    size("hidden_size", "width"),
    size("num_attention_heads", "num_heads"),
    size("intermediate_size", "ff_width"),
    size("max_position_embeddings", "max_length"),
    number("attention_dropout", "attention_dropout", default=0.0, kind=CHANCE),
)
LLAMA_OPTIONS = (
    *SIZES,
    number("rms_norm_eps", "norm_eps", default=1e-6),
    option("hidden_act", "activation", default="silu", spellings=GATED),
    flag("tie_word_embeddings", "tied_embeddings", default=False),
)
ATTENTION_BIAS = flag("attention_bias", "qkv_bias", "attention_out_bias", default=False)


# ------------------------------------------------------------------------------------------ rows


def tensors(prefix: str, rows: Sequence[tuple[str, str, Layout]]) -> tuple[Row, ...]:
    """Rows out of (their name without the prefix, our paths with spaces between them, layout)."""
    return tuple(Row(f"{prefix}{theirs}", tuple(ours.split()), layout) for theirs, ours, layout in rows)


def linear(theirs: str, ours: str, kernel: Layout, bias: Layout = SAME) -> tuple[tuple[str, str, Layout], ...]:
    """Weight and bias of a projection; `ours` may name several, which the layouts fuse."""
    leaves = ours.split()
    return tuple(
        (f"{theirs}.{name}", " ".join(f"layers/{leaf}/{leaf_name}" for leaf in leaves), layout)
        for name, leaf_name, layout in (("weight", "kernel", kernel), ("bias", "bias", bias))
    )


def norm(theirs: str, ours: str) -> tuple[tuple[str, str, Layout], ...]:
    """Scale and bias of a normalisation."""
    return (f"{theirs}.weight", f"{ours}/scale", SAME), (f"{theirs}.bias", f"{ours}/bias", SAME)


HEAD = Row("lm_head.weight", ("unembed/kernel",), SAME)
EMBED = (("embed_tokens.weight", "embed/tokens", SAME), *norm("norm", "final_norm"))
QKV = tuple(row for n in "qkv" for row in linear(f"layers.{{}}.self_attn.{n}_proj", f"attention/{n}", LINEAR_TO_HEADS, FLAT))
OUT = linear("layers.{}.self_attn.o_proj", "attention/o", LINEAR_FROM_HEADS)
GATE_UP = tuple(row for n in ("gate", "up") for row in linear(f"layers.{{}}.mlp.{n}_proj", f"mlp/{n}", LINEAR))
DOWN = linear("layers.{}.mlp.down_proj", "mlp/down", LINEAR)
NORM_BEFORE = (
    *norm("layers.{}.input_layernorm", "layers/attention_norm"),
    *norm("layers.{}.post_attention_layernorm", "layers/mlp_norm"),
)
NORM_AFTER = (
    *norm("layers.{}.post_attention_layernorm", "layers/attention_post_norm"),
    *norm("layers.{}.post_feedforward_layernorm", "layers/mlp_post_norm"),
)
NORM_BOTH = (
    *norm("layers.{}.input_layernorm", "layers/attention_norm"),
    *norm("layers.{}.pre_feedforward_layernorm", "layers/mlp_norm"),
    *NORM_AFTER,
)
QK_NORM = tuple((f"layers.{{}}.self_attn.{n}_norm.weight", f"layers/attention/{n}_norm/scale", FLAT) for n in "qk")
PROJECTIONS = (*EMBED, *QKV, *OUT, *GATE_UP, *DOWN)
LLAMA_ROWS = (*tensors("model.", (*PROJECTIONS, *NORM_BEFORE)), HEAD)
