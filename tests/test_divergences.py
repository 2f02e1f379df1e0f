"""What single divergences promise beyond the laws: numbers of the papers' cards, limits, teachers in both forms, errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ConfigError
from jaxllm.losses.divergences import TopK, forward_kl, jensen_shannon, reverse_kl, soft_ce, total_variation
from jaxllm.losses.tokens import next_token
from jaxllm.losses.vocab import over_vocab
from tests.observed import alone, batch_of, observe, value


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_kl_direction() -> None:
    """p_T = (.5, .5), p_S = (.9, .1): forward 0.510826, reverse 0.368064."""
    ours, theirs = np.log([[[0.9, 0.1]]]), np.log([[[0.5, 0.5]]])
    got = alone({"forward": forward_kl("t"), "reverse": reverse_kl("t")}, t=theirs)(ours)
    np.testing.assert_allclose(got["forward"][0], 0.510826, atol=1e-6)
    np.testing.assert_allclose(got["reverse"][0], 0.368064, atol=1e-6)


@pytest.mark.parametrize("kl", [forward_kl, reverse_kl])
def test_kl_is_zero_iff_equal(kl: Any) -> None:
    """Zero with zero gradient for equal models (up to a shift of logits), positive for any others; t^2 is exactly the factor."""
    theirs = np.random.default_rng(2).normal(size=(1, 3, 5))
    terms = {(t, factor): kl("t", t, times_t_squared=factor) for t in (0.5, 1.0, 3.0) for factor in (True, False)}
    run = alone({f"{t}, {factor}": term for (t, factor), term in terms.items()}, t=theirs)
    same, other = run(theirs + 2.0), run(theirs + np.random.default_rng(3).normal(size=theirs.shape))
    for name, (zero, gradient) in same.items():
        np.testing.assert_allclose(zero, 0.0, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(gradient, 0.0, atol=2e-6, err_msg=name)
    for t in (0.5, 1.0, 3.0):
        plain = other[f"{t}, False"][0]
        assert plain > 1e-2
        np.testing.assert_allclose(other[f"{t}, True"][0], plain * t**2, rtol=1e-6)


def test_soft_ce_is_kl_plus_entropy() -> None:
    rng = np.random.default_rng(4)
    ours, theirs = rng.normal(size=(2, 2, 3, 6))
    p = np.exp(theirs) / np.exp(theirs).sum(-1, keepdims=True)
    (ce, ce_gradient), (kl, kl_gradient) = alone({"ce": soft_ce("t"), "kl": forward_kl("t")}, t=theirs)(ours).values()
    np.testing.assert_allclose(ce - kl, -(p * np.log(p)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(ce_gradient, kl_gradient, atol=1e-7)


def test_top_k_of_everything_is_the_dense_teacher() -> None:
    """k = V leaves no tail to choose about, in any order of ids."""
    rng = np.random.default_rng(5)
    ours, theirs = rng.normal(size=(2, 2, 3, 6))
    logp = theirs - np.log(np.exp(theirs).sum(-1, keepdims=True))
    ids = np.argsort(-logp, axis=-1)
    top = TopK(ids.astype(np.int32), np.take_along_axis(logp, ids, -1), np.zeros((2, 3)))
    batch = batch_of(np.zeros((2, 3), int), extras=jax.tree.map(jnp.asarray, top.extras("top")))
    tails = {tail: soft_ce("top", tail) for tail in ("drop", "renormalise", "uniform")}
    got = alone({"dense": soft_ce("t"), **tails}, t=theirs)(ours, batch)
    for tail in tails:
        jax.tree.map(lambda a, b, tail=tail: np.testing.assert_allclose(a, b, 1e-5, 1e-6, err_msg=tail), got[tail], got["dense"])


def test_top_k_one_hot_is_next_token_and_equal_ids_add_up() -> None:
    """FuseLLM's rejected rows are one-hot labels; two entries of one id are their sum; a row without entries says nothing."""
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(1, 3, 5))
    labels = np.array([[1, 4, 0]])
    top = TopK(np.repeat(labels[..., None], 2, -1).astype(np.int32), np.log(np.full((1, 3, 2), 0.5)), np.zeros((1, 3)))
    batch = batch_of(labels, extras=jax.tree.map(jnp.asarray, top.extras("fused")))
    run = alone({"fused": soft_ce("fused"), "plain": next_token()})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *run(logits, batch).values())
    nothing = top._replace(logp=np.full((1, 3, 2), -np.inf))
    batch = batch_of(labels, extras=jax.tree.map(jnp.asarray, nothing.extras("fused")))
    empty, gradient = run(logits, batch)["fused"]
    assert empty == 0.0
    assert np.all(np.asarray(gradient) == 0.0)


def test_jensen_shannon_runs_from_forward_to_reverse_kl() -> None:
    """GKD's limits: JSD / beta goes to KL(T || S) as beta goes to 0, JSD / (1 - beta) to KL(S || T) as it goes to 1; symmetric at 1/2."""
    ours, theirs = np.random.default_rng(7).normal(size=(2, 1, 4, 6))
    terms = {"low": jensen_shannon("t", 1e-3), "high": jensen_shannon("t", 1 - 1e-3), "half": jensen_shannon("t")}
    terms |= {"forward": forward_kl("t"), "reverse": reverse_kl("t")}
    here = {name: float(got[0]) for name, got in alone(terms, t=theirs)(ours).items()}
    there = {name: float(got[0]) for name, got in alone(terms, t=ours)(theirs).items()}
    np.testing.assert_allclose(here["low"] / 1e-3, here["forward"], rtol=2e-2)
    np.testing.assert_allclose(here["high"] / 1e-3, here["reverse"], rtol=2e-2)
    np.testing.assert_allclose(here["half"], there["half"], rtol=1e-5)
    assert here["half"] < np.log(2)


