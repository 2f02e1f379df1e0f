"""Fewer key/value heads: the twelve oracles of the GQA paper's card, each by its number, and what is refused.

Oracles 6 and 7 are also held for every layout of the cache by tests/test_decoder_cache.py, oracle 1's sums by tests/test_attention.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import optim, sharding, tree
from jaxllm.config import ConfigError, LayerKind, MeshConfig, ModelConfig, OptimConfig, RopeConfig, ScheduleConfig
from jaxllm.contract import Batch
from jaxllm.models.attention import Cache, Sight, attend_dense
from jaxllm.models.transformer import decoder
from jaxllm.surgery import resize
from tests.reference_decoder import BASE, random_params, ref_hidden

MHA = replace(BASE, num_layers=2, num_kv_heads=4)
BIASED = replace(MHA, qkv_bias=True, qk_norm="full", norm_bias=True, norm="layer")
TOKENS = np.random.default_rng(3).integers(1, MHA.vocab_size, (2, 9)).astype(np.int32)
KEY = jax.random.key(7)
NARROW = (2, 1)

to_each_number = pytest.mark.parametrize("num_kv_heads", NARROW)


def params_of(config: ModelConfig = MHA) -> tree.Tree:
    return jax.tree.map(jnp.asarray, random_params(config))


@cache
def run(config: ModelConfig) -> Any:
    return jax.jit(lambda params: decoder(config).apply(params, jnp.asarray(TOKENS)).hidden)


def hidden(params: tree.Tree, config: ModelConfig) -> np.ndarray:
    return np.asarray(run(config)(params))


def with_leaf(params: tree.Tree, path: str, leaf: Any) -> tree.Tree:
    return tree.map_with_path(lambda name, old: leaf if name == path else old, params)


def kernel(params: tree.Tree, name: str) -> np.ndarray:
    return np.asarray(params["layers"]["attention"][name]["kernel"])


def repeat(params: tree.Tree, config: ModelConfig, times: int) -> tuple[tree.Tree, ModelConfig]:
    """Every key/value head as `times` equal ones."""
    wide = tree.map_with_path(lambda path, leaf: jnp.repeat(leaf, times, -2) if resize.has_kv_heads(path, config) else leaf, params)
    return wide, replace(config, num_kv_heads=times * config.num_kv_heads)


# ------------------------------------------------------------------------------------------- the oracles


def test_oracle_1_as_many_groups_as_heads_is_multi_head_attention_to_the_bit():
    """`attend_dense` with K = N against sums over heads without groups; and K unchanged gives the very leaves."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 5, 4, 4)), jnp.float32) for _ in range(3))

    def multi_head(q: Any, k: Any, v: Any) -> Any:
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest") * 0.5
        scores = jnp.where(jnp.tril(jnp.ones((5, 5), bool)), scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        return jnp.einsum("BNTS,BSNH->BTNH", weights / weights.sum(-1, keepdims=True), v, precision="highest")

    np.testing.assert_array_equal(attend_dense(q, k, v, Sight(), scale=0.5)[0], multi_head(q, k, v))
    params = params_of()
    for how in ("mean", "first", "random"):
        same, config = resize.kv_heads(params, MHA, MHA.num_kv_heads, how, key=KEY)
        assert config == MHA
        assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))


@to_each_number
def test_oracle_1_the_converted_model_equals_one_written_by_hand(num_kv_heads: int):
    """MQA (K = 1) and GQA in NumPy float64: query head n reads head n // G."""
    params, config = resize.kv_heads(params_of(BIASED), BIASED, num_kv_heads)
    want = ref_hidden(config, jax.tree.map(np.asarray, params), TOKENS[0], np.arange(9), np.ones(9))
    np.testing.assert_allclose(hidden(params, config)[0], want, rtol=2e-5, atol=2e-5)


@to_each_number
def test_oracle_2_equal_heads_stay_what_they_are(num_kv_heads: int):
    times = MHA.num_kv_heads // num_kv_heads
    params, config = repeat(params_of(replace(BIASED, num_kv_heads=num_kv_heads)), replace(BIASED, num_kv_heads=num_kv_heads), times)
    want = hidden(params, config)
    for how in ("mean", "first"):  # powers of two: a sum of equal numbers, divided, is exact
        converted, new_config = resize.kv_heads(params, config, num_kv_heads, how)
        np.testing.assert_allclose(hidden(converted, new_config), want, rtol=1e-6, atol=1e-6)
        for path, leaf in tree.items(random_params(replace(BIASED, num_kv_heads=num_kv_heads))):
            np.testing.assert_array_equal(tree.get(converted, path), leaf, err_msg=path)


