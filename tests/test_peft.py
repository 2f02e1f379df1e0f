"""Adapters in PEFT's format, without torch: names, orders, options; the commands. Against PEFT itself: tests/parity/test_peft_parity.py."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import SMALL, random_params

from jaxllm import checkpoint_slices, manifest, pretrained, tree
from jaxllm.config import ConfigError, LoraConfig, ModelConfig, OptimConfig, PrefixConfig, TrainConfig
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.interop import peft
from jaxllm.interop.families import FAMILIES, params_from_hf, params_to_hf
from jaxllm.interop.layout import leaf_shapes
from jaxllm.surgery import adapters, prefix
from tools import convert
from tools import peft as tool

QV = r"layers/attention/[qv]/kernel"
ALL = r"(layers/(attention|mlp)/[a-z]+|unembed)/kernel"
TINY = ModelConfig(num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_size=4, ff_width=24, vocab_size=261, max_length=32)
BASE = "base_model.model.model.layers"


def random_leaves(model: ModelConfig, config: LoraConfig, seed: int = 0) -> tree.Tree:
    """Low-rank leaves for every rule, all of them random."""
    rng, params = np.random.default_rng(seed), random_params(model)
    shapes = jax.eval_shape(lambda: adapters.init_leaves(params, config, jax.random.key(0)))
    return tree.map_with_path(lambda path, leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def same(a: tree.Tree, b: tree.Tree) -> bool:
    left, right = ({path: np.asarray(leaf) for path, leaf in tree.items(t)} for t in (a, b))
    return left.keys() == right.keys() and all(
        left[p].dtype == right[p].dtype and left[p].shape == right[p].shape and left[p].tobytes() == right[p].tobytes() for p in left
    )


def change_of(leaves: tree.Tree, config: LoraConfig, model: ModelConfig) -> tree.Tree:
    """s·A·B of every kernel by its definition, index by index, and zeros for all else."""
    own = dict(tree.items(leaves))

    def change(path: str, shape: tuple[int, ...]) -> np.ndarray:
        a, b = (own.get(path.replace("kernel", f"lora_{x}")) for x in "ab")
        if a is None:
            return np.zeros(shape)
        rank, alpha = next((r, al) for pattern, r, al in config.rules if re.fullmatch(pattern, path))
        s = alpha / rank if config.scale == "rank" else alpha / math.sqrt(rank)
        if path == "unembed/kernel":
            return s * np.einsum("DR,VR->VD", a, b)
        spec = {"o": "LNHR,LRD->LNHD"}.get(path.split("/")[2], "LDR,LRNH->LDNH" if len(shape) == 4 else "LDR,LRF->LDF")
        return s * np.einsum(spec, a, b)

    return tree.from_items([(path, change(path, shape)) for path, shape in leaf_shapes(model).items()])


def their_change(files: peft.Files, name: str) -> np.ndarray:
    """scaling · B @ A, as PEFT computes it for the module of that weight, [out in]."""
    config, module = files.config, name.removesuffix(".weight")
    start = f"base_model.model.{module}"
    a, b = files.tensors[f"{start}.lora_A.weight"], files.tensors[f"{start}.lora_B.weight"]

    def number(key: str, default: str) -> float:  # peft.utils.other.get_pattern_key
        match = (value for pattern, value in config[key].items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(match, config[default])

    rank, alpha = number("rank_pattern", "r"), number("alpha_pattern", "lora_alpha")
    assert a.shape[0] == b.shape[1] == rank
    return (alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank) * (b.astype(np.float64) @ a)


# ------------------------------------------------------------------------------------ names and orders


def test_names_and_shapes_of_a_llama():
    """A literal list, and every number in its place; the feed-forward width is not the model's."""
    model = replace(TINY, tied_embeddings=False)
    config = LoraConfig(((QV, 3, 6.0), (r"layers/attention/o/kernel|layers/mlp/down/kernel", 2, 4.0), (r"unembed/kernel", 1, 2.0)))
    leaves = random_leaves(model, config)
    files = peft.write("llama", model, peft.Adapter(config, leaves))
    expected = {f"base_model.model.lm_head.lora_{x}.weight": shape for x, shape in zip("AB", [(1, 16), (261, 1)], strict=True)}
    for i in range(2):
        for name, rank, into, out in (("self_attn.q_proj", 3, 16, 16), ("self_attn.v_proj", 3, 16, 8), ("self_attn.o_proj", 2, 16, 16),
                                      ("mlp.down_proj", 2, 24, 16)):  # fmt: skip
            expected |= {f"{BASE}.{i}.{name}.lora_A.weight": (rank, into), f"{BASE}.{i}.{name}.lora_B.weight": (out, rank)}
    assert {name: tensor.shape for name, tensor in files.tensors.items()} == expected
    assert files.config == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "auto_mapping": None, "base_model_name_or_path": None, "revision": None,
        "inference_mode": True, "modules_to_save": None, "r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": "gaussian", "exclude_modules": None, "layers_to_transform": None,
        "layers_pattern": None, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"],
        "rank_pattern": {"o_proj": 2, "down_proj": 2, "lm_head": 1}, "alpha_pattern": {"o_proj": 4, "down_proj": 4, "lm_head": 2},
    }  # fmt: skip
    q, o = tree.get(leaves, "layers/attention/q"), tree.get(leaves, "layers/attention/o")
    get = lambda name, x: files.tensors[f"{BASE}.1.{name}.lora_{x}.weight"]
    for r in range(3):
        assert get("self_attn.q_proj", "A")[r, 5] == q["lora_a"][1, 5, r]
        assert get("self_attn.q_proj", "B")[2 * 4 + 3, r] == q["lora_b"][1, r, 2, 3]
    assert get("self_attn.o_proj", "A")[1, 2 * 4 + 3] == o["lora_a"][1, 2, 3, 1]
    assert get("self_attn.o_proj", "B")[7, 1] == o["lora_b"][1, 1, 7]


