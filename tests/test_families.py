"""Hugging Face's configs and tensor names against ours, without torch. Logits against theirs: tests/parity."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from beartype.door import is_bearable
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import models
from jaxllm import tree
from jaxllm.config import ConfigError, LayerKind, ModelConfig, RopeConfig
from jaxllm.interop.families import FAMILIES, config_from_hf, config_to_hf, params_from_hf, params_to_hf
from jaxllm.interop.layout import leaf_shapes
from jaxllm.interop.options import TRAINING_ONLY, canonical
from jaxllm.models.transformer import decoder

# ------------------------------------------------------------------- released configs, as on the hub

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "use_cache": True, "transformers_version": "4.40.1", "torch_dtype": "bfloat16"}
_GPT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "summary_type": "cls_index", "summary_first_dropout": 0.1}  # fmt: skip
RELEASED: dict[str, dict[str, Any]] = {  # name in configs/models.py -> what decides the architecture in the released config.json
    "gpt1": _GPT | {"model_type": "openai-gpt", "afn": "gelu", "n_ctx": 512, "n_positions": 512, "n_special": 0,
        "predict_special_tokens": True, "vocab_size": 40478},
    "gpt2": _GPT | {"model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024, "n_positions": 1024, "vocab_size": 50257,
        "bos_token_id": 50256, "eos_token_id": 50256, "task_specific_params": {"text-generation": {"do_sample": True}}},
    "llama2_7b": _TOKENS | {"model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False,
        "vocab_size": 32000},
    "openllama_7b": _TOKENS | {"model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": 32000},
    "llama3_1_8b": _TOKENS | {"model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                         "rope_type": "llama3"}, "tie_word_embeddings": False, "vocab_size": 128256},
    "mistral_7b": _TOKENS | {"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000},
    "mistral_nemo_12b": _TOKENS | {"model_type": "mistral", "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "intermediate_size": 14336, "max_position_embeddings": 128000, "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 131072},
    "smollm2_135m": _TOKENS | {"model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "vocab_size": 49152, "transformers.js_config": {"dtype": "fp16"}},
    "qwen3_0_6b": _TOKENS | {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936},
    "gemma3_270m": _TOKENS | {"model_type": "gemma3_text", "_sliding_window_pattern": 6, "attention_bias": False,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "intermediate_size": 2048, "max_position_embeddings": 32768,
        "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
        "use_bidirectional_attention": False, "vocab_size": 262144},
    "pythia_160m": _TOKENS | {"model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 768, "initializer_range": 0.02,
        "intermediate_size": 3072, "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 12,
        "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "use_parallel_residual": True, "vocab_size": 50304},
    "mpt_7b": _TOKENS | {"model_type": "mpt", "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
        "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False,
        "softmax_scale": None}, "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4,
        "init_config": {"name": "kaiming_normal_"}, "init_device": "cpu", "learned_pos_emb": True, "logit_scale": None,
        "max_seq_len": 2048, "n_heads": 32, "n_layers": 32, "no_bias": True, "norm_type": "low_precision_layernorm",
        "resid_pdrop": 0, "verbose": 0, "vocab_size": 50432},
}  # fmt: skip


def function(config: ModelConfig) -> ModelConfig:
    """What a config computes: one spelling, training apart."""
    default = ModelConfig()
    return replace(canonical(config), **{name: getattr(default, name) for name in TRAINING_ONLY})


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_the_rows_of_our_table(name: str):
    assert function(config_from_hf(RELEASED[name])) == function(getattr(models, name))


# ------------------------------------------------------------------------------- small configs

_BASE = ModelConfig(num_layers=3, width=12, num_heads=6, num_kv_heads=2, head_size=4, ff_width=20, vocab_size=23, max_length=32,
                    tied_embeddings=False, norm_eps=1e-5)  # fmt: skip
_LAYER = replace(_BASE, norm="layer", norm_bias=True, activation="gelu_tanh", num_heads=2, num_kv_heads=2, head_size=6,
                 qkv_bias=True, attention_out_bias=True, mlp_bias=True)  # fmt: skip
_LOCAL = LayerKind(window=5, rope=RopeConfig(base=100.0))
_GEMMA = replace(_BASE, norm_placement="both", norm_plus_one=True, activation="geglu_tanh", embedding_scale=12**0.5,
                 attention_scale=24**-0.5, logit_soft_cap=30.0, tied_embeddings=True)  # fmt: skip
_YARN = RopeConfig(base=500.0, scaling="yarn", factor=4.0, original_max_length=8, beta_fast=16.0, attention_factor=1.2)
_LLAMA3 = RopeConfig(base=500.0, scaling="llama3", factor=8.0, original_max_length=16, low_freq_factor=2.0, high_freq_factor=8.0)
SMALL: dict[str, ModelConfig] = {  # each family with as many of its options at unusual values as it has
    "openai-gpt": replace(_LAYER, norm_placement="after_residual", final_norm=False, position="learned", ff_width=48, tied_embeddings=True),
    "gpt2": replace(_LAYER, position="learned", attention_scale=1.0, activation="gelu"),
    "gpt_neox": replace(_LAYER, block="parallel", parallel_norms=2, activation="gelu", rope=replace(_YARN, fraction=2 / 3)),
    "mpt": replace(_LAYER, norm_bias=False, position="alibi", activation="gelu", ff_width=48, tied_embeddings=True, attention_scale=0.3,
                   qkv_bias=False, attention_out_bias=False, mlp_bias=False),
    "llama": replace(_BASE, rope=_LLAMA3, qkv_bias=True, attention_out_bias=True, mlp_bias=True, activation="geglu"),
    "mistral": replace(_BASE, layer_pattern=(LayerKind(window=7),), rope=RopeConfig(scaling="linear", factor=2.0)),
    "qwen2": replace(_BASE, qkv_bias=True, layer_pattern=(LayerKind(), LayerKind(), LayerKind(window=4)), rope=_YARN),
    "qwen3": replace(_BASE, qk_norm="head", tied_embeddings=True, layer_pattern=(LayerKind(window=4), LayerKind())),
    "olmo2": replace(_BASE, norm_placement="after", qk_norm="full"),
    "phi3": replace(_BASE, layer_pattern=(LayerKind(window=7),), rope=RopeConfig(base=300.0, fraction=0.5)),
    "gemma2": replace(_GEMMA, attention_soft_cap=50.0, layer_pattern=(LayerKind(window=5), LayerKind())),
    "gemma3_text": replace(_GEMMA, qk_norm="head", layer_pattern=(_LOCAL, _LOCAL, LayerKind()), qkv_bias=True, attention_out_bias=True,
                           rope=RopeConfig(base=5000.0, scaling="linear", factor=8.0)),
}  # fmt: skip


def random_params(config: ModelConfig, dtype: str = "float32") -> tree.Tree:
    rng = np.random.default_rng(0)
    return tree.from_items([(path, rng.standard_normal(shape).astype(dtype)) for path, shape in leaf_shapes(config).items()])


def theirs(family: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    return params_to_hf(family, SMALL[family], random_params(SMALL[family], dtype))


def same(a: tree.Tree, b: tree.Tree) -> bool:
    return tree.structure_diff(a, b) == [] and all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes() for (_, x), y in zip(tree.items(a), (tree.get(b, p) for p in tree.paths(a)))
    )


def test_every_family_is_here():
    assert set(SMALL) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_round_trip(family: str):
    config = SMALL[family]
    values = json.loads(json.dumps(config_to_hf(family, config)))
    assert values["model_type"] == family
    assert function(config_from_hf(values)) == function(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_params_round_trip_keeps_every_bit(family: str, dtype: str):
    params = random_params(SMALL[family], dtype)
    tensors = params_to_hf(family, SMALL[family], params)
    assert all(tensor.flags["C_CONTIGUOUS"] and tensor.dtype == dtype for tensor in tensors.values())
    assert sum(t.size for t in tensors.values()) == tree.count(params)
    back = params_from_hf(family, SMALL[family], tensors)
    assert same(params, back)


_TABLE = {row.name: getattr(models, row.name) for row in models.PUBLISHED}
_KINDS = {frozenset(leaf_shapes(config)): name for name, config in _TABLE.items()}  # one of each set of leaves; tracing takes time


@pytest.mark.parametrize("name", [*_KINDS.values(), *SMALL])
def test_shapes_of_leaves_are_the_decoders(name: str):
    config = (_TABLE | SMALL)[name]
    expected = jax.eval_shape(decoder(config).init, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in tree.items(expected)} == leaf_shapes(config)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["before", "after", "both", "after_residual"]), st.sampled_from(["serial", "parallel"]), st.sampled_from([1, 2]),
    st.sampled_from(["none", "head", "full"]), st.booleans(), st.booleans(), st.sampled_from(["swiglu", "gelu"]),
)  # fmt: skip
def test_shapes_of_leaves_for_any_block(placement, block, norms, qk_norm, bias, final_norm, activation):
    config = replace(_BASE, num_layers=1, norm_placement=placement, block=block, parallel_norms=norms, qk_norm=qk_norm, norm_bias=bias,
                     mlp_bias=bias, final_norm=final_norm, activation=activation)  # fmt: skip
    expected = jax.eval_shape(decoder(config).init, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in tree.items(expected)} == leaf_shapes(config)


# ------------------------------------------------------------------------- layouts, entry by entry


def entries(family: str, name: str, *paths: str) -> tuple[np.ndarray, list[np.ndarray]]:
    params = random_params(SMALL[family])
    return params_to_hf(family, SMALL[family], params)[name], [tree.get(params, path)[1] for path in paths]  # layer 1


def test_neox_interleaves_q_k_v_by_head():
    fused, (q, k, v) = entries("gpt_neox", "gpt_neox.layers.1.attention.query_key_value.weight",
                               *(f"layers/attention/{n}/kernel" for n in "qkv"))  # fmt: skip
    for n in range(2):
        for part, kernel in enumerate((q, k, v)):
            for h in range(6):
                assert np.array_equal(fused[n * 18 + part * 6 + h], kernel[:, n, h])


def test_gpt2_kernels_are_in_by_out_and_q_k_v_follow_each_other():
    fused, (q, k, v) = entries("gpt2", "transformer.h.1.attn.c_attn.weight", *(f"layers/attention/{n}/kernel" for n in "qkv"))
    bias, biases = entries("gpt2", "transformer.h.1.attn.c_attn.bias", *(f"layers/attention/{n}/bias" for n in "qkv"))
    for part, (kernel, own) in enumerate(zip((q, k, v), biases, strict=True)):
        assert np.array_equal(fused[:, part * 12 + 1 * 6 + 4], kernel[:, 1, 4])
        assert bias[part * 12 + 1 * 6 + 4] == own[1, 4]
    down, (kernel,) = entries("gpt2", "transformer.h.1.mlp.c_proj.weight", "layers/mlp/down/kernel")
    assert np.array_equal(down, kernel)


def test_phi3_fuses_grouped_heads_and_gate_before_up():
    fused, (q, k, v) = entries("phi3", "model.layers.1.self_attn.qkv_proj.weight", *(f"layers/attention/{n}/kernel" for n in "qkv"))
    assert np.array_equal(fused[4 * 5 + 3], q[:, 5, 3])
    assert np.array_equal(fused[24 + 4 * 1 + 2], k[:, 1, 2])
    assert np.array_equal(fused[24 + 8 + 4 * 1 + 2], v[:, 1, 2])
    gate_up, (gate, up) = entries("phi3", "model.layers.1.mlp.gate_up_proj.weight", "layers/mlp/gate/kernel", "layers/mlp/up/kernel")
    assert np.array_equal(gate_up, np.concatenate([gate.T, up.T]))


def test_llama_kernels_are_out_by_in():
    out, (o,) = entries("llama", "model.layers.1.self_attn.o_proj.weight", "layers/attention/o/kernel")
    assert np.array_equal(out[:, 4 * 5 + 3], o[5, 3])
    query, (q,) = entries("llama", "model.layers.1.self_attn.q_proj.weight", "layers/attention/q/kernel")
    assert np.array_equal(query[4 * 5 + 3], q[:, 5, 3])


# --------------------------------------------------------------------------------------- refusals


REFUSED = [  # family, changes of its config.json, what the message must name
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama", {"rope_scaling": {"type": "longrope"}}, "longrope"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.5}, "rope_scaling": None},
     "partial_rotary_factor"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}, "rope_theta"),
    ("llama", {"hidden_act": "relu6"}, "relu6"),
    ("llama", {"sliding_window": 4}, "sliding_window"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"num_experts": 8}, "num_experts"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama", {"hiden_size": 12}, "hidden_size"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("openai-gpt", {"afn": "swish"}, "afn"),
    ("openai-gpt", {"n_inner": 20}, "n_inner"),
    ("gpt_neox", {"head_dim": 8}, "head_dim"),
    ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "clip_qkv"),
    ("mpt", {"attn_config": {"alibi": False}}, "alibi"),
    ("mpt", {"attn_config": {"alibi_bias_max": 16}}, "alibi_bias_max"),
    ("mpt", {"attn_config": {"kv_n_heads": 2}}, "kv_n_heads"),
    ("mpt", {"no_bias": False}, "no_bias"),
    ("mpt", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
    ("mpt", {"expansion_ratio": 2}, "expansion_ratio"),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "longrope"),
    ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),  # which their Phi-3 reads as longrope
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED, ids=[f"{f}-{n}-{i}" for i, (f, _, n) in enumerate(REFUSED)])
def test_an_option_that_is_not_covered_is_refused_by_name(family: str, changes: dict[str, Any], named: str):
    values = config_to_hf(family, SMALL[family])
    with pytest.raises(ConfigError, match=named):
        config_from_hf(values | changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_size_is_named(family: str):
    values = config_to_hf(family, SMALL[family])
    name = next(key for key in ("hidden_size", "n_embd", "d_model") if key in values)
    del values[name]
    with pytest.raises(ConfigError, match=f"no '{name}'"):
        config_from_hf(values)


JUNK = [None, "text", "12", True, False, 0, -1, 1.5, 10**30, math.nan, math.inf, -math.inf, [], [1], ["a"], {}, {"a": 1}, "\ud800"]
"""What a config.json may hold in place of a value; Python's JSON has NaN and Infinity, and half a surrogate pair."""