def test_oracle_2_three_equal_heads_within_an_ulp():
    heads = np.random.default_rng(1).normal(size=(5, 1, 4)).astype(np.float32)
    mean = resize.pool(np.repeat(heads, 3, 1), 1, "mean")
    np.testing.assert_array_max_ulp(mean, heads, maxulp=2)
    np.testing.assert_array_equal(resize.pool(np.repeat(heads, 3, 1), 1, "first"), heads)


def test_oracle_3_the_mean_kernel_gives_the_mean_of_the_projections():
    x = np.random.default_rng(2).normal(size=(6, MHA.width))
    before = np.einsum("TD,LDKH->LTKH", x, kernel(params_of(), "k"))
    params, _ = resize.kv_heads(params_of(), MHA, 2)
    after = np.einsum("TD,LDKH->LTKH", x, kernel(params, "k"))
    np.testing.assert_allclose(after[:, :, 0], (before[:, :, 0] + before[:, :, 1]) / 2, atol=1e-6)
    np.testing.assert_allclose(after[:, :, 1], (before[:, :, 2] + before[:, :, 3]) / 2, atol=1e-6)


@pytest.mark.parametrize("how", ["mean", "first"])
def test_oracle_4_expanding_and_converting_back_gives_the_weights(how: Any):
    narrow = params_of(replace(BIASED, num_kv_heads=2))
    wide, config = repeat(narrow, replace(BIASED, num_kv_heads=2), 2)
    np.testing.assert_allclose(hidden(wide, config), hidden(narrow, replace(BIASED, num_kv_heads=2)), rtol=1e-5, atol=1e-5)
    back, _ = resize.kv_heads(wide, config, 2, how)
    for path, leaf in tree.items(narrow):
        np.testing.assert_array_equal(tree.get(back, path), leaf, err_msg=path)


def test_oracle_5_first_takes_the_first_head_and_random_is_fresh():
    config = replace(MHA, width=96, head_size=16)
    params = jax.tree.map(jnp.asarray, random_params(config))
    first, mean = (resize.kv_heads(params, config, 2, how)[0] for how in ("first", "mean"))
    for name in "kv":
        np.testing.assert_array_equal(kernel(first, name), kernel(params, name)[:, :, [0, 2]])
    for init, std in (("normal", config.init_std), ("fan_in", 96**-0.5)):
        drawn = resize.kv_heads(params, replace(config, init=init), 2, "random", key=KEY)[0]
        for name in "kv":
            fresh = kernel(drawn, name)
            assert fresh.std() == pytest.approx(std, rel=0.03) and abs(fresh.mean()) < 0.05 * std
            assert not np.allclose(fresh, kernel(first, name)) and not np.allclose(fresh, kernel(mean, name))
        assert not np.array_equal(kernel(drawn, "k"), kernel(drawn, "v"))
        assert not np.array_equal(kernel(drawn, "k")[0], kernel(drawn, "k")[1])
    for name in "qo":
        np.testing.assert_array_equal(kernel(drawn, name), kernel(params, name))


def test_oracle_5_random_matches_what_the_initialiser_draws():
    """The decoder's own init, leaf by leaf: standard deviation of kernels, zeros and ones elsewhere."""
    config = replace(BIASED, width=96, head_size=16)
    own = jax.jit(decoder(config).init)(jax.random.key(1))
    drawn, _ = resize.kv_heads(own, config, 1, "random", key=KEY)
    for path, leaf in tree.items(own):
        if resize.has_kv_heads(path, config):
            assert float(np.std(tree.get(drawn, path))) == pytest.approx(float(np.std(leaf)), rel=0.06), path
            assert float(np.mean(tree.get(drawn, path))) == pytest.approx(float(np.mean(leaf)), abs=0.002), path


B, S = 3, 11