def test_target_names_say_which_of_several_is_meant():
    config = LoraConfig(((r"layers/attention/o/kernel", 2, 4.0),))
    files = peft.write("gpt2", SMALL["gpt2"], peft.Adapter(config, random_leaves(SMALL["gpt2"], config)))
    assert files.config["target_modules"] == ["attn.c_proj"] and files.config["fan_in_fan_out"] is True
    assert all(".attn.c_proj." in name for name in files.tensors)


@pytest.mark.parametrize("scale", ["rank", "sqrt_rank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_their_delta_is_ours_in_the_table_that_reads_the_weight(family: str, scale: Any):
    """Ranks and scales unlike for q, k and v; k has none where they are fused."""
    model = SMALL[family]
    rules = ((r"layers/attention/q/kernel", 4, 32.0), (r"layers/attention/k/kernel", 0, 1.0), (r"layers/attention/v/kernel", 3, 5.0),
             (ALL, 2, 7.0))  # fmt: skip
    config = LoraConfig(rules, scale)
    leaves = random_leaves(model, config)
    files = peft.write(family, model, peft.Adapter(config, leaves))
    expected = params_to_hf(family, model, change_of(leaves, config, model))
    adapted = [name for name in expected if f"base_model.model.{name.removesuffix('weight')}lora_A.weight" in files.tensors]
    assert len(files.tensors) == 2 * len(adapted) > 4 * model.num_layers
    for name, change in expected.items():
        if name not in adapted:
            assert not change.any()
            continue
        theirs = their_change(files, name)
        is_conv = files.config["fan_in_fan_out"] and name != "lm_head.weight"
        np.testing.assert_allclose(theirs.T if is_conv else theirs, change, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_adapter_is_read_by_the_same_table(family: str):
    """PEFT's on every linear map: one A for a fused module. Back, each bit is theirs."""
    model, rng = SMALL[family], np.random.default_rng(1)
    shapes = {name: x.shape for name, x in params_to_hf(family, model, random_params(model)).items()}
    conv = family in ("gpt2", "openai-gpt")
    files = peft.Files({"peft_type": "LORA", "target_modules": "all-linear", "r": 3, "lora_alpha": 5, "rank_pattern": {},
                        "alpha_pattern": {}, "use_rslora": False}, {})  # fmt: skip
    for name, shape in shapes.items():
        if len(shape) == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
            out, into = shape[::-1] if conv else shape
            start = f"base_model.model.{name.removesuffix('.weight')}"
            files.tensors[f"{start}.lora_A.weight"] = rng.standard_normal((3, into)).astype(np.float32)
            files.tensors[f"{start}.lora_B.weight"] = rng.standard_normal((out, 3)).astype(np.float32)
    adapter = peft.read(family, model, files.config, files.tensors)
    assert isinstance(adapter.config, LoraConfig)
    changes = {name: np.zeros(shape) for name, shape in shapes.items()}
    for name in changes:
        if f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight" in files.tensors:
            changes[name] = np.ascontiguousarray(their_change(files, name).T if conv else their_change(files, name))
    expected = params_from_hf(family, model, changes)
    for path, ours in tree.items(change_of(adapter.leaves, adapter.config, model)):
        theirs = tree.get(expected, path)
        np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=path)
    back = peft.write(family, model, adapter)
    assert same({"": back.tensors}, {"": files.tensors})


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_keeps_every_bit(family: str):
    """Branches on q, v and o alone, of unlike ranks: zeros in a fused B are none of them."""
    model = SMALL[family]
    own = (r"layers/attention/q/kernel", 4, 32.0), (r"layers/attention/v/kernel", 2, 16.0), (r"layers/.*/(o|down|up)/kernel", 3, 7.0)
    config = LoraConfig(own, dropout=0.25, init="kaiming")
    leaves = random_leaves(model, config)
    files = peft.write(family, model, peft.Adapter(config, leaves))
    values = json.loads(json.dumps(files.config))
    back = peft.read(family, model, values, files.tensors)
    assert same(leaves, back.leaves)
    assert replace(back.config, rules=()) == replace(config, rules=())
    for path in leaf_shapes(model):
        if path.endswith("/kernel"):
            assert tree.match(rules(back.config), path) == tree.match(rules(config), path)
    prefixed = peft.Adapter(PrefixConfig(length=3), {"prefix": {n: random_states(model, 3, n) for n in ("keys", "values")}})
    files = peft.write(family, model, prefixed)
    back = peft.read(family, model, json.loads(json.dumps(files.config)), files.tensors)
    assert back.config == prefixed.config and same(back.leaves, prefixed.leaves)


def rules(config: Any) -> list[tuple[str, tuple[int, float]]]:
    return [(pattern, (rank, alpha)) for pattern, rank, alpha in config.rules]


def random_states(model: ModelConfig, length: int, name: str) -> np.ndarray:
    shape = (model.num_layers, length, model.num_kv_heads, model.head_size)
    return np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["gpt2", "gpt_neox", "phi3", "llama"]), st.lists(st.integers(0, 4), min_size=7, max_size=7), st.booleans())