def test_total_variation_is_half_the_distance() -> None:
    got = alone({"tv": total_variation("t")}, t=np.log([[[0.5, 0.3, 0.2]]]))(np.log([[[0.1, 0.3, 0.6]]]))
    np.testing.assert_allclose(got["tv"][0], 0.4, rtol=1e-5)


def test_the_rest_as_one_event_is_a_lower_bound() -> None:
    """The data processing inequality: a divergence between coarser distributions is never more, and grows with k towards the whole."""
    rng = np.random.default_rng(8)
    ours, theirs = 2 * rng.normal(size=(2, 2, 3, 12))
    logp = log_softmax(theirs)
    ids = np.argsort(-logp, axis=-1)
    kinds: dict[str, Any] = {"forward": forward_kl, "reverse": reverse_kl, "js": jensen_shannon, "tv": total_variation}
    whole = alone({name: kind("t") for name, kind in kinds.items()}, t=theirs)(ours)
    before = dict.fromkeys(kinds, 0.0)
    for k in (1, 4, 8, 12):
        best = ids[..., :k]
        top = TopK(best.astype(np.int32), np.take_along_axis(logp, best, -1), 1 - np.exp(np.take_along_axis(logp, best, -1)).sum(-1))
        batch = batch_of(np.zeros((2, 3), int), extras=jax.tree.map(jnp.asarray, top.extras("top")))
        got = alone({name: kind("top", tail="rest") for name, kind in kinds.items()})(ours, batch)
        for name in kinds:
            assert before[name] - 1e-6 <= got[name][0] <= whole[name][0] + 1e-6, (name, k)
            before[name] = float(got[name][0])
    for name in kinds:
        np.testing.assert_allclose(before[name], whole[name][0], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("sizes", [(5, 8), (8, 5), (7, 7)])
def test_tables_of_one_tokenizer_padded_differently(sizes: tuple[int, int]) -> None:
    """Whatever stands in the rows beyond `shared`, in either model: as if both had `shared` rows; and they get no gradient."""
    rng = np.random.default_rng(9)
    ours, theirs = rng.normal(size=(1, 3, sizes[0])), rng.normal(size=(1, 3, sizes[1]))
    kinds: dict[str, Any] = {"forward": forward_kl, "reverse": reverse_kl, "js": jensen_shannon, "tv": total_variation, "ce": soft_ce}
    got = alone({name: kind("t", shared=5) for name, kind in kinds.items()}, t=theirs)(ours)
    cut = alone({name: kind("t") for name, kind in kinds.items()}, t=theirs[..., :5])(ours[..., :5])
    for name in kinds:
        np.testing.assert_allclose(got[name][0], cut[name][0], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(got[name][1][..., :5], cut[name][1], rtol=1e-4, atol=1e-6)
        assert not np.any(np.asarray(got[name][1][..., 5:]))


def test_a_stored_tail_of_zero_leaves_reverse_kl_finite() -> None:
    """float16 rounds a tail of 2e-8 to 0; the student's mass there must still be paid for, and not with infinity."""
    ids, logp = np.zeros((1, 1, 1), np.int32), np.zeros((1, 1, 1))
    batch = batch_of(np.zeros((1, 1), int), extras=jax.tree.map(jnp.asarray, TopK(ids, logp, np.zeros((1, 1))).extras("top")))
    loss, gradient = alone({"kl": reverse_kl("top")})(np.zeros((1, 1, 4)), batch)["kl"]
    assert 5.0 < loss < 20.0
    assert gradient[0, 0, 0] < 0 < gradient[0, 0, 1]


def test_clear_errors() -> None:
    top = TopK(np.zeros((1, 2, 3), np.int32), np.zeros((1, 2, 3)), np.zeros((1, 2)))
    obs = observe(np.zeros((1, 2, 4)), t=np.zeros((1, 2, 4)), small=np.zeros((1, 2, 3)))
    cached = obs.replace(batch=obs.batch.replace(extras=jax.tree.map(jnp.asarray, top.extras("top"))))
    run = lambda term, obs=obs: value(over_vocab(kl=(1.0, term)), obs)
    cases = [
        (lambda: forward_kl("t", 0.0), "temperature is 0.0"),
        (lambda: soft_ce("t", "renormalize"), "renormalize.*did you mean 'renormalise'"),
        (lambda: jensen_shannon("t", 1.0), "beta is 1.0"),
        (lambda: reverse_kl("t", tail="drop"), "infinite.*'drop'.*'rest' or 'uniform'"),
        (lambda: run(forward_kl("tt")), "'tt' in Obs.unembeddings.*did you mean 't'.*teacher"),
        (lambda: run(forward_kl("small")), "vocabulary of 3 and the student of 4.*TopK.*shared"),
        (lambda: run(forward_kl("small", shared=4)), "shared is 4.*student has 4 entries and teacher 'small' 3"),
        (lambda: run(forward_kl("top", 2.0), cached), "the 3 most probable tokens at temperature 1"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()