@pytest.mark.parametrize("num_kv_heads", [4, *NARROW])
def test_oracle_6_the_cache_has_the_bytes_of_the_formula(num_kv_heads: int):
    config = replace(MHA, num_kv_heads=num_kv_heads, layer_pattern=(LayerKind(), LayerKind(window=4)))
    cache = decoder(config).init_cache(B, S)
    assert [part.size for part in cache.keys] == [B * S * num_kv_heads * 4, B * 4 * num_kv_heads * 4]
    assert tree.num_bytes((cache.keys, cache.values)) == resize.cache_bytes(config, B, S, itemsize=4)
    full = replace(config, layer_pattern=(LayerKind(),))
    assert resize.cache_bytes(full, B, S) == 2 * config.num_layers * num_kv_heads * config.head_size * S * B * 2


def test_oracle_6_the_cards_numbers():
    gib = 2**30
    big = ModelConfig(num_layers=80, num_heads=64, num_kv_heads=64, head_size=128)
    assert resize.cache_bytes(big, 1, 4096) == 10 * gib
    assert resize.cache_bytes(replace(big, num_kv_heads=8), 1, 4096) == 1.25 * gib


def decode_text(config: ModelConfig, batch: int, slots: int) -> str:
    lm = decoder(config)

    def step(params: Any, token: Any, at: Any, keys: Any, values: Any, positions: Any) -> Any:
        out = lm.apply(params, token, positions=at, cache=Cache(keys, values, positions, empty=False))
        return out.hidden, out.cache.keys, out.cache.values

    cache, token = lm.init_cache(batch, slots), jnp.zeros((batch, 1), jnp.int32)
    parts = (cache.keys, cache.values, cache.positions)
    return jax.jit(step, donate_argnums=(3, 4)).lower(params_of(config), token, token, *parts).compile().as_text()


def largest_buffer(text: str) -> int:
    """Elements of the largest array in a program."""
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", text)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def test_oracle_6_decoding_never_repeats_keys_for_every_query_head():
    """With 4 query heads on one key/value head, nothing in the program is as large as a cache of one layer with all heads."""
    batch, slots, config = 4, 200, replace(MHA, num_kv_heads=1)
    repeated = batch * config.num_heads * slots * config.head_size
    assert largest_buffer(decode_text(config, batch, slots)) < repeated
    assert largest_buffer(decode_text(MHA, batch, slots)) >= repeated  # the measure sees the buffer where it must be


@pytest.mark.parametrize("num_kv_heads", [4, *NARROW])
def test_oracle_7_cached_decoding_equals_the_whole_row(num_kv_heads: int):
    params, config = resize.kv_heads(params_of(), MHA, num_kv_heads)
    lm = decoder(config)

    @jax.jit
    def step(params: Any, token: Any, at: Any, cache: Any) -> Any:
        out = lm.apply(params, token, positions=at, cache=cache)
        return out.hidden[:, 0], out.cache

    cache, got = lm.init_cache(2, 9), []
    for t in range(9):
        out, cache = step(params, TOKENS[:, t : t + 1], np.full((2, 1), t), cache)
        got.append(np.asarray(out))
    np.testing.assert_allclose(np.stack(got, 1), hidden(params, config), rtol=2e-5, atol=2e-5)


def test_oracle_8_query_heads_may_change_places_within_a_group_and_not_across():
    """Heads of q, k, v and rows of o together: within a group the converted model is the same function, across groups another."""

    def permuted(order: list[int]) -> tree.Tree:
        params = params_of()
        attention = params["layers"]["attention"]
        moved = {name: {"kernel": attention[name]["kernel"][:, :, np.array(order)]} for name in "qkv"}
        moved["o"] = {"kernel": attention["o"]["kernel"][:, np.array(order)]}
        return {**params, "layers": {**params["layers"], "attention": {**attention, **moved}}}

    within, across = permuted([1, 0, 3, 2]), permuted([0, 2, 1, 3])
    for wide in (within, across):
        np.testing.assert_allclose(hidden(wide, MHA), hidden(params_of(), MHA), rtol=1e-5, atol=1e-5)
    want, inside, outside = (hidden(*resize.kv_heads(params, MHA, 2)) for params in (params_of(), within, across))
    np.testing.assert_allclose(inside, want, rtol=1e-5, atol=1e-5)
    assert np.abs(outside - want).max() > 1e-2
    converted, config = resize.kv_heads(within, MHA, 2)  # converting commutes: keys and values of the two are equal already
    for name in "kv":
        np.testing.assert_allclose(kernel(converted, name), kernel(resize.kv_heads(params_of(), MHA, 2)[0], name), atol=1e-7)
    assert config.group_size == 2