def test_any_choice_of_ranks_comes_back(family: str, ranks: list[int], sqrt: bool):
    """Of one scale, so that B is not rescaled; alpha = rank · s, or √rank · s."""
    model, names = SMALL[family], ("q", "k", "v", "o", "gate", "up", "down")
    some = [(f"layers/{'attention' if n in 'qkvo' else 'mlp'}/{n}/kernel", r, 4.0 * (r**0.5 if sqrt else r))
            for n, r in zip(names, ranks, strict=True) if r]  # fmt: skip
    some = [rule for rule in some if rule[0] in leaf_shapes(model)]
    config = LoraConfig(tuple(some), "sqrt_rank" if sqrt else "rank")
    if not some:
        return
    leaves = random_leaves(model, config)
    files = peft.write(family, model, peft.Adapter(config, leaves))
    back = peft.read(family, model, files.config, files.tensors)
    assert isinstance(back.config, LoraConfig)
    assert tree.paths(back.leaves) == tree.paths(leaves)
    assert all(np.array_equal(tree.get(back.leaves, p), x) if p.endswith("lora_a") else np.allclose(tree.get(back.leaves, p), x, rtol=1e-6)
               for p, x in tree.items(leaves))  # fmt: skip
    ours, theirs = (change_of(t, c, model) for t, c in ((leaves, config), (back.leaves, back.config)))
    assert all(np.allclose(tree.get(theirs, path), x, atol=1e-4) for path, x in tree.items(ours))


# ------------------------------------------------------------------------------------------- options


def adapter_on(modules: Mapping[str, tuple[int, int, int]], seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of a LoRA on modules: name -> (rank, inputs, outputs)."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (rank, into, out) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((rank, into)).astype(np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((out, rank)).astype(np.float32)
    return tensors


def q_and_v(rank: int = 2) -> dict[str, np.ndarray]:
    """PEFT's default on a Llama like TINY."""
    sizes = {"q_proj": (rank, 16, 16), "v_proj": (rank, 16, 8)}
    return adapter_on({f"model.layers.{i}.self_attn.{name}": size for i in range(2) for name, size in sizes.items()})


LORA = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "r": 2}


