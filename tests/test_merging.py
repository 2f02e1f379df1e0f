"""Merged weights against what their papers' definitions give by hand, and the laws that they imply."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import tree
from jaxllm.config import ConfigError
from jaxllm.surgery import merging


def model(seed: int, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"a": {"kernel": scale * rng.normal(size=(3, 5)).astype(np.float32)}, "b": scale * rng.normal(size=7).astype(np.float32)}


def moved(base: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    return tree.map_with_path(lambda path, x, y: x + y, base, task)


def flat(params: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for _, leaf in tree.items(params)])


def ties_by_definition(base: np.ndarray, models: list[np.ndarray], density: float, scale: float) -> np.ndarray:
    """arXiv:2306.01708, algorithm 1, a parameter at a time."""
    trimmed = []
    for one in models:
        task = one - base
        keep = set(np.argsort(-np.abs(task), kind="stable")[: max(1, round(density * len(task)))].tolist())
        trimmed.append([float(x) if i in keep else 0.0 for i, x in enumerate(task)])
    out = base.copy()
    for i, values in enumerate(zip(*trimmed, strict=True)):
        positive, negative = sum(v for v in values if v > 0), -sum(v for v in values if v < 0)
        if positive != negative:
            agreeing = [v for v in values if (v > 0 if positive > negative else v < 0)]
            out[i] += scale * sum(agreeing) / len(agreeing)
    return out


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 999), st.integers(1, 4), st.sampled_from([0.05, 0.2, 0.5, 1.0]), st.sampled_from([1.0, 0.4]))
def test_ties_is_its_algorithm(seed: int, num: int, density: float, scale: float):
    base, models = model(seed), [model(1000 * (i + 1) + seed) for i in range(num)]
    got = merging.ties(base, models, density, scale)
    want = ties_by_definition(flat(base), [flat(one) for one in models], density, scale)
    np.testing.assert_allclose(flat(got), want, atol=2e-6)


def test_ties_by_hand():
    """Three models, four parameters, half of them kept: the sign with more weight wins, and only who agrees is averaged."""
    base = {"w": np.zeros(4, np.float32)}
    models = [{"w": np.array(w, np.float32)} for w in ([3.0, 1.0, 0.5, -2.0], [-1.0, 4.0, 0.1, -4.0], [-1.5, -0.2, 9.0, 0.3])]
    # Kept: [3, ·, ·, -2], [·, 4, ·, -4], [-1.5, ·, 9, ·].
    np.testing.assert_allclose(merging.ties(base, models, 0.5)["w"], [3.0, 4.0, 9.0, -3.0])


def test_trimming_counts_all_parameters_together():
    """A leaf whose entries are all small loses them all."""
    base = {"large": np.zeros(4, np.float32), "small": np.zeros(4, np.float32)}
    one = {"large": np.full(4, 5.0, np.float32), "small": np.full(4, 0.1, np.float32)}
    got = merging.ties(base, [one], 0.5)
    np.testing.assert_array_equal(got["large"], one["large"])
    np.testing.assert_array_equal(got["small"], base["small"])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.integers(1, 4))
def test_a_merge_of_one_model_with_itself_is_that_model(seed: int, num: int):
    base, one = model(seed), model(seed + 5000)
    for got in (merging.linear([one] * num), merging.ties(base, [one] * num, 1.0), merging.dare(base, one, 0.0, np.random.default_rng(0))):
        np.testing.assert_allclose(flat(got), flat(one), atol=1e-6)
    np.testing.assert_array_equal(flat(merging.ties(base, [base] * num)), flat(base))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.permutations(range(3)))
def test_the_order_of_the_models_does_not_matter(seed: int, order: list[int]):
    base, models, weights = model(seed), [model(seed + 1000 * (i + 1)) for i in range(3)], [0.5, 0.3, 0.2]
    shuffled = [models[i] for i in order]
    np.testing.assert_allclose(flat(merging.ties(base, shuffled, 0.3)), flat(merging.ties(base, models, 0.3)), atol=1e-6)
    np.testing.assert_allclose(
        flat(merging.linear(shuffled, [weights[i] for i in order])),
        sum(w * flat(m) for w, m in zip(weights, models, strict=True)),
        atol=1e-6,
    )


def test_dare_drops_the_share_it_is_asked_to_and_keeps_the_mean():
    base = {"w": np.full(200_000, 2.0, np.float32)}
    one = {"w": np.full(200_000, 3.0, np.float32)}
    got = merging.dare(base, one, 0.9, np.random.default_rng(1))["w"]
    assert set(np.round(got, 3).tolist()) == {2.0, 12.0}
    # Standard error of the share: sqrt(0.9 · 0.1 / n) = 0.00067, of the mean ten times that.
    assert abs((got == 2.0).mean() - 0.9) < 0.003 and abs(got.mean() - 3.0) < 0.03


def test_types_and_arrays_of_jax_stay_what_they_are():
    base = {"w": jnp.ones(4, jnp.bfloat16), "b": jnp.zeros(2, jnp.float32)}
    one = {"w": 2 * base["w"], "b": base["b"] + 1}
    got = merging.linear([base, one])
    assert got["w"].dtype == jnp.bfloat16 and got["b"].dtype == np.float32
    np.testing.assert_array_equal(got["w"].astype(np.float32), np.full(4, 1.5))
    assert merging.ties(base, [one])["w"].dtype == merging.dare(base, one, 0.5, np.random.default_rng(0))["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda base: merging.linear([]), "no model to merge"),
        (lambda base: merging.linear([base, base], [0.5, 0.4]), r"weights of 2 models are \[0.5, 0.4\]; give one a model, with sum 1"),
        (lambda base: merging.linear([base, {**base, "b": np.zeros(3)}]), r"model 1 .* b has shape \(3,\), expected \(7,\)"),
        (lambda base: merging.ties(base, [{"b": base["b"]}]), "model 1 .* missing a/kernel"),
        (lambda base: merging.ties(base, [base], 0.0), "density is 0.0"),
        (lambda base: merging.dare(base, base, 1.0, np.random.default_rng(0)), "drop is 1.0"),
    ],
)
def test_what_cannot_be_merged(call: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        call(model(0))