def value_and_gradient(params: tree.Tree, config: ModelConfig) -> tuple[Any, tree.Tree]:
    apply = decoder(config).apply
    return jax.jit(jax.value_and_grad(lambda p: jnp.sin(apply(p, jnp.asarray(TOKENS)).hidden).sum()))(params)


def test_oracle_9_the_gradient_of_a_shared_head_is_the_sum_over_the_repeated_ones():
    config = replace(MHA, num_layers=1, num_kv_heads=2)
    narrow = params_of(config)
    wide, wide_config = repeat(narrow, config, 2)
    shared, apart = value_and_gradient(narrow, config)[1], value_and_gradient(wide, wide_config)[1]
    for name in "kv":
        summed = kernel(apart, name).reshape(1, MHA.width, 2, 2, 4).sum(3)
        np.testing.assert_allclose(kernel(shared, name), summed, rtol=1e-4, atol=1e-5)


def test_oracle_10_cross_attention_is_converted_in_step_and_an_encoder_is_not_touched():
    config = replace(MHA, cross_attention=True, qkv_bias=True)
    params = {**params_of(config), "encoder": params_of(BIASED)}
    converted, _ = resize.kv_heads(params, config, 1)
    before, after = dict(tree.items(params)), dict(tree.items(converted))
    assert all(after[path] is leaf for path, leaf in before.items() if path.startswith("encoder/"))
    changed = {path for path, leaf in before.items() if after[path].shape != leaf.shape}
    sites = [f"layers/{site}/{name}/{leaf}" for site in ("attention", "cross_attention") for name in "kv" for leaf in ("kernel", "bias")]
    assert changed == set(sites)
    assert {after[path].shape[-2] for path in sites} == {1}