@pytest.mark.parametrize("targets", [
    {"target_modules": ["v_proj", "q_proj"]}, {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"}, {"target_modules": None},
    {"target_modules": ["self_attn.q_proj", "model.layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj", "absent"]},
    {"target_modules": "all-linear", "exclude_modules": r".*(k|o|gate|up|down)_proj"},
    {"target_modules": ["q_proj", "v_proj", "o_proj"], "exclude_modules": ["self_attn.o_proj"]},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers"}, {"layers_to_transform": [0, 1, 7], "layers_pattern": ["h", "layers"]},
    {"unknown_key": None, "other": [], "lora_bias": False, "loftq_config": {}, "task_type": "CAUSAL_LM", "megatron_core": "megatron.core",
     "fan_in_fan_out": True, "init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "peft_version": "0.21.2", "inference_mode": True},
])  # fmt: skip
def test_ways_to_name_the_same_modules(targets: dict[str, Any]):
    adapter = peft.read("llama", TINY, LORA | targets, q_and_v())
    assert {rule[0] for rule in adapter.config.rules} == {"layers/attention/q/kernel", "layers/attention/v/kernel"}
    assert adapter.config.rules[0][1:] == (2, 8.0)  # lora_alpha's default


def test_layers_of_unlike_ranks_and_scales():
    """Ours have one rank and scale: zeros fill up, B takes the rest; layers that PEFT leaves alone are zero, A and B alike."""
    model = replace(TINY, num_layers=3)
    tensors = adapter_on({"model.layers.0.self_attn.q_proj": (2, 16, 16), "model.layers.2.self_attn.q_proj": (5, 16, 16)})
    values = {"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": [0, 2], "r": 2, "lora_alpha": 6,
              "rank_pattern": {"layers.2.self_attn.q_proj": 5}, "alpha_pattern": {r".*2.*\.q_proj": 20}}  # fmt: skip
    adapter = peft.read("llama", model, values, tensors)
    assert adapter.config.rules == (("layers/attention/q/kernel", 5, 15.0),)  # s = 6 / 2 = 15 / 5
    change = tree.get(change_of(adapter.leaves, adapter.config, model), "layers/attention/q/kernel").reshape(3, 16, 16)
    for i, s in ((0, 6 / 2), (2, 20 / 5)):
        a, b = (tensors[f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
        np.testing.assert_allclose(change[i], (s * b @ a).T, atol=1e-5)
    assert not any(tree.get(adapter.leaves, f"layers/attention/q/lora_{x}")[1].any() for x in "ab")


def test_rslora_divides_by_the_root():
    adapter = peft.read("llama", TINY, LORA | {"use_rslora": True, "r": 4, "lora_alpha": 16}, q_and_v(4))
    assert adapter.config.scale == "sqrt_rank" and adapters.scale_of(adapter.config, "layers/attention/q/kernel") == 8.0


def test_a_fresh_adapter_on_a_fused_module_keeps_all_of_its_rank():
    """B is zero, which says nothing about who will use what."""
    tensors = adapter_on({f"transformer.h.{i}.attn.c_attn": (3, 24, 72) for i in range(3)})
    model = replace(TINY, position="learned", norm="layer", norm_bias=True, qkv_bias=True, attention_out_bias=True, mlp_bias=True, width=24,
                    num_kv_heads=4, num_layers=3, head_size=6, activation="gelu_tanh", tied_embeddings=True)  # fmt: skip
    zeros = {name: np.zeros_like(x) if "lora_B" in name else x for name, x in tensors.items()}
    adapter = peft.read("gpt2", model, {"peft_type": "LORA", "target_modules": ["c_attn"], "r": 3}, zeros)
    assert [rule[:2] for rule in adapter.config.rules] == [(f"layers/attention/{n}/kernel", 3) for n in "qkv"]


def test_dora_magnitudes_and_where_they_come_from():
    """[out] per module; of parts and layers without a branch they are the kernel's norms, and the base must be there."""
    model = SMALL["phi3"]
    params, config = random_params(model), LoraConfig(((QV, 2, 4.0),), dora=True)
    adapter, base = peft.Adapter(config, random_leaves(model, config)), dict(tree.items(params))
    with pytest.raises(ConfigError, match="needs the norms of layers/attention/k/kernel"):
        peft.write("phi3", model, adapter)
    files = peft.write("phi3", model, adapter, base)
    name = "model.layers.1.self_attn.qkv_proj"
    weight, m = params_to_hf("phi3", model, params)[f"{name}.weight"], files.tensors[f"base_model.model.{name}.lora_magnitude_vector"]
    N, K, H = model.num_heads, model.num_kv_heads, model.head_size
    keys = slice(N * H, (N + K) * H)
    np.testing.assert_allclose(m[keys], np.linalg.norm(weight[keys], axis=1), rtol=1e-5)
    assert np.array_equal(m[: N * H], tree.get(adapter.leaves, "layers/attention/q/lora_m")[1].reshape(-1))
    back = peft.read("phi3", model, files.config, files.tensors)
    for n in "qv":
        assert same(tree.get(back.leaves, f"layers/attention/{n}"), tree.get(adapter.leaves, f"layers/attention/{n}"))
    assert not tree.get(back.leaves, "layers/attention/k/lora_b").any()  # a magnitude needs a branch beside it
    some = {key: x for key, x in files.tensors.items() if ".layers.0." not in key}
    values = files.config | {"layers_to_transform": list(range(1, model.num_layers))}
    with pytest.raises(ConfigError, match="the base's weights were not given"):
        peft.read("phi3", model, values, some)
    partly = peft.read("phi3", model, values, some, base)
    m_partly, m_back = (tree.get(each.leaves, "layers/attention/q/lora_m") for each in (partly, back))
    assert np.array_equal(m_partly[1:], m_back[1:])
    np.testing.assert_allclose(m_partly[0], np.sqrt(np.square(base["layers/attention/q/kernel"][0]).sum(0)), rtol=1e-5)


def test_norms_of_a_kernel_are_those_of_its_outputs():
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 16)).astype(np.float32)
    for site, axes in (("layers/attention/o", (0, 1)), ("layers/attention/q", 0)):
        np.testing.assert_allclose(peft.norms({f"{site}/kernel": x}, site, 1), np.sqrt(np.square(x[1]).sum(axes)), rtol=1e-5)


def test_prefix_states_in_peft_s_order():
    """[P, (layer, key or value, head, size)]; with fewer key/value heads the width is theirs alone."""
    adapter = peft.Adapter(PrefixConfig(length=3), {"prefix": {n: random_states(TINY, 3, n) for n in ("keys", "values")}})
    files = peft.write("llama", TINY, adapter)
    flat = files.tensors["prompt_embeddings"]
    assert list(files.tensors) == ["prompt_embeddings"] and flat.shape == (3, 2 * 2 * 8)
    for layer, (j, name), head in ((0, (0, "keys"), 1), (1, (0, "keys"), 0), (1, (1, "values"), 1)):
        start = ((2 * layer + j) * 2 + head) * 4
        assert np.array_equal(flat[2, start : start + 4], tree.get(adapter.leaves, f"prefix/{name}")[layer, 2, head])
    own = {"num_virtual_tokens": 3, "token_dim": 8, "num_layers": 2, "num_attention_heads": 2, "num_transformer_submodules": 1}
    assert own.items() <= files.config.items() and files.config["prefix_projection"] is False
    from_mlp = peft.read("llama", TINY, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "prefix_projection": True}, files.tensors)
    assert from_mlp.config == PrefixConfig(length=3) and same(from_mlp.leaves, adapter.leaves)


# ----------------------------------------------------------------------------------------- bad input

_HEAD = {"base_model.model.lm_head.base_layer.weight": np.zeros((3, 16), np.float32)}
BAD: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {  # name -> (config, tensors, what is said)
    "kind": ({"peft_type": "IA3"}, None, r"peft_type is 'IA3'; LORA and PREFIX_TUNING"),
    "no kind": ({"r": 2, "peft_type": None}, None, "peft_type is None"),
    "task": ({"task_type": "SEQ_CLS"}, None, r"task_type.* is \"SEQ_CLS\"; it must be CAUSAL_LM"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, None, r"modules_to_save = \[\"lm_head\"\].*merge_and_unload"),
    "bias": ({"bias": "lora_only"}, None, "trains biases too .bias = 'lora_only'"),
    "lora_bias": ({"lora_bias": True}, None, "'lora_bias' = true is not covered"),
    "target_parameters": ({"target_parameters": ["gate_up_proj"]}, None, "'target_parameters' = .* is not covered; did you mean"),
    "unknown": ({"new_trick": 3}, None, "'new_trick' = 3 is not covered"),
    "layer_replication": ({"layer_replication": [[0, 1]]}, None, "'layer_replication' = .* is not covered"),
    "trainable_tokens": ({"trainable_token_indices": [1]}, None, "'trainable_token_indices' = .* is not covered"),
    "init": ({"init_lora_weights": "pissa"}, None, "init_lora_weights.* is \"pissa\".*change the base's own weights"),
    "r type": ({"r": "8"}, None, r"adapter_config\.r' .* is \"8\"; it must be a whole number"),
    "r zero": ({"r": 0}, None, "it must be a whole number from 1"),
    "alpha": ({"lora_alpha": 0}, None, "lora_alpha.*must be a positive number"),
    "pattern": ({"rank_pattern": {"q_proj": 1.5}}, None, "rank_pattern.q_proj.*must be a whole number"),
    "targets type": ({"target_modules": 7}, None, "target_modules.*must be a text"),
    "no match": ({"target_modules": ["q_prj"]}, None, r"\[\"q_prj\"\] matches no linear map of the base, .* did you mean 'q_proj'"),
    "part of a name": ({"target_modules": ["proj"]}, None, "matches no linear map"),
    "regex": ({"target_modules": "(q_proj"}, None, "target_modules has '.q_proj', which is not a regular expression"),
    "layers with regex": ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, None, "layers_to_transform goes with a list"),
    "missing": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, None, r"missing .*\.0\.self_attn\.k_proj\.lora_A\.weight \(2, 16\)"),
    "surplus": ({"target_modules": ["q_proj"]}, None, r"surplus .*layers\.0\.self_attn\.v_proj\.lora_A\.weight \(2, 16\)"),
    "rank": ({"r": 4}, None, r"q_proj.lora_A.weight has shape \(2, 16\), expected \(4, 16\)"),
    "full rank": ({"r": 9}, q_and_v(9), r"layers/attention/v rank 9, and the matrix itself has rank 8 at most; fold it in"),
    "dora missing": ({"use_dora": True}, None, r"missing .*q_proj\.lora_magnitude_vector \(16,\)"),
    "another base": ({}, {name: x[..., :2].T[..., :8].T for name, x in q_and_v().items()}, "does not fit its config and this base"),
    "whole weights": ({}, q_and_v() | {"base_model.model.lm_head.weight": np.zeros(2)}, "weights of the model itself .*merge_and_unload"),
    "embedding": ({}, q_and_v() | {f"{BASE[:-7]}.embed_tokens.lora_embedding_A": np.zeros(2)}, "changes the embedding"),
    "tied head": ({"target_modules": ["lm_head"]}, None, "matches no linear map"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_said_in_one_line(what: str):
    values, tensors, said = BAD[what]
    with pytest.raises(ConfigError, match=said) as error:
        peft.read("llama", replace(TINY, tied_embeddings=True), LORA | values, q_and_v() if tensors is None else tensors)
    assert "\n" not in str(error.value)


def test_a_head_with_a_branch_may_come_with_itself():
    """PEFT writes the head beside its branch: the base's own is nothing new, another is."""
    model = replace(TINY, tied_embeddings=False)
    tensors, values = adapter_on({"lm_head": (2, 16, 261)}), {"peft_type": "LORA", "target_modules": ["lm_head"], "r": 2}
    head = np.random.default_rng(0).standard_normal((261, 16)).astype(np.float32)
    copy = {"base_model.model.lm_head.base_layer.weight": head}
    base = {"unembed/kernel": head.astype(ml_dtypes.bfloat16)}
    plain = peft.read("llama", model, values, tensors)
    assert same(peft.read("llama", model, values, tensors | copy, {"unembed/kernel": head}).leaves, plain.leaves)
    assert same(peft.read("llama", model, values, tensors | copy, base).leaves, plain.leaves)  # the base, in fewer bits
    with pytest.raises(ConfigError, match=r"holds another output head .* than the base"):
        peft.read("llama", model, values, tensors | {key: x + 1 for key, x in copy.items()}, base)
    with pytest.raises(ConfigError, match="the base's weights were not given"):
        peft.read("llama", model, values, tensors | copy)
    with pytest.raises(ConfigError, match="holds another output head"):
        peft.read("llama", model, values, tensors | _HEAD, base)
    with pytest.raises(ConfigError, match="DoRA adapter on the output head"):
        peft.read("llama", model, values | {"use_dora": True}, tensors)


@pytest.mark.parametrize(("values", "tensors", "said"), [
    ({"num_layers": 3}, None, "num_layers is 3, and this base has 2: it was made for another base"),
    ({"token_dim": 16}, None, "token_dim is 16, and this base has 8"),
    ({"num_attention_heads": 4}, None, "num_attention_heads is 4, and this base has 2"),
    ({"num_virtual_tokens": 4}, None, r"prompt_embeddings has shape \(3, 32\); 4 states .* are \(4, 32\)"),
    ({"num_virtual_tokens": 0}, None, "num_virtual_tokens.*whole number from 1"),
    ({"modules_to_save": ["x"]}, None, "modules_to_save"), ({"mystery": 1}, None, "'mystery' = 1 is not covered"),
    ({}, {}, "a prefix is one tensor, prompt_embeddings; the adapter has none"),
])  # fmt: skip
def test_a_prefix_that_does_not_fit(values: dict[str, Any], tensors: dict[str, Any] | None, said: str):
    given = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3} | values
    with pytest.raises(ConfigError, match=said):
        peft.read("llama", TINY, given, {"prompt_embeddings": np.zeros((3, 32), np.float32)} if tensors is None else tensors)


