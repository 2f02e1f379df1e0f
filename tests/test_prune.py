"""Structured pruning: the oracles of the Minitron card, each by its number, slices by hand, and `python -m tools.prune`."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import models
from jaxllm import sharding, tree
from jaxllm.config import ConfigError, LayerKind, MeshConfig, ModelConfig, RopeConfig
from jaxllm.models.transformer import decoder
from jaxllm.surgery import importance, shapes
from jaxllm.surgery.prune import Kept, choose, choose_heads, keep, prune, top
from jaxllm.surgery.shapes import Shape
from tests.reference_decoder import BASE, BIASES, GPT, random_params, ref_hidden
from tools import prune as tool

MODEL = replace(BASE, num_layers=3, num_heads=4, num_kv_heads=2)
TOKENS = np.random.default_rng(3).integers(1, MODEL.vocab_size, (1, 7)).astype(np.int32)
NEURONS = [0, 3, 4, 5, 9, 11, 17, 19]
KEPT = Kept(layers=[0, 2], heads=np.array([[0, 2], [1, 2], [1, 3]]), neurons=NEURONS, channels=[0, 1, 3, 4, 6, 7, 8, 11])


@cache
def run(config: ModelConfig) -> Any:
    return jax.jit(lambda params: decoder(config).apply(params, jnp.asarray(TOKENS)).hidden)


def hidden(params: tree.Tree, config: ModelConfig) -> np.ndarray:
    return np.asarray(run(config)(params))[0]


def reference(params: tree.Tree, config: ModelConfig) -> np.ndarray:
    return ref_hidden(config, jax.tree.map(np.asarray, params), TOKENS[0], np.arange(7), np.ones(7))


def shapes_of(config: ModelConfig) -> tree.Tree:
    return jax.eval_shape(decoder(config).init, jax.random.key(0))


def same_leaves(a: tree.Tree, b: tree.Tree) -> None:
    assert set(tree.paths(a)) == set(tree.paths(b))
    for path, leaf in tree.items(a):
        np.testing.assert_array_equal(leaf, tree.get(b, path), err_msg=path)


# ------------------------------------------------------------------------------------------ the oracles

LLAMA, NEMO = models.llama3_1_8b, models.mistral_nemo_12b
PUBLISHED = {
    "4B-Width": (LLAMA, Shape(32, 3072, 32, 8, 9216), 4_512_746_496, 788_004_864),
    "4B-Depth": (LLAMA, Shape(16, 4096, 32, 8, 14336), 4_540_469_248, 1_050_673_152),
    "Llama-3.1-8B": (LLAMA, Shape.of(LLAMA), 8_030_261_248, 1_050_673_152),
    "MN-8B": (NEMO, Shape(40, 4096, 32, 8, 11520), 8_414_105_600, 2 * 131072 * 4096),
    "NeMo-12B": (NEMO, Shape.of(NEMO), 12_247_782_400, 2 * 131072 * 5120),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_oracle_1_parameters_of_the_published_shapes(name: str):
    """Through `prune`, on shapes alone."""
    config, shape, total, embedding = PUBLISHED[name]
    L, D, F = config.num_layers, config.width, config.ff_width
    ones = np.ones((2, L, 1, D)) / D
    even = importance.Scores(
        np.ones((L, config.num_heads)), np.ones((L, F)), np.ones(D), np.ones((L + 1,) * 2), ones, ones[0, 0, 0], config, 1, ""
    )
    made: list[ModelConfig] = []

    def pruned(params: tree.Tree) -> tree.Tree:
        params, new = prune(params, config, even, shape)
        made.append(new)
        return params

    params = jax.eval_shape(pruned, shapes_of(config))
    assert Shape.of(made[0]) == shape and made[0].head_size == 128
    assert tree.count(params) == shapes.num_params(made[0]) == total
    assert sum(tree.count({"x": tree.get(params, path)}) for path in ("embed/tokens", "unembed/kernel")) == embedding
    assert tree.structure_diff(shapes_of(made[0]), params) == []


WALKS: dict[str, ModelConfig] = {
    "llama, untied": replace(MODEL, tied_embeddings=False),
    "gpt: LayerNorm with bias, learned positions, tied": replace(MODEL, **GPT | {"num_kv_heads": 2}),
    "parallel, one norm, a part rotates": replace(MODEL, block="parallel", **BIASES, rope=RopeConfig(fraction=0.5)),
    "gemma: norms on both sides, of 1 + w, norms of heads": replace(
        MODEL, norm_placement="both", norm_plus_one=True, qk_norm="head", layer_pattern=(LayerKind(window=3), LayerKind()), logit_scale=0.5
    ),
    "olmo: norms after, over all heads": replace(MODEL, norm_placement="after", qk_norm="full", norm_bias=True, norm="layer"),
    "gpt-1: norms after the sum, none at the end": replace(MODEL, norm_placement="after_residual", final_norm=False),
}
every_walk = pytest.mark.parametrize("name", WALKS)


@every_walk
def test_oracle_2_keeping_all_gives_the_very_leaves(name: str):
    config = WALKS[name]
    params = random_params(config)
    everything = Kept(range(3), range(4), np.arange(20), list(range(12)))
    for kept in (Kept(), everything, everything._replace(heads=np.tile([1, 0, 3, 2], (3, 1)))):
        same, new = keep(params, config, kept)
        assert new == config
        assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))
    same, new = prune(params, config, importance.random(config, 0), merge_heads=1.0, mend_norms=True)
    assert new == config and all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))


def test_oracle_3_a_neuron_without_weights_goes_first_and_nothing_changes():
    params = jax.tree.map(np.array, random_params(MODEL))
    dead = [4, 7, 2]
    for layer, neuron in enumerate(dead):
        for name in ("gate", "up"):
            params["layers"]["mlp"][name]["kernel"][layer, :, neuron] = 0
        params["layers"]["mlp"]["down"]["kernel"][layer, neuron] = 0
    batch = tool.whole_rows(TOKENS)
    scores = importance.measure(decoder(MODEL), params, [batch])
    kept = choose(scores, Shape.of(MODEL)._replace(ff_width=19))
    assert [set(range(20)) - set(row) for row in np.asarray(kept.neurons).tolist()] == [{neuron} for neuron in dead]
    np.testing.assert_allclose(hidden(*keep(params, MODEL, kept)), hidden(params, MODEL), rtol=1e-5, atol=1e-6)


def test_oracle_6_removing_a_layer_that_adds_nothing_leaves_logits_exact():
    params = jax.tree.map(np.array, random_params(MODEL))
    params["layers"]["attention"]["o"]["kernel"][1] = 0
    params["layers"]["mlp"]["down"]["kernel"][1] = 0
    scores = importance.measure(decoder(MODEL), params, [tool.whole_rows(TOKENS)])
    want = hidden(params, MODEL)  # logits are these times the same matrix
    for depth in ("block", "single"):
        pruned, config = prune(params, MODEL, scores, Shape.of(MODEL)._replace(num_layers=2), depth=depth)
        np.testing.assert_array_equal(hidden(pruned, config), want)
        np.testing.assert_array_equal(pruned["embed"]["tokens"], params["embed"]["tokens"])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_oracle_10_groups_stay_whole_and_hold_the_best_heads(data: Any, K: int, G: int, seed: int):
    """N' is K'·G'; no other choice of that form has a larger score; a head's numbers stay together, in their order."""
    config = replace(MODEL, num_heads=K * G, num_kv_heads=K)
    groups, own = data.draw(st.integers(1, K)), data.draw(st.integers(1, G))
    scores = np.random.default_rng(seed).uniform(size=(2, K * G))
    heads, partners = choose_heads(scores, config, groups * own, groups)
    for layer, row in enumerate(heads):
        assert row.tolist() == sorted(set(row.tolist()))
        counts = np.bincount(row // G, minlength=K)
        assert sorted(counts[counts > 0].tolist()) == [own] * groups
        best = np.sort(np.sort(scores[layer].reshape(K, G))[:, G - own :].sum(1))[K - groups :].sum()
        assert scores[layer, row].sum() == pytest.approx(best)
        assert not (set(partners[layer].tolist()) - set(row.tolist())) & set(row.tolist())
    params = {"layers": {"attention": {"q": {"kernel": np.arange(2 * 12 * K * G * 4).reshape(2, 12, K * G, 4)}}}}
    pruned, new = keep(params, replace(config, num_layers=2), Kept(heads=heads))
    assert (new.num_heads, new.num_kv_heads, new.head_size) == (groups * own, groups, 4)
    kernel = pruned["layers"]["attention"]["q"]["kernel"]
    assert (np.diff(kernel, axis=-1) == 1).all()  # whole heads: the pairs that RoPE turns are as they were


# -------------------------------------------------------------------------------------- slices by hand


def by_hand(params: tree.Tree, config: ModelConfig) -> tree.Tree:
    """`KEPT` out of each leaf, written out."""
    D, F, out = np.array(KEPT.channels), np.array(NEURONS), {}
    for path, leaf in tree.items(params):
        if path.startswith("layers/"):
            layers = []
            for layer, heads in ((0, [0, 2]), (2, [1, 3])):  # one head of each group, so that both groups stay
                x = np.asarray(leaf[layer])
                if path.endswith(("q/kernel", "q/bias")) or (path.endswith("q_norm/scale") and config.qk_norm == "full"):
                    x = x[..., heads, :]
                if path.endswith("o/kernel"):
                    x = x[heads]
                if path.endswith(("gate/kernel", "up/kernel", "gate/bias", "up/bias")):
                    x = x[..., F]
                if path.endswith("down/kernel"):
                    x = x[F]
                if path.endswith(("o/kernel", "down/kernel", "o/bias", "down/bias")) or (
                    "norm" in path and "q_norm" not in path and "k_norm" not in path
                ):
                    x = x[..., D]
                elif path.endswith("kernel"):
                    x = x[D]
                layers.append(x)
            out[path] = np.stack(layers)
        else:
            out[path] = np.asarray(leaf)[..., D]
    return tree.from_items(list(out.items()))


@every_walk
def test_what_is_kept_is_sliced_out_and_runs(name: str):
    """On NumPy's arrays and on JAX's, any order of indices; and the result's function is the reference's."""
    config = WALKS[name]
    params = random_params(config)
    want = by_hand(params, config)
    shuffled = KEPT._replace(
        layers=[2, 0], heads=np.asarray(KEPT.heads)[:, ::-1], neurons=NEURONS[::-1], channels=np.array(KEPT.channels)[::-1]
    )
    for leaves, kept in ((params, KEPT), (jax.tree.map(jnp.asarray, params), shuffled)):
        got, new = keep(leaves, config, kept)
        same_leaves(got, want)
        assert Shape.of(new) == Shape(2, 8, 2, 2, 8)
        assert tree.structure_diff(shapes_of(new), got) == []
        assert tree.count(got) == shapes.num_params(new)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype("float32")}
    np.testing.assert_allclose(hidden(got, new), reference(want, new), rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("name", ["llama, untied", "gpt: LayerNorm with bias, learned positions, tied"])
def test_heads_and_neurons_that_go_are_as_if_they_said_nothing(name: str):
    """The narrower model equals the old one with zeros in the rows of the output projections."""
    config = WALKS[name]
    masked = jax.tree.map(np.array, random_params(config))
    for layer, heads in enumerate(np.asarray(KEPT.heads)):
        masked["layers"]["attention"]["o"]["kernel"][layer, [h for h in range(4) if h not in heads]] = 0
        masked["layers"]["mlp"]["down"]["kernel"][layer, [f for f in range(20) if f not in NEURONS]] = 0
    pruned = keep(random_params(config), config, KEPT._replace(layers=None, channels=None))
    np.testing.assert_allclose(hidden(*pruned), hidden(masked, config), rtol=1e-4, atol=1e-4)


def test_whole_groups_take_their_keys_along():
    params = random_params(MODEL)
    pruned, config = keep(params, MODEL, Kept(heads=np.array([[0, 1], [2, 3], [2, 3]])))
    assert (config.num_heads, config.num_kv_heads) == (2, 1)
    for name in "kv":
        want = np.stack([params["layers"]["attention"][name]["kernel"][layer, :, [group]][0] for layer, group in enumerate((0, 1, 1))])
        np.testing.assert_array_equal(pruned["layers"]["attention"][name]["kernel"][:, :, 0], want)
    masked = jax.tree.map(np.array, params)
    masked["layers"]["attention"]["o"]["kernel"][0, 2:] = 0
    masked["layers"]["attention"]["o"]["kernel"][1:, :2] = 0
    np.testing.assert_allclose(hidden(pruned, config), hidden(masked, MODEL), rtol=1e-4, atol=1e-4)


def test_layers_keep_their_windows_and_rope():
    near, far = LayerKind(window=2, rope=RopeConfig(base=50.0)), LayerKind()
    config = replace(MODEL, num_layers=5, layer_pattern=(near, near, far))
    for layers, pattern in (
        ([0, 1, 3, 4], (near,)),
        ([2], (far,)),
        ([1, 2, 3], (near, far)),
        ([0, 2, 4], (near, far)),
        ([0, 1, 2, 3], (near, near, far)),
    ):
        assert keep({}, config, Kept(layers=layers))[1].layer_pattern == pattern
    params = random_params(config)
    pruned, new = keep(params, config, Kept(layers=[1, 2, 3]))
    np.testing.assert_allclose(hidden(pruned, new), reference(pruned, new), rtol=2e-4, atol=2e-4)
    assert [new.kind(layer) for layer in range(3)] == [near, far, near]


@pytest.mark.parametrize("tied, final", [(True, True), (False, True), (True, False)])
def test_an_embedding_scale_of_the_root_of_the_width_is_that_of_the_new_width(tied: bool, final: bool):
    """And hidden states and logits are those of the slices with the old scale, to rounding."""
    config = replace(MODEL, num_layers=1, embedding_scale=math.sqrt(12), norm_plus_one=True, tied_embeddings=tied, final_norm=final)
    params = random_params(config)
    kept = Kept(channels=KEPT.channels)
    pruned, new = keep(params, config, kept)
    assert new.embedding_scale == math.sqrt(8)
    sliced, plain = keep(params, replace(config, embedding_scale=3.0), kept)
    assert plain.embedding_scale == 3.0  # of no width: stays
    logits = []
    for leaves, c in ((pruned, new), (sliced, replace(plain, embedding_scale=math.sqrt(12)))):
        lm = decoder(c)
        logits.append(jax.jit(lambda p, lm=lm: lm.unembed(p).logits(lm.apply(p, jnp.asarray(TOKENS)).hidden))(leaves))
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm, plus_one", [("rms", True), ("layer", False)])
def test_mended_norms_undo_the_narrower_mean_square(norm: Any, plus_one: bool):
    """A narrow model in a wide one whose other channels are empty: pruning with mended norms changes nothing, slicing alone does."""
    wide = replace(MODEL, num_layers=1, norm=norm, norm_plus_one=plus_one, norm_eps=1e-9, block="parallel" if norm == "layer" else "serial")
    params, dead = jax.tree.map(np.array, random_params(wide)), [2, 5, 10]
    params["embed"]["tokens"][:, dead] = 0
    params["layers"]["attention"]["o"]["kernel"][..., dead] = 0
    params["layers"]["mlp"]["down"]["kernel"][..., dead] = 0
    if norm == "layer":  # a mean over channels is the same without those that are 0 if it is 0
        alive = [d for d in range(12) if d not in dead]
        centre = lambda x: x - np.isin(np.arange(12), alive) * x[..., alive].mean(-1, keepdims=True)
        params["embed"]["tokens"] = centre(params["embed"]["tokens"])
        for name, leaf in (("attention", "o"), ("mlp", "down")):
            params["layers"][name][leaf]["kernel"] = centre(params["layers"][name][leaf]["kernel"])
    for path, leaf in tree.items(params):
        if path.endswith("norm/scale"):
            leaf[..., dead] = -1.0 if plus_one else 0.0
    scores = importance.measure(decoder(wide), params, [tool.whole_rows(TOKENS)])
    shape = Shape.of(wide)._replace(width=9)
    kept = choose(scores, shape, mend_norms=True)
    assert sorted(set(range(12)) - set(np.asarray(kept.channels).tolist())) == dead
    want = np.delete(hidden(params, wide), dead, -1)
    np.testing.assert_allclose(hidden(*keep(params, wide, kept)), want, rtol=1e-3, atol=1e-3)
    assert np.abs(hidden(*prune(params, wide, scores, shape)) - want).max() > 0.02


# ------------------------------------------------------------------------------------------- choosing


def test_partners_are_mirrored_about_the_last_that_stays():
    """Of 6 ranked heads 4 stay: i from 2·4 − 6 + 1 = 3 to 4 take in 2·4 − i + 1 = 6 and 5."""
    config = replace(MODEL, num_heads=6, num_kv_heads=6)
    ranked = [3, 0, 5, 1, 4, 2]  # best first
    scores = np.empty((1, 6))
    scores[0, ranked] = [6, 5, 4, 3, 2, 1]
    heads, partners = choose_heads(scores, config, 4, 4)
    assert heads.tolist() == [[0, 1, 3, 5]] and partners.tolist() == [[0, 4, 3, 2]]
    few, partners = choose_heads(scores, config, 2, 2)  # 2K − L + 1 is below 1: all that stay take in the next ones
    assert few.tolist() == [[0, 3]] and partners.tolist() == [[5, 1]]


@pytest.mark.parametrize("K, leaves", [(4, "qkv"), (1, "q")])
def test_merged_heads_take_in_a_difference(K: int, leaves: str):
    """Heads of a group with one key/value head: queries alone; heads with keys of their own: queries, keys and values."""
    config = replace(MODEL, num_layers=1, num_kv_heads=K, qkv_bias=True)
    params = random_params(config)
    scores = importance.random(config, 0)._replace(heads=np.array([[1.0, 4.0, 2.0, 3.0]]))  # ranked 1, 3, 2, 0: 3 stay, 2 takes in 0
    shape = Shape.of(config)._replace(num_heads=3, num_kv_heads=min(3, K))
    for merge in (1.0, -0.5):
        pruned, _ = prune(params, config, scores, shape, merge_heads=merge)
        for name in "qkvo":
            for leaf, old in params["layers"]["attention"][name].items():
                got = np.moveaxis(pruned["layers"]["attention"][name][leaf], 1 if name == "o" else -2, 0)
                heads = np.moveaxis(old, 1 if name == "o" else -2, 0)
                want = heads[[1, 2, 3]] if len(heads) > 1 else heads
                if name in leaves:
                    want = np.stack([heads[1], heads[2] + merge * (heads[2] - heads[0]), heads[3]])
                np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7, err_msg=f"{name}/{leaf}")


def test_of_equals_the_first_stay():
    assert top(np.zeros((2, 5)), 3).tolist() == [[0, 1, 2]] * 2


def test_a_block_goes_where_the_stream_moves_least():
    config = replace(MODEL, num_layers=4)
    influence = np.full((5, 5), 9.0)
    influence[[0, 1, 2, 3], [1, 2, 3, 4]] = 0.3, 0.1, 0.4, 0.2  # single layers: 1 and 3 go
    influence[[0, 1, 2], [2, 3, 4]] = 0.5, 0.45, 0.3  # blocks: layers 2 and 3 do
    scores = importance.random(config, 0)._replace(influence=influence)
    shape = Shape.of(config)._replace(num_layers=2)
    assert choose(scores, shape).layers == (0, 1)
    assert choose(scores, shape, depth="single").layers == (0, 2)
    assert choose(scores, shape, layers=(0, 3)).layers == (0, 3)


def test_a_mesh_changes_no_number():
    params, plain = keep(random_params(MODEL), MODEL, KEPT)
    mesh = sharding.make_mesh(MeshConfig(data=2, model=4))
    padded = sharding.pad_vocab(jax.tree.map(jnp.asarray, random_params(MODEL)), 4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(padded, sharding.shardings(sharding.param_specs(padded, mesh), mesh))
        got = jax.jit(lambda params: keep(params, MODEL, KEPT)[0])(placed)
    assert Shape.of(plain) == Shape(2, 8, 2, 2, 8)
    same_leaves(sharding.trim_vocab(got, MODEL.vocab_size), params)


REFUSED: dict[str, tuple[Any, str]] = {
    "not there": (Kept(neurons=[0, 20]), "neurons of layer 0 to keep include 20; the model has 0 to 19"),
    "negative": (Kept(channels=[-1]), "channels to keep include -1; the model has 0 to 11"),
    "twice": (Kept(layers=[0, 0]), "nothing can be kept twice"),
    "none": (Kept(layers=[]), "at least one whole number"),
    "fractions": (Kept(channels=np.array([0.5])), "at least one whole number"),
    "rows": (Kept(heads=np.zeros((2, 2), int)), r"one for each of the 3 layers, and their shape is \(2, 2\)"),
    "unlike groups": (Kept(heads=[0, 1, 2]), "leave 1, 2 in a group.*equally many of each group of 2"),
    "unlike layers": (Kept(heads=np.array([[0, 2], [0, 1], [0, 1]])), "1, 2 groups in a layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_indices_that_cannot_be_kept_are_refused(name: str):
    kept, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        keep({}, MODEL, kept)


def test_what_cannot_be_pruned_is_refused():
    params = random_params(MODEL)
    with pytest.raises(ConfigError, match=r"layers/attention/q/lora_a is no leaf of a plain decoder; fold adapters"):
        keep({"layers": {"attention": {"q": {"lora_a": np.zeros((3, 12, 1))}}}}, MODEL, KEPT)
    with pytest.raises(ConfigError, match=r"embed/tokens has shape \(19, 12\), and V D of the config are \[19, 16\]"):
        keep(params, replace(MODEL, width=16), KEPT)
    with pytest.raises(ConfigError, match="ALiBi's slopes follow from the number of heads"):
        keep({}, replace(MODEL, position="alibi"), Kept(heads=[0, 2]))
    scores = importance.random(MODEL, 0)
    with pytest.raises(ConfigError, match="ff_width is 24; pruning makes a model smaller, and this one has 20"):
        prune(params, MODEL, scores, Shape.of(MODEL)._replace(ff_width=24))
    with pytest.raises(ConfigError, match="3 heads in 2 groups cannot be made of 4 in 2"):
        choose(scores, Shape.of(MODEL)._replace(num_heads=3))
    with pytest.raises(ConfigError, match="4 heads in 1 groups cannot be made"):
        choose(scores, Shape.of(MODEL)._replace(num_kv_heads=1))
    with pytest.raises(ConfigError, match="scores are of another model: its num_layers is 3, and this one's 2"):
        prune(params, replace(MODEL, num_layers=2), scores)
