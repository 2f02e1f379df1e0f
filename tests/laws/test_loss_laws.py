"""Laws that every loss obeys. A new loss joins by adding one row to CASES: a builder and a formula in NumPy float64.

The formula is written with full logits, from the paper, and shares no code with the library. Gradients are held against
its directional derivatives (central differences in float64), along random directions in all params at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.contract import STUDENT, Batch, Obs, Unembedding
from jaxllm.losses import divergences, sequence, tokens
from jaxllm.losses.annotate import teacher
from jaxllm.losses.core import LossTransform, adaptive, masked, partition, scale, total
from jaxllm.losses.vocab import over_vocab

B, T, D, V, K = 4, 7, 6, 11, 3
HEADS = 2
STEP = 3
SCALE, CAP = 0.7, 2.0


# --------------------------------------------------------------------------- a world with everything


def make_params(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"embed": rng.normal(size=(V, D)), "kernel": rng.normal(size=(V, D)), "reward": rng.normal(size=D)}


def make_batch(seed: int = 0) -> Batch:
    array: Any = np.asarray  # batches stay NumPy, for the formulas
    rng: Any = np.random.default_rng(seed)
    mask: Any = (rng.random((B, T)) < 0.7).astype(np.float32)
    mask[:, 0] = 1.0
    mask[1, 2] = 0.5
    logp = np.log(rng.dirichlet(np.ones(K + 1), size=(B, T)))
    ids = np.stack([np.stack([rng.permutation(V)[:K] for _ in range(T)]) for _ in range(B)])
    logp[0, 1, 1] = -np.inf  # an unused entry
    top = divergences.TopK(ids.astype(np.int32), logp[..., :K].astype(np.float32), (1 - np.exp(logp[..., :K]).sum(-1)).astype(np.float32))
    return Batch(
        tokens=rng.integers(0, V, (B, T)).astype(np.int32),
        labels=rng.integers(0, V, (B, T)).astype(np.int32),
        loss_mask=mask,
        segment_ids=array(np.tile(1 + np.arange(T, dtype=np.int32) // 4, (B, 1))),
        positions=array(np.tile(np.arange(T, dtype=np.int32), (B, 1))),
        source=array([0, 1, 0, 1], np.int32),
        group=array([5, 5, 9, 9], np.int32),
        extras={"rank": array([1, 0, 0, 1], np.int32), **top.extras("fused")},
    )


def rows(batch: Batch, which: Any) -> Batch:
    return jax.tree.map(lambda x: x[which], batch)


def in_heads(stream: Any) -> tuple[Any, Any]:
    """Queries [L B T N H] and keys [L B T 1 H] that somebody may attend with."""
    heads = stream.reshape(*stream.shape[:3], HEADS, -1)
    return heads, heads[..., :1, ::-1]


def apply(pad: int, params: Any, batch: Batch) -> Obs:
    """A model of one layer; `pad` surplus rows of vocabulary, holding garbage."""
    embedded = params["embed"][batch.tokens]
    hidden = jnp.tanh(embedded + 0.1 * batch.positions[..., None])
    kernel = jnp.pad(params["kernel"], ((0, pad), (0, 0)), constant_values=3.0)
    return Obs(
        batch,
        jnp.zeros((), jnp.int32),
        {STUDENT: hidden},
        {STUDENT: Unembedding({"kernel": kernel}, SCALE, CAP, V)},
        {STUDENT: {"stream": jnp.stack([embedded, hidden]), **dict(zip("qk", in_heads(jnp.stack([embedded, hidden])), strict=True))}},
        {"reward": jnp.sum(hidden * batch.loss_mask[..., None], axis=1) @ params["reward"]},
    )


def numpy_world(params: Any, batch: Batch, step: int = STEP) -> SimpleNamespace:
    """The same in float64, with full logits."""
    embedded = params["embed"][batch.tokens]
    hidden = np.tanh(embedded + 0.1 * batch.positions[..., None])
    logits = CAP * np.tanh(SCALE * hidden @ params["kernel"].T / CAP)
    reward = (hidden * batch.loss_mask[..., None].astype(np.float64)).sum(1) @ params["reward"]
    q, k = in_heads(np.stack([embedded, hidden]))
    return SimpleNamespace(b=batch, embedded=embedded, hidden=hidden, logits=logits, reward=reward, step=step, q=q, k=k)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def one_hot(ids: np.ndarray) -> np.ndarray:
    return np.eye(V)[ids]


def mean(values: np.ndarray, mask: np.ndarray) -> float:
    mask = mask.astype(np.float64)
    return float((values * mask).sum() / mask.sum()) if mask.sum() else 0.0


# ------------------------------------------------------------------------- formulas: (student, teacher) -> per token


def n_ce(s: Any, t: Any, smoothing: float = 0.0) -> np.ndarray:
    target = (1 - smoothing) * one_hot(s.b.labels) + smoothing / V
    return -(target * log_softmax(s.logits)).sum(-1)


def n_z(s: Any, t: Any) -> np.ndarray:
    return np.log(np.exp(s.logits).sum(-1)) ** 2


def n_forward(s: Any, t: Any, temperature: float = 1.0, factor: float = 1.0) -> np.ndarray:
    p, q = log_softmax(t.logits / temperature), log_softmax(s.logits / temperature)
    return factor * (np.exp(p) * (p - q)).sum(-1)


def n_reverse(s: Any, t: Any, temperature: float) -> np.ndarray:
    return n_forward(t, s, temperature, temperature**2)


def n_top_k(s: Any, t: Any, tail: str) -> np.ndarray:
    out = np.zeros((s.b.tokens.shape[0], T))
    log_q = log_softmax(s.logits)
    for i, j in np.ndindex(out.shape):
        target = np.zeros(V)
        for token, logp in zip(s.b.extras["fused/ids"][i, j], s.b.extras["fused/logp"][i, j].astype(np.float64), strict=True):
            target[token] += np.exp(logp)
        if tail == "renormalise":
            target /= target.sum()
        if tail == "uniform":
            target[target == 0] = s.b.extras["fused/tail"][i, j] / (target == 0).sum()
        out[i, j] = -(target * log_q[i, j]).sum()
    return out


def n_events(s: Any, t: Any, tail: str, f: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Sum of f(p, q) over events: V tokens, or for tail 'rest' the named ones and all others together."""
    out = np.zeros((s.b.tokens.shape[0], T))
    q_all = np.exp(log_softmax(s.logits))
    for i, j in np.ndindex(out.shape):
        named = {}
        for token, logp in zip(s.b.extras["fused/ids"][i, j], s.b.extras["fused/logp"][i, j].astype(np.float64), strict=True):
            if np.isfinite(logp):
                named[token] = named.get(token, 0.0) + np.exp(logp)
        others = [v for v in range(V) if v not in named]
        left = float(s.b.extras["fused/tail"][i, j])
        if tail == "rest":
            p, q = [*named.values(), left], [*(q_all[i, j, v] for v in named), q_all[i, j, others].sum()]
        else:
            p = [*named.values(), *(left / len(others) for _ in others)]
            q = [q_all[i, j, v] for v in (*named, *others)]
        out[i, j] = f(np.array(p), np.array(q)).sum()
    return out