def test_what_peft_cannot_express():
    states = {"prefix": {n: random_states(TINY, 3, n) for n in ("keys", "values")}}
    write = lambda config, leaves: peft.write("llama", TINY, peft.Adapter(config, leaves))
    with pytest.raises(ConfigError, match="PEFT has no infix"):
        write(PrefixConfig(length=3, place="infix", separator=1), states)
    with pytest.raises(ConfigError, match="shift_positions is False"):
        write(PrefixConfig(length=3, shift_positions=False), states)
    with pytest.raises(ConfigError, match=r"prefix.materialise makes them of embedding"):
        write(PrefixConfig(length=3), {"prefix": {"embedding": np.zeros((3, 16))}})
    with pytest.raises(ConfigError, match=r"do not fit the base"):
        write(PrefixConfig(length=4), states)
    config = LoraConfig(((QV, 2, 4.0),))
    with pytest.raises(ConfigError, match="a llama model has no module for the adapter's layers/cross_attention/q"):
        write(config, {"layers": {"cross_attention": {"q": {"lora_a": np.zeros(1)}}}})
    with pytest.raises(ConfigError, match=r"rank 2, and lora\.rules gives it 3"):
        write(LoraConfig(((QV, 3, 4.0),)), random_leaves(TINY, config))
    with pytest.raises(ConfigError, match="do not fit the base's kernel"):
        peft.write("llama", replace(TINY, width=24, head_size=6), peft.Adapter(config, random_leaves(TINY, config)))


