"""GPT-NeoX, Pythia."""

from __future__ import annotations

from jaxllm.interop.families.family import NORM_BEFORE, PLAIN, SIZES, Family, linear, norm, tensors
from jaxllm.interop.kinds import CHANCE
from jaxllm.interop.layout import INTERLEAVED, LINEAR, LINEAR_FROM_HEADS, SAME, Row
from jaxllm.interop.options import equal_heads, fixed, flag, number, option, rope

GPT_NEOX = Family(
    "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.",
    (
        *SIZES,
        fixed(norm="layer", norm_bias=True, parallel_norms=2, mlp_bias=True),
        equal_heads("hidden_size", "num_attention_heads"),
        number("layer_norm_eps", "norm_eps", default=1e-5),
        option("hidden_act", "activation", default="gelu", spellings=PLAIN),
        number("hidden_dropout", "embedding_dropout", "residual_dropout", default=0.0, kind=CHANCE),
        option("use_parallel_residual", "block", default=True, spellings={True: "parallel", False: "serial"}),
        flag("attention_bias", "qkv_bias", "attention_out_bias", default=True),
        flag("tie_word_embeddings", "tied_embeddings", default=False),
        rope(base_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25),
    ),
    (
        *tensors("gpt_neox.", (
            ("embed_in.weight", "embed/tokens", SAME),
            *NORM_BEFORE,
            *linear("layers.{}.attention.query_key_value", "attention/q attention/k attention/v",
                     INTERLEAVED, INTERLEAVED),
            *linear("layers.{}.attention.dense", "attention/o", LINEAR_FROM_HEADS),
            *linear("layers.{}.mlp.dense_h_to_4h", "mlp/up", LINEAR),
            *linear("layers.{}.mlp.dense_4h_to_h", "mlp/down", LINEAR),
            *norm("final_layer_norm", "final_norm"),
        )),
        Row("embed_out.weight", ("unembed/kernel",), SAME),
    ),
)  # fmt: skip