def n_dense(s: Any, t: Any, f: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    return f(np.exp(log_softmax(t.logits)), np.exp(log_softmax(s.logits))).sum(-1)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return p * np.log(p / q)


def back(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return kl(q, p)


def js(p: np.ndarray, q: np.ndarray, beta: float = 0.3) -> np.ndarray:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return abs(p - q) / 2


def n_cosine(s: Any, t: Any) -> np.ndarray:
    a, b = s.embedded, t.hidden
    return 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


ATTENTION = [(0, 1), (1, 1)]


def n_attention(s: Any, t: Any) -> np.ndarray:
    """KL of each query's attention, the mean over pairs of layers and over heads, document by document."""
    out = np.zeros((s.b.tokens.shape[0], T))
    for i, j in np.ndindex(out.shape):
        seen = np.flatnonzero(s.b.segment_ids[i, : j + 1] == s.b.segment_ids[i, j])
        for ours, theirs in ATTENTION:
            for head in range(HEADS):
                a, b = (world.q[at][i, j, head] @ world.k[at][i, seen, 0].T / np.sqrt(D / HEADS) for world, at in ((s, ours), (t, theirs)))
                out[i, j] += kl(np.exp(log_softmax(b)), np.exp(log_softmax(a))).sum() / HEADS / len(ATTENTION)
    return out


def n_ranking(s: Any, t: Any) -> float:
    groups = []
    real = s.b.loss_mask.any(1)
    for group in np.unique(s.b.group):
        members = [i for i in np.flatnonzero(s.b.group == group) if real[i]]
        pairs = [(win, lose) for win in members for lose in members if s.b.extras["rank"][win] < s.b.extras["rank"][lose]]
        if pairs:
            groups.append(np.mean([np.log1p(np.exp(s.reward[lose] - s.reward[win])) for win, lose in pairs]))
    return float(np.mean(groups)) if groups else 0.0


# ------------------------------------------------------------------------------------------- the suite


@dataclass(frozen=True)
class Case:
    """One loss: how to build it for a chunk size, and what it is."""

    build: Callable[[int], LossTransform]
    formula: Callable[[Any, Any], float]
    """The whole loss of a batch, from the float64 worlds of student and teacher."""


def per_token(build: Callable[[], Any], formula: Callable[..., np.ndarray], *args: Any) -> Case:
    return Case(lambda chunk: over_vocab(chunk, loss=(1.0, build())), lambda s, t: mean(formula(s, t, *args), s.b.loss_mask))


def ramp(step: Any) -> Any:
    return 0.1 * step


def two(chunk: int) -> LossTransform:
    return over_vocab(chunk, ce=(1.0, tokens.next_token()), z=(ramp, tokens.z_loss()), right=(0.0, tokens.accuracy()))


def n_two(s: Any, t: Any, where: Any = 1.0) -> float:
    return mean(n_ce(s, t), s.b.loss_mask * where) + ramp(s.step) * mean(n_z(s, t), s.b.loss_mask * where)


def from_source(batch: Any, source: int) -> np.ndarray:
    return (batch.source == source)[:, None]


def instruct(chunk: int) -> LossTransform:
    distil = over_vocab(chunk, loss=(1.0, divergences.forward_kl("teacher")))
    return partition("source", text=over_vocab(chunk, ce=(1.0, tokens.next_token())), distil=scale(27.8, distil))


def n_instruct(s: Any, t: Any) -> float:
    text, distil = (s.b.loss_mask * from_source(s.b, source) for source in (0, 1))
    return mean(n_ce(s, t), text) + 27.8 * mean(n_forward(s, t), distil)


def minitron(chunk: int) -> LossTransform:
    alpha = lambda means: means["logits"].value / means["states"].value
    states = sequence.cosine(sequence.states(tap="stream", layer=0), sequence.states("teacher"))
    return total(logits=over_vocab(chunk, loss=(1.0, divergences.forward_kl("teacher"))), states=adaptive(alpha, states, initial=2.0))


CASES: dict[str, Case] = {
    "next_token": per_token(tokens.next_token, n_ce),
    "label_smoothing": per_token(lambda: tokens.next_token(0.2), n_ce, 0.2),
    "z_loss": per_token(tokens.z_loss, n_z),
    "forward_kl": per_token(lambda: divergences.forward_kl("teacher"), n_forward),
    "forward_kl_t2": per_token(lambda: divergences.forward_kl("teacher", 2.0), n_forward, 2.0, 4.0),
    "forward_kl_t2_plain": per_token(lambda: divergences.forward_kl("teacher", 2.0, times_t_squared=False), n_forward, 2.0, 1.0),
    "reverse_kl": per_token(lambda: divergences.reverse_kl("teacher", 1.5), n_reverse, 1.5),
    "soft_ce": per_token(
        lambda: divergences.soft_ce("teacher"), lambda s, t: -(np.exp(log_softmax(t.logits)) * log_softmax(s.logits)).sum(-1)
    ),
    "top_k_drop": per_token(lambda: divergences.soft_ce("fused", "drop"), n_top_k, "drop"),
    "top_k_renormalise": per_token(lambda: divergences.soft_ce("fused"), n_top_k, "renormalise"),
    "top_k_uniform": per_token(lambda: divergences.soft_ce("fused", "uniform"), n_top_k, "uniform"),
    "jensen_shannon": per_token(lambda: divergences.jensen_shannon("teacher", 0.3), n_dense, js),
    "total_variation": per_token(lambda: divergences.total_variation("teacher"), n_dense, variation),
    "top_k_kl_rest": per_token(lambda: divergences.forward_kl("fused", tail="rest"), n_events, "rest", kl),
    "top_k_reverse_rest": per_token(lambda: divergences.reverse_kl("fused"), n_events, "rest", back),
    "top_k_reverse_uniform": per_token(lambda: divergences.reverse_kl("fused", tail="uniform"), n_events, "uniform", back),
    "top_k_jensen_shannon": per_token(lambda: divergences.jensen_shannon("fused", 0.3), n_events, "rest", js),
    "top_k_total_variation": per_token(lambda: divergences.total_variation("fused"), n_events, "rest", variation),
    "optax_ids": per_token(lambda: tokens.from_optax(optax.losses.softmax_cross_entropy_with_integer_labels), n_ce),
    "optax_one_hot": per_token(lambda: tokens.from_optax(optax.losses.softmax_cross_entropy, one_hot=True), n_ce),
    "mse": Case(
        lambda chunk: sequence.mse(sequence.states(tap="stream", layer=0), sequence.states("teacher")),
        lambda s, t: mean(((s.embedded - t.hidden) ** 2).mean(-1), s.b.loss_mask),
    ),
    "cosine": Case(
        lambda chunk: sequence.cosine(sequence.states(tap="stream", layer=0), sequence.states("teacher")),
        lambda s, t: mean(n_cosine(s, t), s.b.loss_mask),
    ),
    "attention_kl": Case(lambda chunk: sequence.attention_kl(ATTENTION, "teacher"), lambda s, t: mean(n_attention(s, t), s.b.loss_mask)),
    "pairwise_ranking": Case(lambda chunk: sequence.pairwise_ranking(), n_ranking),
    "pretrain": Case(two, n_two),
    "total_scale": Case(
        lambda chunk: total(text=scale(ramp, two(chunk)), rank=scale(2.0, sequence.pairwise_ranking())),
        lambda s, t: ramp(s.step) * n_two(s, t) + 2.0 * n_ranking(s, t),
    ),
    "masked": Case(
        lambda chunk: masked(two(chunk), lambda batch: batch.positions % 2 == 0), lambda s, t: n_two(s, t, s.b.positions % 2 == 0)
    ),
    "partition": Case(instruct, n_instruct),
    "two_branches": Case(
        lambda chunk: partition("source", a=two(chunk), b=two(chunk)),
        lambda s, t: n_two(s, t, from_source(s.b, 0)) + n_two(s, t, from_source(s.b, 1)),
    ),
    "minitron": Case(minitron, lambda s, t: mean(n_forward(s, t), s.b.loss_mask) + 2.0 * mean(n_cosine(s, t), s.b.loss_mask)),
    "partition_of_all": Case(
        lambda chunk: partition("source", all=((0, 1), minitron(chunk)), nobody=(7, two(chunk))),
        lambda s, t: CASES["minitron"].formula(s, t),
    ),
}
LOSSES = {name: case.build(3) for name, case in CASES.items()}

PARAMS, TEACHER, BATCH = make_params(1), make_params(2), make_batch()
PARAMS32, TEACHER32 = (jax.tree.map(lambda x: x.astype(np.float32), p) for p in (PARAMS, TEACHER))
EMPTY = BATCH.replace(loss_mask=np.zeros((B, T), np.float32))
PADDED = BATCH.replace(loss_mask=BATCH.loss_mask * np.array([[1.0], [1.0], [0.0], [0.0]], np.float32))
HALVES = rows(BATCH, slice(0, 2)), rows(BATCH, slice(2, 4))
RESULTS: dict[Any, Any] = {}


@dataclass(frozen=True)
class Variant:
    """How the pass is cut, and the surplus rows of its head; one compiled program holds every loss."""

    chunk: int
    pad: int


THREES, WHOLE = Variant(3, 0), Variant(100, 5)
"""Two programs, because compiling is what these tests spend their time on: four rows in chunks that leave a remainder; and two
rows, half a batch, in one chunk under a padded vocabulary."""


@cache
def program(variant: Variant) -> Any:
    """jitted (batch, weights) -> {case: (scalar, means, state, gradient, gradient to the teacher)}."""
    losses = {name: case.build(variant.chunk) for name, case in CASES.items()}
    look = lambda params, batch: apply(variant.pad, params, batch).replace(step=jnp.int32(STEP))

    def one(loss: LossTransform, batch: Batch, weights: Any) -> Any:
        def f(params: Any, frozen: Any) -> Any:
            obs = teacher(look, "teacher")(frozen, look(params, batch), None)
            state = loss.init(params)
            scalar, means = loss.update(obs, state, weights)
            return scalar, (means, loss.finish(state, means))

        (scalar, (means, state)), (gradient, to_teacher) = jax.value_and_grad(f, (0, 1), has_aux=True)(PARAMS32, {"teacher": TEACHER32})
        return SimpleNamespace(scalar=scalar, means=means, state=state, gradient=gradient, to_teacher=to_teacher).__dict__

    return jax.jit(lambda batch, weights: {name: one(loss, batch, weights[name]) for name, loss in losses.items()})


@jax.jit
def weigh(batch: Batch) -> Any:
    return {name: loss.weigh(batch) for name, loss in LOSSES.items()}


def run(name: str, batch: Batch = BATCH, whole: Batch | None = None, variant: Variant = THREES) -> SimpleNamespace:
    """One loss on a batch, divided by the weights of the `whole` step's batch; params count as constants of the program."""
    key = (id(batch), id(whole), variant)
    if key not in RESULTS:
        RESULTS[key] = (batch, whole, program(variant)(batch, weigh(batch if whole is None else whole)))
    return SimpleNamespace(**RESULTS[key][-1][name])


def assert_same(a: Any, b: Any, tolerance: float = 2e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=20 * tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("name", CASES)
def test_chunked_equals_dense(name: str) -> None:
    """Value, and gradient in every direction, for two chunk sizes, with a soft-capped and scaled head, and with padded vocabulary."""
    rng = np.random.default_rng(0)
    for variant, batch in ((THREES, BATCH), (WHOLE, HALVES[0])):
        got = run(name, batch, variant=variant)
        world = lambda params, b=batch: numpy_world(params, b)
        dense = lambda params, world=world: CASES[name].formula(world(params), world(TEACHER))
        np.testing.assert_allclose(got.scalar, dense(PARAMS), rtol=5e-6, atol=5e-7)
        for _ in range(3):
            direction = jax.tree.map(lambda x: rng.normal(size=x.shape), PARAMS)
            moved = lambda step, direction=direction: jax.tree.map(lambda x, d: x + step * d, PARAMS, direction)
            slope = (dense(moved(1e-5)) - dense(moved(-1e-5))) / 2e-5
            ours = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), got.gradient, direction)))
            np.testing.assert_allclose(ours, slope, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_padded_rows_change_nothing(name: str) -> None:
    """Two rows without loss_mask, whatever else they hold, against the batch without them."""
    with_rows, without = run(name, PADDED), run(name, HALVES[0], variant=WHOLE)
    assert_same((with_rows.scalar, with_rows.gradient, with_rows.means), (without.scalar, without.gradient, without.means))


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_add_up(name: str) -> None:
    """Scalars, gradients, Means and the state after the step: two halves (groups whole) under the whole's weights equal the whole."""
    loss, whole = LOSSES[name], run(name)
    parts = [run(name, half, whole=BATCH, variant=WHOLE) for half in HALVES]
    add = lambda a, b: jax.tree.map(np.add, a, b)
    assert_same(add(parts[0].scalar, parts[1].scalar), whole.scalar)
    assert_same(add(parts[0].gradient, parts[1].gradient), whole.gradient)
    means = {key: parts[0].means[key] + parts[1].means[key] for key in whole.means}
    assert_same(means, whole.means)
    assert_same(loss.finish(loss.init(PARAMS32), means), whole.state)
    assert_same(add(weigh(HALVES[0])[name], weigh(HALVES[1])[name]), weigh(BATCH)[name])


@pytest.mark.parametrize("name", CASES)
def test_empty_mask_is_exactly_zero(name: str) -> None:
    empty = run(name, EMPTY)
    assert empty.scalar == 0.0
    assert all(np.all(np.asarray(g) == 0.0) for g in jax.tree.leaves(empty.gradient))
    assert all(m.value == 0.0 for m in empty.means.values())
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(empty.state))


