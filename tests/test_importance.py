"""Importance scores: the oracles of the Minitron card, each by its number, and the same sums by hand in NumPy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import tree
from jaxllm.config import ConfigError, ModelConfig
from jaxllm.contract import Batch
from jaxllm.models.block import TAPS
from jaxllm.models.transformer import decoder
from jaxllm.surgery import importance
from jaxllm.surgery.importance import Scores
from tests.reference_decoder import BASE, BIASES, GPT, random_params, ref_norm

MODEL = replace(BASE, num_layers=2)
rng = np.random.default_rng(5)
TOKENS = rng.integers(1, MODEL.vocab_size, (4, 7)).astype(np.int32)
SEGMENTS = np.array([[1] * 7, [1, 1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0], [0] * 7], np.int32)  # packed, short, only padding
LOSS = np.where((SEGMENTS > 0) & (np.arange(7) != 1), 0.5, 0.0).astype(np.float32)
REAL = LOSS > 0


def batch(rows: Any = slice(None), loss: np.ndarray = LOSS) -> Batch:
    positions = np.broadcast_to(np.arange(7), TOKENS.shape)
    tokens, mask, segments, at = (jnp.asarray(x[rows]) for x in (TOKENS, loss, SEGMENTS, positions))
    return Batch(tokens, tokens, mask, segments, at)


def params_of(config: ModelConfig = MODEL) -> tree.Tree:
    return jax.tree.map(jnp.asarray, random_params(config))


@cache
def lm(config: ModelConfig = MODEL) -> Any:
    return decoder(config)


def measured(params: tree.Tree, config: ModelConfig = MODEL, **options: Any) -> Scores:
    return importance.measure(lm(config), params, [batch()], **options)


@cache
def taps_of(config: ModelConfig = MODEL) -> dict[str, np.ndarray]:
    run = jax.jit(lambda params: lm(config).apply(params, jnp.asarray(TOKENS), segment_ids=jnp.asarray(SEGMENTS), taps=TAPS).taps)
    return {name: np.asarray(tap, np.float64) for name, tap in run(params_of(config)).items()}


def by_hand(x: np.ndarray, over_tokens: str = "mean", over_rows: str = "l2") -> np.ndarray:
    """[L B T X] -> [L X], one row, one layer and one unit at a time."""
    how = {
        "mean": lambda a: np.abs(a).sum() / len(a),
        "l2": lambda a: np.sqrt((a * a).sum()),
        "var": lambda a: ((a - a.sum() / len(a)) ** 2).sum() / len(a),
    }
    out = np.empty((x.shape[0], x.shape[3]))
    for layer, unit in np.ndindex(*out.shape):
        rows = [how[over_tokens](x[layer, b, REAL[b], unit]) for b in range(len(REAL)) if REAL[b].any()]
        out[layer, unit] = how[over_rows](np.array(rows))
    return out


# ------------------------------------------------------------------------------------------ the oracles


def test_oracle_5_mean_of_absolute_values_over_tokens_then_l2_over_rows():
    x = jnp.array([[1.0, -3.0], [2.0, 2.0]])[None, :, :, None]  # [L B T X]
    rows = importance.aggregate(x, jnp.ones((2, 2), bool), "mean")
    np.testing.assert_array_equal(rows.ravel(), [2.0, 2.0])
    moments = importance._Moments()
    moments.add(np.asarray(rows, np.float64))
    assert float(moments.aggregated("l2").item()) == pytest.approx(2.828427, abs=1e-6)


def test_oracle_3_a_neuron_without_weights_scores_0_and_so_does_a_head():
    config = replace(MODEL, mlp_bias=True)
    params = jax.tree.map(np.array, random_params(config))
    for name in ("gate", "up"):
        params["layers"]["mlp"][name]["kernel"][:, :, 4] = 0
        params["layers"]["mlp"][name]["bias"][:, 4] = 0
    params["layers"]["mlp"]["down"]["kernel"][:, 4] = 0
    params["layers"]["attention"]["v"]["kernel"][1, :, 1] = 0
    for neurons in importance.NEURONS:
        scores = measured(params, config, neurons=neurons)
        np.testing.assert_array_equal(scores.neurons == 0, np.arange(20)[None].repeat(2, 0) == 4)
    np.testing.assert_array_equal(scores.heads == 0, [[False] * 4, [False, False, True, True]])  # two heads read values 1


def test_oracle_4_permuted_neurons_and_heads_have_permuted_scores():
    params = params_of()
    neurons, groups, within = rng.permutation(20), np.array([1, 0]), np.array([1, 0])
    heads = (groups[:, None] * 2 + within).ravel()  # groups change places, and heads within them

    def permuted(path: str, leaf: Any) -> Any:
        if "/mlp/" in path:
            return leaf[:, neurons] if "down" in path else leaf[:, :, neurons]
        if "attention/o/" in path:
            return leaf[:, heads]
        return leaf[:, :, heads if "/q/" in path else groups] if "attention/" in path else leaf

    before, after = measured(params), measured(tree.map_with_path(permuted, params))
    np.testing.assert_allclose(after.neurons, before.neurons[:, neurons], rtol=1e-5)
    np.testing.assert_allclose(after.heads, before.heads[:, heads], rtol=1e-5)
    np.testing.assert_allclose(after.channels, before.channels, rtol=1e-5)
    np.testing.assert_allclose(after.influence, before.influence, atol=1e-6)


def test_oracle_6_a_layer_that_adds_nothing_has_no_influence():
    params = jax.tree.map(np.array, random_params(MODEL))
    params["layers"]["attention"]["o"]["kernel"][1] = 0
    params["layers"]["mlp"]["down"]["kernel"][1] = 0
    scores = measured(params)
    assert scores.layers[1] == 0.0 and scores.layers[0] > 0.01
    np.testing.assert_array_equal(scores.influence[:, 1], scores.influence[:, 2])


# -------------------------------------------------------------------------------------- against NumPy


@pytest.mark.parametrize("over_tokens", importance.AGGREGATIONS)
@pytest.mark.parametrize("over_rows", importance.AGGREGATIONS)
def test_each_aggregation_equals_the_sums_by_hand(over_tokens: Any, over_rows: Any):
    scores = measured(params_of(), over_tokens=over_tokens, over_rows=over_rows)
    taps = taps_of()
    how = (over_tokens, over_rows)
    np.testing.assert_allclose(scores.heads, by_hand(np.linalg.norm(taps["attention_heads"], axis=-1), *how), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores.neurons, by_hand(taps["mlp_hidden"], *how), rtol=1e-4, atol=1e-6)
    norms = by_hand(taps["attention_norm"], *how).sum(0) + by_hand(taps["mlp_norm"], *how).sum(0)
    np.testing.assert_allclose(scores.channels, norms, rtol=1e-4, atol=1e-6)
    assert scores.num_tokens == REAL.sum() == 6 + 5 + 1
    assert scores.how == f"{over_tokens} over tokens, {over_rows} over rows, neurons: hidden"


def test_influence_is_one_minus_the_mean_cosine():
    taps = taps_of()
    stream = np.concatenate([taps["block_input"], taps["block_output"][-1:]])[:, REAL]
    unit = stream / np.linalg.norm(stream, axis=-1, keepdims=True)
    want = 1 - np.einsum("LTD,MTD->LM", unit, unit) / REAL.sum()
    scores = measured(params_of())
    np.testing.assert_allclose(scores.influence, want, atol=1e-6)
    np.testing.assert_allclose(scores.layers, [want[0, 1], want[1, 2]], atol=1e-6)
    np.testing.assert_allclose(importance.block_influence(scores, 1), scores.layers)


PLACES: dict[str, ModelConfig] = {
    "parallel, one norm": replace(MODEL, **GPT | {"num_kv_heads": 2}, block="parallel"),
    "parallel, two norms": replace(MODEL, block="parallel", parallel_norms=2),
    "after": replace(MODEL, norm_placement="after"),
    "both, of 1 + w": replace(MODEL, norm_placement="both", norm_plus_one=True),
    "both, parallel": replace(MODEL, norm_placement="both", block="parallel", parallel_norms=2),
    "after the sum": replace(MODEL, norm_placement="after_residual", norm="layer", norm_bias=True, final_norm=False),
    "after the sum, parallel": replace(MODEL, norm_placement="after_residual", block="parallel"),
}


@pytest.mark.parametrize("name", PLACES)
def test_every_norm_of_every_layer_counts_wherever_it_stands(name: str):
    """What norms give, out of taps that the decoder has, or by the reference's formula."""
    config = PLACES[name]
    taps, params = taps_of(config), random_params(config)
    outputs = []

    def of(leaf: str, x: np.ndarray) -> np.ndarray:
        parts = [jax.tree.map(lambda w: np.asarray(w, np.float64)[layer], params["layers"][leaf]) for layer in range(2)]
        return np.stack([ref_norm(config, part, x[layer], bias=config.norm_bias) for layer, part in enumerate(parts)])

    if config.norm_placement in ("before", "both"):
        outputs += [taps[name] for name in (("attention_norm", "mlp_norm") if "mlp_norm" in params["layers"] else ("attention_norm",))]
    if config.norm_placement in ("after", "both"):
        post = [of("attention_post_norm", taps["attention_output"]), of("mlp_post_norm", taps["mlp_output"])]
        np.testing.assert_allclose(sum(post), taps["block_output"] - taps["block_input"], atol=1e-4)
        outputs += post
    if config.norm_placement == "after_residual":
        outputs += [taps["block_output"]] if config.block == "parallel" else [taps["mlp_norm"], taps["block_output"]]
    scores = measured(params_of(config), config)
    np.testing.assert_allclose(scores.channels, sum(by_hand(x).sum(0) for x in outputs), rtol=1e-4)
    assert set(importance.norm_names(config)) == {key for key in params["layers"] if key.endswith("norm")}
    assert scores.energy.shape == (len(outputs), 2, 12)
    np.testing.assert_allclose(scores.energy.sum(-1), 1.0, atol=1e-4)
    x = taps["block_input"][1][REAL]
    share = np.square(x - x.mean(-1, keepdims=True) if config.norm == "layer" else x)
    if config.norm_placement == "before":
        np.testing.assert_allclose(scores.energy[0, 1], (share / share.sum(-1, keepdims=True)).mean(0), atol=1e-5)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_preactivations_are_what_the_activation_reads(activation: Any):
    config = replace(MODEL, activation=activation, **BIASES)
    leaves = random_params(config)["layers"]["mlp"]["gate" if activation == "swiglu" else "up"]
    x = np.einsum("LBTD,LDF->LBTF", taps_of(config)["mlp_norm"], leaves["kernel"]) + leaves["bias"][:, None, None]
    scores = measured(params_of(config), config, neurons="preactivation")
    np.testing.assert_allclose(scores.neurons, by_hand(x), rtol=1e-4)