def with_junk(values: dict[str, Any], junk: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, the config with junk in its place), for keys of objects within it too."""
    for key, value in values.items():
        yield key, values | {key: junk}
        if isinstance(value, dict):
            for inner, changed in with_junk(value, junk):
                yield inner, values | {key: changed}


def assert_of_its_types(config: Any) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        assert is_bearable(value, hint), f"{name} is {value!r}, not {hint}"
        for part in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(part):
                assert_of_its_types(part)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_of_a_wrong_type_is_named_and_never_gets_through(family: str):
    released = next((values for values in RELEASED.values() if values["model_type"] == family), {})
    values = released | config_to_hf(family, SMALL[family])
    assert_of_its_types(config_from_hf(values))
    for junk in JUNK:
        for key, changed in with_junk(values, junk):
            try:
                assert_of_its_types(config_from_hf(changed))
            except ConfigError as error:
                assert key in str(error) or key == "model_type" or junk is None, f"{key} = {junk!r}: {error}"
                assert "\n" not in str(error) and len(str(error)) < 400


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"hidden_size": None},
            "'hidden_size' of the Hugging Face config is null; it must be a whole number from 1 to 16,777",
        ),
        ("llama", {"hidden_size": 12.0}, "'hidden_size' .* is 12.0; it must be a whole number"),
        ("llama", {"max_position_embeddings": 10**8}, "'max_position_embeddings' .* is 100000000; it must be a whole number from 1 to"),
        ("llama", {"num_hidden_layers": 10**7}, "'num_hidden_layers' .* is 10000000; it must be a whole number from 1 to 10,000"),
        ("llama", {"num_key_value_heads": 0}, "'num_key_value_heads' .* is 0; it must be a whole number .*, or null"),
        ("llama", {"num_key_value_heads": 4}, "'num_key_value_heads' = 4 does not divide 'num_attention_heads' = 6"),
        ("llama", {"head_dim": 5}, "llama config is of no model that can be: model.head_size"),
        ("llama", {"num_attention_heads": 24, "head_dim": None}, "'hidden_size' = 12 is less than 'num_attention_heads' = 24"),
        ("llama", {"rms_norm_eps": "1e-5"}, "'rms_norm_eps' .* is \"1e-5\"; it must be a number from 0"),
        ("llama", {"tie_word_embeddings": 0}, "'tie_word_embeddings' .* is 0; it must be true or false"),
        ("llama", {"hidden_act": "sillu"}, "'hidden_act' .* is \"sillu\"; it must be one of .*did you mean '\"silu\"'"),
        ("llama", {"hidden_act": ["silu"]}, "'hidden_act' .* it must be one of"),
        ("llama", {"eos_token_id": "</s>"}, "'eos_token_id' .* it must be a whole number from -1 to .*, or a list .*, or null"),
        ("llama", {"rope_scaling": "linear"}, "'rope_scaling' .* is \"linear\"; it must be an object, or null"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "'rope_scaling.factor' .* it must be a positive number"),
        ("llama", {"rope_theta": [10_000.0]}, "'rope_theta' .* it must be a positive number, or null"),
        ("llama", {"attention_dropout": 1}, "'attention_dropout' .* it must be a number from 0 to below 1"),
        ("qwen2", {"layer_types": "full_attention"}, "'layer_types' .* it must be a list in which each entry is a text, or null"),
        ("mpt", {"attn_config": []}, "'attn_config' .* it must be an object, or null"),
        ("mpt", {"attn_config": {"softmax_scale": "0.3"}}, "'attn_config.softmax_scale' .* it must be a positive number, or null"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "'rope_parameters.full_attention' .* it must be an object, or null"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "'rope_parameters.rope_theta' is not covered"),
        ("gpt2", {"n_inner": 0}, "'n_inner' .* is 0; it must be a whole number from 1 to .*, or null"),
        ("gpt2", {"scale_attn_weights": None}, "'scale_attn_weights' .* is null; it must be true or false"),
    ],
)
def test_a_wrong_value_is_said_with_what_was_given_and_what_is_expected(family: str, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(config_to_hf(family, SMALL[family]) | changes)


def test_null_is_no_option():
    assert config_from_hf(config_to_hf("llama", SMALL["llama"]) | {"something_new": None}) is not None


def test_unknown_family():
    with pytest.raises(ConfigError, match=r"no family 'lama'.*did you mean 'llama'"):
        config_from_hf({"model_type": "lama"})
    with pytest.raises(ConfigError, match="model_type"):
        config_from_hf({})


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"block": "parallel"}, "block"),
        ("llama", {"layer_pattern": (LayerKind(window=4),)}, "layer_pattern"),
        ("llama", {"qkv_bias": False}, "bias"),  # theirs has one switch for both
        ("llama", {"activation": "gelu"}, "activation|hidden_act"),
        ("llama", {"logit_scale": 0.5}, "logit_scale"),
        ("llama", {"norm_bias": True}, "norm_bias"),
        ("mistral", {"layer_pattern": (LayerKind(window=4), LayerKind())}, "layer_pattern"),
        ("gpt2", {"num_kv_heads": 1}, "num_kv_heads"),
        ("gpt2", {"head_size": 8}, "head_size"),
        ("mpt", {"ff_width": 20}, "ff_width"),
        ("gemma2", {"embedding_scale": 1.0}, "embedding_scale"),
        ("gemma3_text", {"layer_pattern": (replace(_LOCAL, rope=_LLAMA3), LayerKind())}, "layer_pattern"),
        ("qwen3", {"layer_pattern": (LayerKind(window=4), LayerKind(window=5), LayerKind())}, "layer_pattern"),
        ("phi3", {"rope": _LLAMA3}, "llama3"),
    ],
)
def test_a_config_that_a_family_cannot_express_is_refused(family: str, changes: dict[str, Any], named: str):
    config = replace(SMALL[family], **changes)
    with pytest.raises(ConfigError, match=named):
        config_to_hf(family, config)
    with pytest.raises(ConfigError, match=named):
        params_to_hf(family, config, random_params(config))


def test_training_settings_do_not_stand_in_the_way():
    config = replace(SMALL["llama"], residual_dropout=0.1, embedding_dropout=0.1, init="fan_in")
    assert function(config_from_hf(config_to_hf("llama", config))) == function(config)


def test_static_ntk_is_written_as_the_larger_base_that_it_is():
    config = replace(SMALL["llama"], rope=RopeConfig(scaling="ntk", factor=4.0))
    assert config_to_hf("llama", config)["rope_theta"] == pytest.approx(10_000 * 4 ** (4 / 2))


def test_missing_and_surplus_tensors_are_listed_with_the_nearest_names():
    tensors = theirs("llama")
    tensors["model.layers.1.mlp.up_prj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ConfigError) as error:
        params_from_hf("llama", SMALL["llama"], tensors)
    assert "missing model.layers.1.mlp.up_proj.weight (20, 12); did you mean 'model.layers.1.mlp.up_prj.weight'?" in str(error.value)
    assert "surplus model.layers.1.mlp.up_prj.weight (20, 12); did you mean" in str(error.value)


def test_a_layer_too_many_is_surplus_and_one_too_few_is_missing():
    tensors, config = theirs("llama"), SMALL["llama"]
    with pytest.raises(ConfigError, match=r"surplus model\.layers\.2"):
        params_from_hf("llama", replace(config, num_layers=2), tensors)
    with pytest.raises(ConfigError, match=r"missing model\.layers\.3.*more"):
        params_from_hf("llama", replace(config, num_layers=4), tensors)


def test_a_wrong_shape_says_both():
    tensors = theirs("gpt_neox")
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    tensors[name] = tensors[name].T
    with pytest.raises(ConfigError, match=r"query_key_value\.weight has shape \(12, 36\), expected \(36, 12\)"):
        params_from_hf("gpt_neox", SMALL["gpt_neox"], tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_the_bare_model_leave_out_the_prefix(family: str):
    tensors, prefix = theirs(family), FAMILIES[family].prefix
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert same(params_from_hf(family, SMALL[family], tensors), params_from_hf(family, SMALL[family], bare))


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("gpt2", ["h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
        ("llama", ["model.layers.2.self_attn.rotary_emb.inv_freq"]),
    ],
)
def test_masks_and_frequencies_are_left_out(family: str, buffers: list[str]):
    tensors = theirs(family)
    with_buffers = tensors | {name: np.ones((1, 1, 4, 4), np.float32) for name in buffers}
    assert same(params_from_hf(family, SMALL[family], tensors), params_from_hf(family, SMALL[family], with_buffers))


def test_a_second_copy_of_a_tied_head_must_be_a_copy():
    tensors = theirs("qwen3")
    table = tensors["model.embed_tokens.weight"]
    params = params_from_hf("qwen3", SMALL["qwen3"], tensors | {"lm_head.weight": table.copy()})
    assert same(params, random_params(SMALL["qwen3"]))
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        params_from_hf("qwen3", SMALL["qwen3"], tensors | {"lm_head.weight": table + 1})


def test_rows_that_pad_the_vocabulary_are_cut_off():
    config, params = SMALL["llama"], random_params(SMALL["llama"])
    padded = tree.map_with_path(lambda path, x: np.pad(x, ((0, 5), (0, 0))) if path in ("embed/tokens", "unembed/kernel") else x, params)
    assert same(params_from_hf("llama", config, params_to_hf("llama", config, padded)), params)


def test_params_of_another_config_are_refused():
    params = random_params(SMALL["llama"])
    del params["layers"]["attention"]["q"]["bias"]
    with pytest.raises(ConfigError, match="missing layers/attention/q/bias"):
        params_to_hf("llama", SMALL["llama"], params)


def test_canonical_keeps_what_matters():
    for field in dataclasses.fields(RopeConfig):  # a changed setting of the scaling in use is never reset
        if field.name in ("fraction", "scaling"):
            continue
        changed = replace(_YARN, **{field.name: (getattr(_YARN, field.name) or 1) * 2})
        used = field.name not in ("low_freq_factor", "high_freq_factor")
        assert (canonical(replace(_BASE, rope=changed)) != canonical(replace(_BASE, rope=_YARN))) == used