# ----------------------------------------------------------------------------------------- commands


def run(*words: Any) -> None:
    assert convert.main([str(word) for word in words]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """What a refused command says: one line, exit status 2."""
    assert convert.main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


MODEL = replace(TINY, tied_embeddings=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model in bfloat16."""
    out = tmp_path_factory.mktemp("base") / "base"
    source = {"kind": "huggingface", "family": "llama", "from": "someone/tiny"}
    pretrained.save(out, MODEL, random_params(MODEL, ml_dtypes.bfloat16), ByteTokenizer(), chat_template="{{ messages }}", stop_ids=(257,),
                    source=source)  # fmt: skip
    return out


def run_of(base: Path, out: Path, **parts: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """A run with random adapters on top of `base`."""
    config = TrainConfig(
        name="run", model=MODEL, init_from=str(base), optim=OptimConfig(freeze=((tool.ADDED, False), (r".*", True))), **parts
    )
    leaves = dict(tree.items(random_leaves(MODEL, config.lora))) if config.lora.rules else {}
    if config.prefix.length:
        own = prefix.init_leaves(MODEL, config.prefix, jax.random.key(1))
        leaves |= {path: np.asarray(leaf) for path, leaf in tree.items({"prefix": own})}
    tool.save_run(out, config, leaves)
    return out, leaves


LORA_RUN = LoraConfig(((QV, 2, 4.0), (r"unembed/kernel", 1, 2.0)))


def test_a_run_goes_to_peft_and_comes_back(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, leaves = run_of(base, tmp_path / "run", lora=LORA_RUN)
    run("to-peft", folder, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "jaxllm.json"]
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "someone/tiny" and values["target_modules"] == ["q_proj", "v_proj", "lm_head"]
    sidecar = json.loads((tmp_path / "adapter" / "jaxllm.json").read_text())
    assert sidecar["base_fingerprint"] == manifest.fingerprint(base) and sidecar["family"] == "llama"
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * (2 * 2 + 1)
    run("peft", tmp_path / "adapter", base, tmp_path / "back")
    assert "LoRA on layers/attention/q (rank 2)" in capsys.readouterr().out
    opened = tool.open_run(tmp_path / "back")
    own = {path: leaf[:] for path, leaf in opened.leaves.items() if "/lora_" in path}
    assert same(tree.from_items(list(own.items())), tree.from_items(list(leaves.items())))
    assert opened.base == base and opened.config.init_from == str(base) and not opened.changed
    record = json.loads((tmp_path / "back" / "config.json").read_text())
    assert record["parent_fingerprint"] == manifest.fingerprint(base) and record["stop_ids"] == [257]


def test_what_comes_from_peft_generates_as_the_sum_of_both(base: Path, tmp_path: Path):
    """`load` gives base + s·A·B; and `merge` the same, in the base's number format, with the text side of the base."""
    folder, leaves = run_of(base, tmp_path / "run", lora=LORA_RUN)
    model, plain = pretrained.load(folder, precision="float32"), pretrained.load(base, precision="float32")
    change = change_of(tree.from_items(list(leaves.items())), LORA_RUN, MODEL)
    for path, leaf in tree.items(model.params):
        np.testing.assert_allclose(
            np.asarray(leaf), np.asarray(tree.get(plain.params, path)) + tree.get(change, path), atol=1e-4, err_msg=path
        )
    assert model.stop_ids == (257,) and model.chat_template == "{{ messages }}" and model.tokenizer.num_vocab == plain.tokenizer.num_vocab
    run("merge", folder, tmp_path / "merged")
    merged, record = checkpoint_slices.read(tmp_path / "merged")
    assert set(tree.paths(merged)) == set(leaf_shapes(MODEL)) and record["meta"]["source"]["base_fingerprint"] == manifest.fingerprint(base)
    for path, leaf in tree.items(merged):
        assert leaf.dtype == ml_dtypes.bfloat16
        assert np.array_equal(leaf[:], np.asarray(tree.get(model.params, path)).astype(ml_dtypes.bfloat16)), path  # rounded once
    back = pretrained.load(tmp_path / "merged")
    assert back.stop_ids == (257,) and back.chat_template == "{{ messages }}" and not isinstance(back.tokenizer, pretrained.NoTokenizer)


def test_a_prefix_goes_to_peft_and_comes_back(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """That of an MLP as the states that it makes; and no weights can hold it."""
    folder, leaves = run_of(base, tmp_path / "run", prefix=PrefixConfig(length=3, hidden=5))
    run("to-peft", folder, tmp_path / "adapter")
    run("peft", tmp_path / "adapter", base, tmp_path / "back")
    layer = lambda x, name: x @ leaves[f"prefix/{name}/kernel"].astype(np.float64) + leaves[f"prefix/{name}/bias"]
    states = layer(np.tanh(layer(leaves["prefix/tokens"], "in")), "out").reshape(3, 2, 2, 2, 4)  # P L (key, value) K H
    model = pretrained.load(tmp_path / "back", precision="float32")
    for i, name in enumerate(("keys", "values")):
        np.testing.assert_allclose(np.asarray(model.params["prefix"][name]), states[:, :, i].swapaxes(0, 1), atol=1e-5)
    assert model.train.prefix == PrefixConfig(length=3)
    assert np.isfinite(np.asarray(model.lm.apply(model.params, jnp.asarray([[1, 2]], jnp.int32)).hidden)).all()
    assert "has a prefix, which cannot be folded into weights" in refused(capsys, "merge", folder, tmp_path / "merged")


def test_both_kinds_of_adapters_are_two_folders(base: Path, tmp_path: Path):
    folder, _ = run_of(base, tmp_path / "run", lora=LORA_RUN, prefix=PrefixConfig(length=3))
    run("to-peft", folder, tmp_path / "adapter")
    kinds = {path.parent.name: json.loads(path.read_text())["peft_type"] for path in (tmp_path / "adapter").glob("*/adapter_config.json")}
    assert kinds == {"lora": "LORA", "prefix": "PREFIX_TUNING"}


def test_adapters_by_name(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("pirate", "sailor"):
        folder, _ = run_of(base, tmp_path / name, lora=LORA_RUN)
        run("to-peft", folder, tmp_path / "adapters", "--adapter", name)
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["pirate", "sailor"]
    assert "it holds pirate, sailor: name one with --adapter" in refused(capsys, "peft", tmp_path / "adapters", base, tmp_path / "out")
    line = refused(capsys, "peft", tmp_path / "adapters", base, tmp_path / "out", "--adapter", "cook")
    assert "has no adapter 'cook'; it has pirate, sailor" in line
    run("peft", tmp_path / "adapters", base, tmp_path / "out", "--adapter", "sailor")


def test_an_adapter_for_another_base_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, _ = run_of(base, tmp_path / "run", lora=LORA_RUN)
    run("to-peft", folder, tmp_path / "adapter")
    pretrained.save(tmp_path / "other", MODEL, random_params(MODEL, np.float16), None, source={"kind": "test", "family": "llama"})
    line = refused(capsys, "peft", tmp_path / "adapter", tmp_path / "other", tmp_path / "out")
    assert f"made for a base with the fingerprint {manifest.fingerprint(base)}" in line and manifest.fingerprint(tmp_path / "other") in line
    assert not (tmp_path / "out").exists()
    run("peft", tmp_path / "adapter", tmp_path / "other", tmp_path / "out", "--check_base", "False")


def test_folders_that_cannot_be_used(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One line each, and nothing under the name of the result."""
    folder, _ = run_of(base, tmp_path / "run", lora=LORA_RUN)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    assert f"{adapter} is no PEFT adapter" in refused(capsys, "peft", adapter, base, out)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(LORA))
    assert f"{adapter} has no adapter_model.safetensors" in refused(capsys, "peft", adapter, base, out)
    (adapter / "adapter_model.bin").write_bytes(b"\x80")
    assert "is a pickle, which can run any code" in refused(capsys, "peft", adapter, base, out)
    safetensors.numpy.save_file({name: x.astype(np.int32) for name, x in q_and_v().items()}, adapter / "adapter_model.safetensors")
    assert "holds int32 numbers" in refused(capsys, "peft", adapter, base, out)
    safetensors.numpy.save_file({name: x.astype(np.float16) for name, x in q_and_v().items()}, adapter / "adapter_model.safetensors")
    assert "does not exist" in refused(capsys, "peft", adapter, tmp_path / "gone", out)
    assert f"{folder} has low-rank deltas of its own" in refused(capsys, "peft", adapter, folder, out)
    (adapter / "adapter_config.json").write_text("{")
    assert "is not JSON" in refused(capsys, "peft", adapter, base, out)
    assert "has no adapters; python -m tools.convert to-hf" in refused(capsys, "to-peft", base, out)
    assert "has no low-rank deltas to fold in" in refused(capsys, "merge", base, out)
    assert not out.exists()
    (adapter / "adapter_config.json").write_text(json.dumps(LORA))
    run("peft", adapter, base, out)  # half precision becomes float32, as our leaves are
    assert tool.open_run(out).leaves["layers/attention/q/lora_a"].dtype == np.float32
    assert "exists already" in refused(capsys, "peft", adapter, base, out)


def test_a_run_that_trained_more_than_adapters(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """PEFT cannot hold it, merge can: each leaf is the newest run's that has it."""
    folder, leaves = run_of(base, tmp_path / "run", lora=LORA_RUN)
    scale = np.full((2, 16), 3.0, np.float32)
    config = replace(tool.open_run(folder).config, optim=OptimConfig(freeze=((rf"{tool.ADDED}|.*_norm/scale", False), (r".*", True))))
    tool.save_run(tmp_path / "more", config, leaves | {"layers/attention_norm/scale": scale})
    line = refused(capsys, "to-peft", tmp_path / "more", tmp_path / "adapter")
    assert "trained the model's own weights too (layers/attention_norm/scale, …)" in line and "convert merge" in line
    run("merge", tmp_path / "more", tmp_path / "merged")
    assert np.array_equal(checkpoint_slices.read(tmp_path / "merged")[0]["layers"]["attention_norm"]["scale"][:], scale)


def test_weights_that_changed_under_a_run_are_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = tmp_path / "base"
    pretrained.save(own, MODEL, random_params(MODEL), None, source={"kind": "test", "family": "llama"})
    folder, _ = run_of(own, tmp_path / "run", lora=LORA_RUN)
    own.rename(tmp_path / "elsewhere")
    assert f"began from {own}, which is not there" in refused(capsys, "to-peft", folder, tmp_path / "out")
    pretrained.save(own, MODEL, random_params(MODEL, np.float16), None, source={"kind": "test", "family": "llama"})
    assert "there are others now" in refused(capsys, "to-peft", folder, tmp_path / "out")


def test_a_family_that_is_named_must_fit(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, _ = run_of(base, tmp_path / "run", lora=LORA_RUN)
    assert "family 'qwen2' cannot express model.qkv_bias" in refused(capsys, "to-peft", folder, tmp_path / "out", "--family", "qwen2")
    assert "no family 'lama'" in refused(capsys, "to-peft", folder, tmp_path / "out", "--family", "lama")