@pytest.mark.parametrize("name", CASES)
def test_float32_and_nothing_for_the_teacher(name: str) -> None:
    got = run(name)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((got.scalar, got.means, got.state)))
    assert all(np.all(np.asarray(g) == 0.0) for g in jax.tree.leaves(got.to_teacher))
    assert any(np.any(np.asarray(g) != 0.0) for g in jax.tree.leaves(got.gradient))


def test_no_recompile() -> None:
    """Other values in the same shapes compile nothing, and change every loss."""
    first = {name: run(name).scalar for name in CASES}
    compiled = program(THREES)._cache_size()
    other = make_batch(1)
    for name in CASES:
        assert run(name, other).scalar != first[name]
    assert program(THREES)._cache_size() == compiled


@pytest.mark.parametrize("name", CASES)
def test_names_and_weights(name: str) -> None:
    """Each leaf reports a Mean under the name of its weight, and with that weight; no term hides another."""
    weights, means = weigh(BATCH)[name], run(name).means
    assert set(weights) <= set(means)
    for key, weight in weights.items():
        np.testing.assert_allclose(means[key].weight, weight, rtol=1e-6)


def test_the_law_suite_can_fail() -> None:
    """A mean of micro-batch means, the mistake that weights prevent, differs by far more than the tolerance."""
    wrong = np.mean([run("next_token", half, variant=WHOLE).scalar for half in HALVES])
    assert abs(wrong - run("next_token").scalar) > 1e-4