def test_oracle_11_fewer_heads_than_the_model_axis_give_the_same_numbers_and_gradients():
    """K = 2 on a model axis of 4: each head lies on two devices, and its gradient is summed over them."""
    wide = replace(MHA, num_layers=1, num_heads=8, num_kv_heads=8, width=16)
    params, config = resize.kv_heads(params_of(wide), wide, 2)
    want, want_gradient = value_and_gradient(params, config)
    mesh = sharding.make_mesh(MeshConfig(data=2, model=4))
    padded = sharding.pad_vocab(params, 4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(padded, sharding.shardings(sharding.param_specs(padded, mesh), mesh))
        got, gradient = value_and_gradient(placed, config)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for name in "qkvo":
        np.testing.assert_allclose(kernel(gradient, name), kernel(want_gradient, name), rtol=1e-4, atol=2e-5)


# ----------------------------------------------------------------------------------- 12: the optimizer's state

OPTIMIZERS = ("adamw", "adafactor")
WIDE = replace(BIASED, num_layers=1, num_heads=8, num_kv_heads=8, width=128, head_size=16)  # Adafactor factors k now, and not with 2 heads


@cache
def trained(name: Any) -> tuple[OptimConfig, tree.Tree, Any]:
    """(optimizer's config, params, state) after three updates with random gradients."""
    config = OptimConfig(name=name, lr=1e-2, schedule=ScheduleConfig(kind="linear", warmup_steps=2))
    params = params_of(WIDE)
    tx = optim.build(config, params, num_steps=20, num_vocab=WIDE.vocab_size)
    rng = np.random.default_rng(0)
    step, state = jax.jit(tx.update), tx.init(params)
    for _ in range(3):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        state = step(grads, state, params)[1]
    return config, params, state


def counts(state: Any) -> set[int]:
    return {int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32 and x.ndim == 0}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_oracle_12_the_optimizers_state_fits_the_new_model_and_the_schedule_goes_on(name: Any):
    config, params, state = trained(name)
    new_params, _ = resize.kv_heads(params, WIDE, 2)
    tx = optim.build(config, new_params, num_steps=20, num_vocab=WIDE.vocab_size)
    template = jax.eval_shape(tx.init, new_params)
    for how in ("mean", "reset"):
        new_state = resize.opt_state(state, template, how)  # type: ignore[arg-type]
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), template)
        assert counts(new_state) == counts(state) == {3}
        kept = {id(leaf) for leaf in jax.tree.leaves(state)}
        replaced = [path for path, leaf in resize._leaves(new_state) if id(leaf) not in kept]
        assert replaced and all(re.search(r"attention/([kv]/|k_norm)", path) for path in replaced)  # all others are the very leaves
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), new_params)
    updates, after = jax.jit(tx.update)(zeros, new_state, new_params)
    assert counts(after) == {4}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_oracle_12_moments_are_means_of_their_group_or_zero():
    config, params, state = trained("adamw")
    new_params, _ = resize.kv_heads(params, WIDE, 2)
    template = jax.eval_shape(optim.build(config, new_params, num_steps=20, num_vocab=WIDE.vocab_size).init, new_params)
    adam = lambda state: next(part for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu"))
    pooled, reset = (adam(resize.opt_state(state, template, how)) for how in ("mean", "reset"))  # type: ignore[arg-type]
    for moment in ("mu", "nu"):
        old, new, zero = (getattr(part, moment) for part in (adam(state), pooled, reset))
        want = kernel(old, "k").reshape(1, 128, 2, 4, 16).mean(3)
        np.testing.assert_allclose(kernel(new, "k"), want, rtol=1e-5)
        np.testing.assert_array_equal(kernel(new, "q"), kernel(old, "q"))
        np.testing.assert_array_equal(kernel(zero, "q"), kernel(old, "q"))
        assert not kernel(zero, "k").any() and kernel(new, "k").any()


def test_oracle_12_another_optimizers_state_is_refused():
    _, params, state = trained("adamw")
    new_params, _ = resize.kv_heads(params, WIDE, 2)
    other = optim.build(OptimConfig(name="lion"), new_params, num_steps=20, num_vocab=WIDE.vocab_size)
    with pytest.raises(ConfigError, match="not of the same optimizer"):
        resize.opt_state(state, jax.eval_shape(other.init, new_params))


# --------------------------------------------------------------------------------------------------- svd


def whole_batch(tokens: np.ndarray) -> Batch:
    ones = np.ones(tokens.shape, np.int32)
    at = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return Batch(tokens, tokens, ones.astype(np.float32), ones, at)  # type: ignore[arg-type]


def moments_of(params: tree.Tree, config: ModelConfig, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return resize.input_moments(decoder(config), params, [whole_batch(tokens)])


def disguise(params: tree.Tree, config: ModelConfig) -> tree.Tree:
    """The same function: each old head's values in another basis, each plane of its keys turned and stretched."""
    rng = np.random.default_rng(0)
    leaves = {name: {leaf: np.array(x, np.float64) for leaf, x in part.items()} for name, part in params["layers"]["attention"].items()}
    H, G, planes = config.head_size, config.group_size, round(config.head_size * config.rope.fraction) // 2
    planes = planes if config.position == "rope" else 0
    for layer, head in np.ndindex(config.num_layers, config.num_kv_heads):
        readers = slice(head * G, head * G + G)
        basis, turn = rng.normal(size=(2, H, H)) + 2 * np.eye(H)
        turn[: 2 * planes], turn[:, : 2 * planes] = 0, 0
        for i in range(planes):
            a, b = rng.normal(size=2)
            turn[np.ix_([i, i + planes], [i, i + planes])] = [[a, b], [-b, a]]
        for leaf in leaves["v"]:  # kernel [D K H] and bias [K H]
            leaves["v"][leaf][layer, ..., head, :] = leaves["v"][leaf][layer, ..., head, :] @ basis
            leaves["k"][leaf][layer, ..., head, :] = leaves["k"][leaf][layer, ..., head, :] @ turn
            leaves["q"][leaf][layer, ..., readers, :] = leaves["q"][leaf][layer, ..., readers, :] @ np.linalg.inv(turn).T
        leaves["o"]["kernel"][layer, readers] = np.linalg.inv(basis) @ leaves["o"]["kernel"][layer, readers]
    changed = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), leaves)
    return {**params, "layers": {**params["layers"], "attention": changed}}


DISGUISED = {
    "rope": replace(MHA, num_heads=8, num_kv_heads=2),
    "a part of the head rotates, biases": replace(MHA, num_layers=1, num_kv_heads=2, rope=RopeConfig(fraction=0.5), qkv_bias=True),
    "alibi": replace(MHA, num_layers=1, num_kv_heads=2, position="alibi", attention_out_bias=True),
}