@cache
def in_one(over_rows: Any) -> Scores:
    return measured(params_of(), over_rows=over_rows)


@settings(max_examples=4, deadline=None)
@given(st.permutations([0, 1, 2, 3]), st.sampled_from(importance.AGGREGATIONS))
def test_neither_the_order_of_rows_nor_their_batches_matter(order: list[int], over_rows: Any):
    whole = importance.measure(lm(), params_of(), [batch(np.array(order[:2])), batch(np.array(order[2:]))], over_rows=over_rows)
    for name in ("heads", "neurons", "channels", "influence", "energy", "final_energy"):
        np.testing.assert_allclose(getattr(whole, name), getattr(in_one(over_rows), name), rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_far_mean_does_not_drown_a_small_variance():
    """Differences of 1e-4 about 1000, in parts of unlike size: a sum of squares minus a square would lose them."""
    rows = 1000 + 1e-4 * np.random.default_rng(0).normal(size=(50, 3))
    moments = importance._Moments()
    for part in np.split(rows, [1, 20, 21]):
        moments.add(part)
    np.testing.assert_allclose(moments.aggregated("var"), rows.var(0), rtol=1e-6)
    np.testing.assert_allclose(moments.aggregated("l2"), np.linalg.norm(rows, axis=0), rtol=1e-12)


# ------------------------------------------------------------------------------------ ablation, files


def test_ablation_asks_for_each_block_once_with_the_layers_around_it():
    asked = []

    def loss(layers: tuple[int, ...]) -> float:
        asked.append(layers)
        return float(sum(layers))

    np.testing.assert_array_equal(importance.ablation(loss, 5, 3), [3 + 4, 0 + 4, 0 + 1])
    assert asked == [(3, 4), (0, 4), (0, 1)]
    np.testing.assert_array_equal(importance.ablation(loss, 3), [3, 2, 1])
    for size in (0, 5):
        with pytest.raises(ConfigError, match=f"a block of {size} out of 5 layers.*1 to 4"):
            importance.ablation(loss, 5, size)


def test_scores_travel_in_one_file(tmp_path: Path):
    scores = measured(params_of(), fingerprint="0123abcd")
    importance.save(tmp_path / "scores.npz", scores)
    back = importance.load(tmp_path / "scores.npz", "0123abcd")
    assert (back.config, back.num_tokens, back.how, back.fingerprint) == (MODEL, 12, scores.how, "0123abcd")
    for name in ("heads", "neurons", "channels", "influence", "energy", "final_energy"):
        np.testing.assert_array_equal(getattr(back, name), getattr(scores, name))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]
    with pytest.raises(ConfigError, match=r"scores of other weights \(fingerprint 0123abcd, these have ffff"):
        importance.load(tmp_path / "scores.npz", "ffff")
    (tmp_path / "scores.npz").write_bytes((tmp_path / "scores.npz").read_bytes()[:-40])
    with pytest.raises(ConfigError, match="holds no importance scores"):
        importance.load(tmp_path / "scores.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ConfigError, match="holds no importance scores"):
        importance.load(tmp_path / "other.npz")
    with pytest.raises(ConfigError, match="does not exist"):
        importance.load(tmp_path / "none.npz")


def test_a_random_choice_is_one_of_its_seed():
    one, same, other = (importance.random(MODEL, seed) for seed in (1, 1, 2))
    for name in ("heads", "neurons", "channels", "influence"):
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
        assert (getattr(one, name) != getattr(other, name)).all()
    assert [x.shape for x in one[:4]] == [x.shape for x in measured(params_of())[:4]]


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ConfigError, match="over_rows is 'max'; choose one of mean, l2, var"):
        measured(params_of(), over_rows="max")
    with pytest.raises(ConfigError, match="neurons is 'hiden'; choose one of hidden, preactivation; did you mean 'hidden'"):
        measured(params_of(), neurons="hiden")
    with pytest.raises(ConfigError, match="attends to a memory"):
        measured({}, replace(MODEL, cross_attention=True))
    for batches in ([], [batch(loss=np.zeros_like(LOSS))]):
        with pytest.raises(ConfigError, match="at least one batch of calibration text"):
            importance.measure(lm(), params_of(), batches)
    with pytest.raises(ConfigError, match="give two rows at least"):
        importance.measure(lm(), params_of(), [batch(slice(0, 1))], over_rows="var")
    scores = importance.random(MODEL, 0)
    with pytest.raises(ConfigError, match="its ff_width is 20, and this one's 24"):
        importance.check(scores, replace(MODEL, ff_width=24))
    with pytest.raises(ConfigError, match="scores' heads are not finite"):
        importance.check(scores._replace(heads=scores.heads * np.nan), MODEL)
