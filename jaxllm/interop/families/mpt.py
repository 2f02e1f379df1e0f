"""MPT."""

from __future__ import annotations

from jaxllm.config import ConfigError, nearest
from jaxllm.interop.families.family import COMMON, HEAD, Family, linear, norm, tensors
from jaxllm.interop.kinds import CHANCE, DEPTH, OBJECT, POSITIVE, SIZE, Reader, or_null, said
from jaxllm.interop.layout import LINEAR, LINEAR_FROM_HEADS, LINEAR_TO_HEADS, SAME, fused
from jaxllm.interop.options import NEUTRAL, Option, Values, always, equal_heads, fixed, flag, ignored, number, option, size


def _read_mpt_attention(theirs: Reader) -> Values:
    """`attn_config`: ALiBi, and nothing that theirs ignores or ours lacks."""
    inner = Reader(theirs.take("attn_config", or_null(OBJECT), None) or {}, "attn_config.")
    covered = always(
        attn_type="multihead_attention", alibi=True, alibi_bias_max=8, clip_qkv=None, prefix_lm=False, qk_ln=False,
        attn_uses_sequence_id=False, rope=False, sliding_window_size=-1, is_encoder_decoder=False,
    )  # fmt: skip
    ours = covered.read(inner)
    ours["attention_dropout"] = float(inner.take("attn_pdrop", CHANCE, 0.0))
    scale = inner.take("softmax_scale", or_null(POSITIVE), None)
    ours["attention_scale"] = None if scale is None else float(scale)
    inner.taken.add("attn_impl")
    for key in inner.surplus(NEUTRAL):
        raise ConfigError(f"'attn_config.{key}' = {said(inner.values[key])} is not covered{nearest(key, inner.taken - {key})}")
    return ours


MPT = Family(
    "mpt", "MptForCausalLM", "transformer.",
    (
        *COMMON,
        fixed(norm="layer", position="alibi", activation="gelu"),
        size("n_layers", "num_layers", kind=DEPTH), size("d_model", "width"), size("n_heads", "num_heads"),
        size("max_seq_len", "max_length"),
        equal_heads("d_model", "n_heads"),
        # theirs computes 4 D whatever expansion_ratio says
        Option(lambda theirs: {"ff_width": 4 * theirs.take("d_model", SIZE)}, lambda config: {}), always(expansion_ratio=4),
        number("layer_norm_epsilon", "norm_eps", default=1e-5),
        number("emb_pdrop", "embedding_dropout", default=0.0, kind=CHANCE),
        number("resid_pdrop", "residual_dropout", default=0.0, kind=CHANCE),
        flag("tie_word_embeddings", "tied_embeddings", default=True),
        Option(_read_mpt_attention, lambda config: {"attn_config": {
            "alibi": True, "softmax_scale": config.attention_scale,
        }}),
        option("norm_type", "norm_bias", default="low_precision_layernorm", spellings={
            "low_precision_layernorm": False, "layernorm": False,  # no_bias, below
        }),
        always(no_bias=True, logit_scale=None), ignored("learned_pos_emb", "embedding_fraction", "init_device", "init_config"),
    ),
    (
        *tensors("transformer.", (
            ("wte.weight", "embed/tokens", SAME),
            *norm("blocks.{}.norm_1", "layers/attention_norm"), *norm("blocks.{}.norm_2", "layers/mlp_norm"),
            *linear("blocks.{}.attn.Wqkv", "attention/q attention/k attention/v", fused(LINEAR_TO_HEADS, 0)),
            *linear("blocks.{}.attn.out_proj", "attention/o", LINEAR_FROM_HEADS),
            *linear("blocks.{}.ffn.up_proj", "mlp/up", LINEAR), *linear("blocks.{}.ffn.down_proj", "mlp/down", LINEAR),
            *norm("norm_f", "final_norm"),
        )),
        HEAD,
    ),
)  # fmt: skip