@pytest.mark.parametrize("name", DISGUISED)
def test_svd_finds_equal_heads_in_other_bases(name: str):
    """Two heads that do the same in unlike bases become one without loss; their mean is another function."""
    narrow = DISGUISED[name]
    disguised, wide = repeat(params_of(narrow), narrow, 2)
    disguised = disguise(disguised, wide)
    want = hidden(params_of(narrow), narrow)
    np.testing.assert_allclose(hidden(disguised, wide), want, rtol=2e-3, atol=2e-3)
    merged, config = resize.kv_heads(disguised, wide, 2, "svd", moments=moments_of(disguised, wide), reach=0)
    assert config == narrow
    np.testing.assert_allclose(hidden(merged, config), want, rtol=5e-3, atol=5e-3)
    assert np.abs(hidden(*resize.kv_heads(disguised, wide, 2)) - want).max() > 0.1


def test_svd_is_the_best_shared_head():
    """Its objective is the sum of the squared singular values that are left out, by Eckart and Young; the mean's is larger."""
    rng = np.random.default_rng(0)
    heads, root, halves = rng.normal(size=(9, 3, 4)), rng.normal(size=(9, 9)), rng.normal(size=(3, 4, 4))
    metric, weights = root @ root.T, np.stack([x @ x.T for x in halves])

    def objective(shared: np.ndarray, maps: np.ndarray) -> float:
        apart = heads.transpose(1, 0, 2) - shared @ maps
        return float(sum(np.trace(x.T @ metric @ x @ weight) for x, weight in zip(apart, weights, strict=True)))

    columns = np.concatenate([root.T @ heads[:, i] @ halves[i] for i in range(3)], axis=1)
    left_out = (np.linalg.svd(columns, compute_uv=False)[4:] ** 2).sum()
    assert objective(*resize._merge(heads, metric, weights)) == pytest.approx(left_out, rel=1e-6)
    assert objective(heads.mean(1), np.stack([np.eye(4)] * 3)) > 1.2 * left_out


def test_svd_of_a_plane_is_the_best_complex_number_for_each_head():
    rng = np.random.default_rng(0)
    heads = rng.normal(size=(5, 2, 1)) + 1j * rng.normal(size=(5, 2, 1))
    shared, maps = resize._merge(heads, np.eye(5), np.array([[[1.0]], [[4.0]]]))
    apart = heads.transpose(1, 0, 2) - shared @ maps
    left_out = np.linalg.svd(heads[..., 0] * [1.0, 2.0], compute_uv=False)[1] ** 2
    assert (np.abs(apart) ** 2).sum((1, 2)) @ [1.0, 4.0] == pytest.approx(left_out, rel=1e-6)


@pytest.mark.parametrize("qk_norm", ["head", "full"])
def test_svd_takes_means_of_keys_that_are_normalised(qk_norm: Any):
    config = replace(MHA, qk_norm=qk_norm)
    params = params_of(config)
    merged, _ = resize.kv_heads(params, config, 2, "svd", moments=moments_of(params, config))
    mean, _ = resize.kv_heads(params, config, 2, "mean")
    for path in ("q/kernel", "k/kernel", "q_norm/scale", "k_norm/scale"):
        np.testing.assert_allclose(*(tree.get(p, f"layers/attention/{path}") for p in (merged, mean)), rtol=1e-6, atol=1e-7, err_msg=path)
    assert np.abs(kernel(merged, "v") - kernel(mean, "v")).max() > 0.1


def test_slow_planes_stand_still_within_reach():
    config = replace(MHA, head_size=8, rope=RopeConfig(base=10_000.0))  # radians per token: 1, 0.1, 0.01, 0.001
    assert resize._planes(config, 0, 0) == ([[0, 4], [1, 5], [2, 6], [3, 7]], [])
    assert resize._planes(config, 0, 50) == ([[0, 4], [1, 5]], [2, 3, 6, 7])
    assert resize._planes(replace(config, rope=RopeConfig(fraction=0.5)), 0, 0) == ([[0, 2], [1, 3]], [4, 5, 6, 7])
    kinds = replace(config, layer_pattern=(LayerKind(), LayerKind(rope=RopeConfig(base=1e8))))  # 1, 0.01, 1e-4, 1e-6
    assert resize._planes(kinds, 1, 50) == ([[0, 4]], [1, 2, 3, 5, 6, 7])
    assert resize._planes(replace(config, position="alibi"), 0, 0) == ([], list(range(8)))


def test_moments_are_those_of_tokens_that_are_not_padding():
    params, batch = params_of(), whole_batch(TOKENS)
    segments = np.array(batch.segment_ids)
    segments[0, 5:] = 0
    got = resize.input_moments(decoder(MHA), params, [batch.replace(segment_ids=segments)])
    taps = jax.jit(lambda params: decoder(MHA).apply(params, jnp.asarray(TOKENS), taps=("attention_norm",)).taps)(params)
    x = np.asarray(taps["attention_norm"])  # causal: padding at the end changes none of the others
    z = np.concatenate([x, np.ones_like(x[..., :1])], -1)[:, segments > 0]
    np.testing.assert_allclose(got, np.einsum("LTD,LTE->LDE", z, z) / z.shape[1], rtol=1e-4, atol=1e-5)


def test_svd_without_what_it_needs_is_refused():
    with pytest.raises(ConfigError, match="give moments, from input_moments"):
        resize.kv_heads(params_of(), MHA, 2, "svd")
    config = replace(MHA, cross_attention=True)
    with pytest.raises(ConfigError, match=r"cross-attention reads; use how='mean'"):
        resize.kv_heads(params_of(config), config, 2, "svd", moments=np.zeros((2, 13, 13)))
    with pytest.raises(ConfigError, match="at least one batch"):
        resize.input_moments(decoder(MHA), params_of(), [])


# ------------------------------------------------------------------------------------------- number formats, refusals


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_heads_are_pooled_in_float32_and_cast_back(dtype: str):
    """As jax.Array and as NumPy's, of which the sum in half precision would be off by far: 512 heads of about 1."""
    heads = jnp.asarray(1 + np.random.default_rng(0).normal(size=(2, 512, 5)), dtype)
    want = np.asarray(heads, np.float64).mean(1, keepdims=True)
    for given in (heads, np.asarray(heads)):
        pooled = resize.pool(given, 1, "mean")
        assert pooled.dtype == heads.dtype and isinstance(pooled, jax.Array) == isinstance(given, jax.Array)
        np.testing.assert_allclose(np.asarray(pooled, np.float64), want, rtol=2.0**-8 if dtype == "bfloat16" else 2.0**-11, atol=1e-7)


def test_a_scale_that_all_heads_share_stays():
    config = replace(MHA, qk_norm="head")
    params, _ = resize.kv_heads(params_of(config), config, 1, "first")
    assert params["layers"]["attention"]["k_norm"]["scale"].shape == (2, 4)


def test_from_grouped_to_fewer_is_the_same_as_in_one_step():
    once, _ = resize.kv_heads(params_of(BIASED), BIASED, 1)
    twice, config = resize.kv_heads(*resize.kv_heads(params_of(BIASED), BIASED, 2), 1)
    assert config == replace(BIASED, num_kv_heads=1)
    for path, leaf in tree.items(once):
        np.testing.assert_allclose(tree.get(twice, path), leaf, atol=1e-6, err_msg=path)


REFUSED: dict[str, tuple[tree.Tree, ModelConfig, int, str]] = {
    "does not divide": (params_of(), MHA, 3, r"num_kv_heads is 3, which does not divide the model's 4; choose one of 1, 2, 4"),
    "none": (params_of(), MHA, 0, r"num_kv_heads is 0.*choose one of 1, 2, 4"),
    "more": (params_of(), MHA, 8, r"num_kv_heads is 8 and the model has 4; heads can be merged, not split: choose one of 1, 2, 4"),
    "adapters": (
        {**params_of(), "layers": {"attention": {"k": {"kernel": jnp.zeros((2, 12, 4, 4)), "lora_a": jnp.zeros((2, 12, 1))}}}},
        MHA, 2, r"layers/attention/k/lora_a is a low-rank delta.*merge the adapter",
    ),
    "a prefix": ({**params_of(), "prefix": {"keys": jnp.zeros((2, 3, 4, 4))}}, MHA, 2, r"prefix/keys belongs to a prefix"),
    "another config": (params_of(), replace(MHA, num_kv_heads=2), 1, r"layers/attention/k/kernel holds .* and 2 heads"),
    "quantised": (jax.tree.map(lambda x: x.astype(jnp.int8), params_of()), MHA, 2, r"k/kernel holds int8 numbers"),
    "layers in a list": ({**params_of(), "layers": [params_of()["layers"]]}, MHA, 2, r"no layers/attention/k/kernel"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str):
    params, config, number, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as refused:
        resize.kv_heads(params, config, number)
    assert "\n" not in str(refused.value)


def test_fresh_heads_need_a_key():
    with pytest.raises(ConfigError, match=r"give a key"):
        resize.kv_heads(params_of(), MHA, 2, "random")
