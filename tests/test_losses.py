"""What single losses promise beyond the laws, the work that a pass does, and how it lies on a mesh."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parent))
import hlo

from jaxllm import sharding
from jaxllm.config import ConfigError, MeshConfig
from jaxllm.contract import STUDENT, Batch, Mean, Obs, Unembedding, dot_in
from jaxllm.losses import vocab
from jaxllm.losses.annotate import chain, teacher
from jaxllm.losses.core import adaptive, as_loss_fn, masked, partition, scale, total
from jaxllm.losses.sequence import cosine, mse, pairwise_ranking, states
from jaxllm.losses.tokens import TopK, accuracy, forward_kl, next_token, reverse_kl, soft_ce, z_loss
from jaxllm.losses.vocab import View, over_vocab

FAST = {"xla_backend_optimization_level": 0}


def batch_of(labels: Any, mask: Any = None, **changes: Any) -> Batch:
    labels = jnp.asarray(labels)
    ones = jnp.ones(labels.shape, jnp.int32)
    return Batch(labels, labels, jnp.ones(labels.shape) if mask is None else jnp.asarray(mask, jnp.float32), ones, ones).replace(**changes)


def random_batch(rng: np.random.Generator, rows: int, length: int, num_vocab: int, **changes: Any) -> Batch:
    mask = (rng.random((rows, length)) < 0.7).astype(np.float32)
    mask[0, 0] = 1.0
    return batch_of(rng.integers(0, num_vocab, (rows, length)), mask, **changes)


def observe(logits: Any, batch: Batch | None = None, **others: Any) -> Obs:
    """A model whose hidden states are its logits: the unembedding is the identity. `others` are teachers' logits."""
    logits = {STUDENT: logits, **others}
    heads = {name: Unembedding({"kernel": jnp.eye(x.shape[-1])}, num_vocab=x.shape[-1]) for name, x in logits.items()}
    hidden = {name: jnp.asarray(x, jnp.float32) for name, x in logits.items()}
    return Obs(batch_of(jnp.zeros(logits[STUDENT].shape[:2], int)) if batch is None else batch, jnp.int32(0), hidden, heads)


def value(loss: Any, obs: Obs, params: Any = None) -> jax.Array:
    f = lambda obs: loss.update(obs, loss.init(params), loss.weigh(obs.batch))[0]
    return jax.jit(f)(obs)


def on_logits(term: Any, logits: Any, batch: Batch | None = None, **others: Any) -> tuple[jax.Array, jax.Array]:
    """Value, and gradient with respect to logits."""
    f = lambda x: value(over_vocab(loss=(1.0, term)), observe(x, batch, **others))
    return jax.jit(jax.value_and_grad(f), compiler_options=FAST)(jnp.asarray(logits, jnp.float32))


# --------------------------------------------------------------------------------------- token losses


def test_z_loss_gradient_is_palms() -> None:
    """d/d logits = p (1 + 2e-4 log Z) - onehot; shifting all logits moves only the z term."""
    rng = np.random.default_rng(0)
    logits, batch = rng.normal(size=(2, 3, 5)) * 3, random_batch(rng, 2, 3, 5)
    pretrain = over_vocab(ce=(1.0, next_token()), z=(1e-4, z_loss()))
    gradient = jax.jit(jax.grad(lambda x: value(pretrain, observe(x, batch))))(jnp.asarray(logits, jnp.float32))
    z = np.log(np.exp(logits).sum(-1))[..., None]
    oracle = np.exp(logits - z) * (1 + 2e-4 * z) - np.eye(5)[np.asarray(batch.labels)]
    mask = np.asarray(batch.loss_mask)[..., None]
    np.testing.assert_allclose(gradient, oracle * mask / mask.sum(), atol=2e-7)
    ce = lambda x: on_logits(next_token(), x, batch)[0]
    np.testing.assert_allclose(ce(logits + 4.0), ce(logits), rtol=2e-6)
    assert abs(on_logits(z_loss(), logits + 4.0, batch)[0] - on_logits(z_loss(), logits, batch)[0]) > 1.0


def test_label_smoothing_is_optax() -> None:
    rng = np.random.default_rng(1)
    logits, batch = rng.normal(size=(2, 4, 6)), random_batch(rng, 2, 4, 6)

    def reference(x: jax.Array) -> jax.Array:
        targets = optax.losses.smooth_labels(jax.nn.one_hot(batch.labels, 6), 0.1)
        return jnp.sum(optax.losses.softmax_cross_entropy(x, targets) * batch.loss_mask) / batch.loss_mask.sum()

    ours = on_logits(next_token(0.1), logits, batch)
    theirs = jax.jit(jax.value_and_grad(reference))(jnp.asarray(logits, jnp.float32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), ours, theirs)


def test_kl_direction() -> None:
    """p_T = (.5, .5), p_S = (.9, .1): forward 0.510826, reverse 0.368064."""
    ours, theirs = np.log([[[0.9, 0.1]]]), np.log([[[0.5, 0.5]]])
    np.testing.assert_allclose(on_logits(forward_kl("t"), ours, t=theirs)[0], 0.510826, atol=1e-6)
    np.testing.assert_allclose(on_logits(reverse_kl("t"), ours, t=theirs)[0], 0.368064, atol=1e-6)


@pytest.mark.parametrize("kl", [forward_kl, reverse_kl])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_kl_is_zero_iff_equal(kl: Any, temperature: float) -> None:
    """Zero with zero gradient for equal models (up to a shift of logits), positive for any others; t^2 is exactly the factor."""
    theirs = np.random.default_rng(2).normal(size=(1, 3, 5))
    same, gradient = on_logits(kl("t", temperature), theirs + 2.0, t=theirs)
    np.testing.assert_allclose(same, 0.0, atol=2e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=2e-6)
    other = theirs + np.random.default_rng(3).normal(size=theirs.shape)
    with_factor, plain = (on_logits(kl("t", temperature, times_t_squared=f), other, t=theirs)[0] for f in (True, False))
    assert plain > 1e-2
    np.testing.assert_allclose(with_factor, plain * temperature**2, rtol=1e-6)


def test_soft_ce_is_kl_plus_entropy() -> None:
    rng = np.random.default_rng(4)
    ours, theirs = rng.normal(size=(2, 2, 3, 6))
    p = np.exp(theirs) / np.exp(theirs).sum(-1, keepdims=True)
    (ce, ce_gradient), (kl, kl_gradient) = on_logits(soft_ce("t"), ours, t=theirs), on_logits(forward_kl("t"), ours, t=theirs)
    np.testing.assert_allclose(ce - kl, -(p * np.log(p)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(ce_gradient, kl_gradient, atol=1e-7)


@pytest.mark.parametrize("tail", ["drop", "renormalise", "uniform"])
def test_top_k_of_everything_is_the_dense_teacher(tail: Any) -> None:
    """k = V leaves no tail to choose about, in any order of ids."""
    rng = np.random.default_rng(5)
    ours, theirs = rng.normal(size=(2, 2, 3, 6))
    logp = theirs - np.log(np.exp(theirs).sum(-1, keepdims=True))
    ids = np.argsort(-logp, axis=-1)
    top = TopK(ids.astype(np.int32), np.take_along_axis(logp, ids, -1), np.zeros((2, 3)))
    batch = batch_of(np.zeros((2, 3), int), extras=jax.tree.map(jnp.asarray, top.extras("t")))
    sparse, dense = on_logits(soft_ce("t", tail), ours, batch), on_logits(soft_ce("t"), ours, t=theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), sparse, dense)


def test_top_k_one_hot_is_next_token_and_equal_ids_add_up() -> None:
    """FuseLLM's rejected rows are one-hot labels; two entries of one id are their sum; a row without entries says nothing."""
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(1, 3, 5))
    labels = np.array([[1, 4, 0]])
    top = TopK(np.repeat(labels[..., None], 2, -1).astype(np.int32), np.log(np.full((1, 3, 2), 0.5)), np.zeros((1, 3)))
    batch = batch_of(labels, extras=jax.tree.map(jnp.asarray, top.extras("fused")))
    ours, plain = on_logits(soft_ce("fused"), logits, batch), on_logits(next_token(), logits, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), ours, plain)
    nothing = top._replace(logp=np.full((1, 3, 2), -np.inf))
    batch = batch_of(labels, extras=jax.tree.map(jnp.asarray, nothing.extras("fused")))
    empty, gradient = on_logits(soft_ce("fused"), logits, batch)
    assert empty == 0.0
    assert np.all(np.asarray(gradient) == 0.0)


def test_metrics_are_measured_and_not_trained() -> None:
    logits = np.log([[[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]])
    obs = observe(logits, batch_of([[0, 2]]))
    loss = over_vocab(right=(0.0, accuracy()), log_z=(0.0, View.log_z))
    scalar, means = loss.update(obs, (), loss.weigh(obs.batch))
    assert scalar == 0.0
    assert means["right"].value == 0.5
    np.testing.assert_allclose(means["log_z"].value, 0.0, atol=1e-6)


@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 3), length=st.integers(1, 9), chunk=st.integers(1, 10), seed=st.integers(0, 99))
def test_any_chunk_of_any_length(rows: int, length: int, chunk: int, seed: int) -> None:
    """The pass is a sum over positions, however it is cut."""
    rng = np.random.default_rng(seed)
    batch = random_batch(rng, rows, length, 5)
    hidden, kernel = jnp.asarray(rng.normal(size=(rows, length, 4))), jnp.asarray(rng.normal(size=(5, 4)))

    def f(chunk: int, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        loss = over_vocab(chunk, ce=(1.0, next_token()), z=(0.1, z_loss()))
        return value(loss, Obs(batch, jnp.int32(0), {STUDENT: hidden}, {STUDENT: Unembedding({"kernel": kernel}, num_vocab=5)}))

    got = jax.jit(jax.value_and_grad(f, (1, 2)), static_argnums=0, compiler_options=FAST)(chunk, hidden, kernel)
    logits, mask = np.asarray(hidden) @ np.asarray(kernel).T, np.asarray(batch.loss_mask) / np.asarray(batch.loss_mask).sum()
    z = np.log(np.exp(logits).sum(-1, keepdims=True))
    one_hot = np.eye(5)[np.asarray(batch.labels)]
    np.testing.assert_allclose(got[0], np.sum(((z - (one_hot * logits).sum(-1, keepdims=True) + 0.1 * z**2)[..., 0]) * mask), rtol=1e-5)
    d_logits = (np.exp(logits - z) * (1 + 0.2 * z) - one_hot) * mask[..., None]
    np.testing.assert_allclose(got[1][0], d_logits @ kernel, atol=2e-6)
    np.testing.assert_allclose(got[1][1], np.einsum("BTV,BTD->VD", d_logits, hidden), atol=5e-6)


# ------------------------------------------------------------------------------- the work of the pass


def matmuls(wrt: tuple[str, ...], term: tuple[Any, Any] = (1.0, next_token())) -> int:
    """Matmuls per chunk of a pass whose gradient is taken with respect to `wrt`."""
    params = {"hidden": jnp.ones((2, 8, 4)), "kernel": jnp.ones((6, 4))}

    def f(trained: Any) -> jax.Array:
        p = params | trained
        obs = Obs(
            batch_of(jnp.zeros((2, 8), int)),
            jnp.int32(0),
            {STUDENT: p["hidden"]},
            {STUDENT: Unembedding({"kernel": p["kernel"]}, num_vocab=6)},
        )
        loss = over_vocab(2, loss=term)
        return loss.update(obs, (), loss.weigh(obs.batch))[0]

    trained = {name: params[name] for name in wrt}
    return str(jax.make_jaxpr(jax.grad(f) if wrt else f)(trained)).count("dot_general[")


def test_only_the_matmuls_that_are_wanted() -> None:
    """Logits, d hidden, d unembedding: three for training, two under a frozen head, one for an evaluation or a metric."""
    assert matmuls(("hidden", "kernel")) == 3
    assert matmuls(("hidden",)) == 2
    assert matmuls(("kernel",)) == 2
    assert matmuls(()) == 1
    assert matmuls(("hidden", "kernel"), (0.0, accuracy())) == 1


def lora_dot(name: str, spec: str, x: jax.Array, leaves: Any) -> jax.Array:
    return jnp.einsum(spec, x, leaves["kernel"]) + x @ leaves["a"] @ leaves["b"]


def test_any_dot_may_be_the_head() -> None:
    """LoRA on the head, with a frozen kernel: its factors get the gradient of the dense formula, the kernel none."""
    rng = np.random.default_rng(7)
    hidden, batch = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32), random_batch(rng, 2, 5, 6)
    kernel = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    factors = {"a": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32), "b": jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)}

    def ours(trained: Any) -> jax.Array:
        head = Unembedding({"kernel": kernel, "a": trained["a"], "b": trained["b"]}, 0.5, 3.0, 6, lora_dot)
        return value(over_vocab(2, loss=(1.0, next_token())), Obs(batch, jnp.int32(0), {STUDENT: trained["hidden"]}, {STUDENT: head}))

    def dense(trained: Any) -> jax.Array:
        logits = 3.0 * jnp.tanh(0.5 * (trained["hidden"] @ (kernel.T + trained["a"] @ trained["b"])) / 3.0)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.labels[..., None], -1)[..., 0]
        return -jnp.sum(picked * batch.loss_mask) / batch.loss_mask.sum()

    both = (jax.jit(jax.value_and_grad(f))({"hidden": hidden, **factors}) for f in (ours, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *both)


def test_bfloat16_gradients_add_up_in_float32() -> None:
    """256 chunks of a bf16 model: the sum is as exact as one of them. A bf16 running sum would lose 1/256 terms altogether."""
    length = 256
    hidden, kernel = jnp.ones((1, length, 2), jnp.bfloat16), jnp.zeros((4, 2), jnp.bfloat16)

    def f(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        head = Unembedding({"kernel": kernel}, num_vocab=4, dot=dot_in("bfloat16"))
        return value(
            over_vocab(1, loss=(1.0, next_token())),
            Obs(batch_of(jnp.zeros((1, length), int)), jnp.int32(0), {STUDENT: hidden}, {STUDENT: head}),
        )

    scalar, (d_hidden, d_kernel) = jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, kernel)
    assert (scalar.dtype, d_hidden.dtype, d_kernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(scalar, np.log(4), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(d_kernel, np.float32)[:, 0], np.array([-0.75, 0.25, 0.25, 0.25]), rtol=2**-8)


# ------------------------------------------------------------------------------------------- ranking


def rank(scores: Any, group: Any, order: Any = None, mask: Any = None) -> tuple[Any, Any, Any]:
    """(loss, d scores, means)."""
    scores = jnp.asarray(scores, jnp.float32)
    extras = {} if order is None else {"rank": jnp.asarray(order)}
    batch = batch_of(jnp.zeros((scores.shape[0], 2), int), None if mask is None else np.repeat(np.asarray(mask)[:, None], 2, 1))
    batch = batch.replace(group=jnp.asarray(group), extras=extras)
    loss = pairwise_ranking()
    f = lambda s: loss.update(Obs(batch, jnp.int32(0), scores={"reward": s}), (), loss.weigh(batch))
    (scalar, means), gradient = jax.jit(jax.value_and_grad(f, has_aux=True), compiler_options=FAST)(scores)
    return scalar, gradient, means


def test_ranking_equals_a_loop_over_pairs() -> None:
    """Groups of 4 and 2, interleaved, with a tie and a padded row; every group counts once; rewards' gradients sum to zero."""
    scores = np.array([0.3, -1.0, 0.7, 2.0, 0.1, 5.0, -0.4])
    group, order, mask = [1, 2, 1, 1, 2, 1, 1], [0, 1, 1, 2, 0, 0, 1], [1, 1, 1, 1, 1, 0, 1]
    pairs = {1: [(0, 2), (0, 3), (0, 6), (2, 3), (6, 3)], 2: [(4, 1)]}  # rows 2 and 6 tie, row 5 is padding
    by_group = [np.mean([np.log1p(np.exp(scores[lose] - scores[win])) for win, lose in p]) for p in pairs.values()]
    scalar, gradient, means = rank(scores, group, order, mask)
    np.testing.assert_allclose(scalar, np.mean(by_group), rtol=1e-6)
    for members in ([0, 2, 3, 6], [1, 4]):
        np.testing.assert_allclose(np.sum(np.asarray(gradient)[members]), 0.0, atol=1e-7)
    assert gradient[5] == 0.0
    right = np.mean([np.mean([scores[win] > scores[lose] for win, lose in p]) for p in pairs.values()])
    np.testing.assert_allclose(means["accuracy"].value, right, rtol=1e-6)


def test_ranking_of_equal_rewards_is_log_2_and_shifts_change_nothing() -> None:
    np.testing.assert_allclose(rank(np.zeros(4), [0, 0, 0, 0])[0], np.log(2), rtol=1e-6)
    scores = np.array([0.5, 1.0, -2.0])
    base, moved = rank(scores, [0, 0, 0]), rank(scores + 7.0, [0, 0, 0])
    np.testing.assert_allclose(base[0], moved[0], rtol=1e-5)
    np.testing.assert_allclose(base[1], moved[1], atol=1e-6)


def test_token_scores_are_read_at_the_last_weighed_position() -> None:
    batch = batch_of(jnp.zeros((2, 3), int), [[1, 1, 0], [1, 1, 1]], group=jnp.array([0, 0]))
    scores = jnp.array([[9.0, 2.0, 9.0], [9.0, 9.0, 1.0]])
    got = value(pairwise_ranking(), Obs(batch, jnp.int32(0), scores={"reward": scores}))
    np.testing.assert_allclose(got, np.log1p(np.exp(-1.0)), rtol=1e-6)


# ------------------------------------------------------------------------- combinators and annotators


def test_hidden_state_losses_in_closed_form() -> None:
    batch = batch_of(jnp.zeros((1, 3), int), [[1, 1, 0]])
    ours, theirs = jnp.array([[[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]]), jnp.array([[[3.0, 4.0], [0.0, 2.0], [1.0, 1.0]]])
    obs = Obs(batch, jnp.int32(0), {STUDENT: ours, "t": theirs})
    np.testing.assert_allclose(value(mse(states(), states("t")), obs), (0 + 2.5) / 2)
    np.testing.assert_allclose(value(cosine(states(), states("t")), obs), (0 + 1) / 2, atol=1e-6)
    with pytest.raises(ConfigError, match=r"'teach'.*Obs\.hidden.*student, t"):
        value(mse(states(), states("teach")), obs)


def test_names_come_from_the_keywords() -> None:
    two = over_vocab(ce=(1.0, next_token()), z=(0.1, z_loss()))
    loss = partition("source", ppo=total(pg=over_vocab(loss=(1.0, next_token())), text=two), ptx=scale(27.8, two))
    batch = batch_of(jnp.zeros((2, 3), int), source=jnp.array([0, 1]))
    assert list(loss.weigh(batch)) == ["ppo/pg", "ppo/text/ce", "ppo/text/z", "ptx/ce", "ptx/z"]


def test_adaptive_reads_the_step_before() -> None:
    """Minitron: alpha * L_is equals L_logits of the step before, without a gradient through alpha; names reach outwards."""
    alpha = lambda means: means["logits"].value / means["states"].value
    inner = total(logits=over_vocab(loss=(1.0, forward_kl("t"))), states=adaptive(alpha, mse(states(), states("t"))))
    loss = partition("source", all=inner)
    rng = np.random.default_rng(8)
    obs = observe(rng.normal(size=(2, 3, 4)), batch_of(jnp.zeros((2, 3), int), source=jnp.zeros(2, int)), t=rng.normal(size=(2, 3, 4)))
    weights, state = loss.weigh(obs.batch), loss.init({})
    update = jax.jit(loss.update, compiler_options=FAST)
    first, means = update(obs, state, weights)
    kl, distance = means["all/logits"].value, means["all/states"].value
    np.testing.assert_allclose(first, kl + distance, rtol=1e-6)
    state = loss.finish(state, means)
    np.testing.assert_allclose(update(obs, state, weights)[0], 2 * kl, rtol=1e-6)
    nothing = loss.finish(state, jax.tree.map(jnp.zeros_like, means))
    np.testing.assert_allclose(nothing["all"]["states"]["coefficient"], kl / distance, rtol=1e-6)


def test_masked_by_rows_and_by_positions() -> None:
    rng = np.random.default_rng(9)
    logits, batch = rng.normal(size=(2, 3, 5)), batch_of(rng.integers(0, 5, (2, 3)))
    ce = over_vocab(loss=(1.0, next_token()))
    first_row = value(masked(ce, lambda b: jnp.array([True, False])), observe(logits, batch))
    np.testing.assert_allclose(first_row, value(ce, observe(logits[:1], jax.tree.map(lambda x: x[:1], batch))), rtol=1e-6)
    last = value(masked(ce, lambda b: jnp.arange(3)[None] == jnp.full((2, 1), 2)), observe(logits, batch))
    np.testing.assert_allclose(last, value(ce, observe(logits[:, 2:], jax.tree.map(lambda x: x[:, 2:], batch))), rtol=1e-6)


def test_annotators_run_in_order_with_keys_of_their_own() -> None:
    seen = []

    def note(frozen: Any, obs: Obs, key: Any) -> Obs:
        seen.append((sorted(obs.hidden), None if key is None else tuple(jax.random.key_data(key).tolist())))
        return obs

    look = lambda params, batch: observe(params["x"], batch).replace(scores={"value": jnp.ones(1)}, taps={STUDENT: {"mid": jnp.ones(1)}})
    both = chain(note, teacher(look, "t"), note)
    obs = both({"t": {"x": np.zeros((1, 1, 2))}}, observe(np.ones((1, 1, 2))), jax.random.key(0))
    assert [names for names, _ in seen] == [["student"], ["student", "t"]]
    assert seen[0][1] != seen[1][1]
    through = lambda x: both({"t": {"x": x}}, observe(np.ones((1, 1, 2))), None).hidden["t"].sum()
    assert np.all(np.asarray(jax.grad(through)(jnp.ones((1, 1, 2)))) == 0.0)
    assert set(obs.scores) == {"t/value"}
    assert set(obs.taps) == {"t"}
    with pytest.raises(ConfigError, match="teacher 'big' has no params; frozen has bag; did you mean 'bag'"):
        teacher(look, "big")({"bag": {}}, obs, None)


def test_whoever_has_a_loop_of_their_own() -> None:
    """`as_loss_fn` with value_and_grad and optax learns the labels; schedules see the step, state comes back."""
    batch = batch_of(jnp.array([[0, 1, 2]]))
    look = lambda params, batch: observe(params["logits"], batch)
    loss_fn = as_loss_fn(look, scale(lambda step: 1.0 + step, over_vocab(ce=(1.0, next_token()))))
    params, optimizer = {"logits": jnp.zeros((1, 3, 4))}, optax.adam(0.3)
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=FAST)
    (start, (means, state)), _ = step(params, {}, batch, (), step=2)
    np.testing.assert_allclose(start, 3 * np.log(4), rtol=1e-6)
    np.testing.assert_allclose(means["ce"].value, np.log(4), rtol=1e-6)
    opt_state = optimizer.init(params)
    for _ in range(20):
        (scalar, (means, state)), gradient = step(params, {}, batch, state, step=0)
        updates, opt_state = optimizer.update(gradient, opt_state)
        params = optax.apply_updates(params, updates)
    assert scalar < 0.1


def test_clear_errors() -> None:
    obs = observe(np.zeros((1, 2, 4)), t=np.zeros((1, 2, 4)), small=np.zeros((1, 2, 3)))
    cases = [
        (lambda: over_vocab(), "no terms.*a chunk of at least 1"),
        (lambda: over_vocab(0, ce=(1.0, next_token())), "chunk=0"),
        (lambda: next_token(1.0), r"label_smoothing is 1.0; it must be in \[0, 1\)"),
        (lambda: forward_kl("t", 0.0), "temperature is 0.0"),
        (lambda: soft_ce("t", "renormalize"), "renormalize.*did you mean 'renormalise'"),
        (lambda: value(over_vocab(kl=(1.0, forward_kl("tt"))), obs), "'tt' in Obs.unembeddings.*did you mean 't'.*teacher"),
        (lambda: value(over_vocab(kl=(1.0, forward_kl("small"))), obs), "vocabulary of 3 and the student of 4.*TopK"),
        (lambda: value(partition("source", a=over_vocab(ce=(1.0, next_token()))), obs), "'source' in Batch"),
        (lambda: partition("source", a=(0, pairwise_ranking()), b=pairwise_ranking()), "branch 'b' has no row numbers"),
        (lambda: value(pairwise_ranking(), obs), "Batch.group"),
        (lambda: value(pairwise_ranking("score"), obs.replace(batch=obs.batch.replace(group=jnp.zeros(1)))), "'score' in Obs.scores"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()


# ------------------------------------------------------------------------------------------ on a mesh

ROWS, LENGTH, WIDTH, LOGICAL, PADDED = 8, 12, 16, 77, 80


def mesh_world(lora: bool) -> tuple[Any, Any, Any]:
    """Params, frozen teacher and batch; kernels padded from LOGICAL to PADDED rows, with LoRA factors beside them or not."""
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    head = {"kernel": (PADDED, WIDTH)} | ({"a": (WIDTH, 2), "b": (2, PADDED)} if lora else {})
    model = lambda: {"hidden": array(ROWS, LENGTH, WIDTH), "unembed": {name: array(*shape) for name, shape in head.items()}}
    params, frozen = model(), {"t": model()}
    top = TopK(rng.integers(0, LOGICAL, (ROWS, LENGTH, 3)), -1.5 - rng.random((ROWS, LENGTH, 3)), rng.random((ROWS, LENGTH)))
    return params, frozen, random_batch(rng, ROWS, LENGTH, LOGICAL, extras=jax.tree.map(jnp.asarray, top.extras("top")))


def mesh_loss(dot: Any = dot_in("float32"), **more: Any) -> Any:
    """Every way in which a token loss meets the vocabulary."""
    kl, top = (0.5, forward_kl("t", 2.0)), (0.3, soft_ce("top", "uniform"))
    loss = over_vocab(4, ce=(1.0, next_token(0.1)), z=(1e-2, z_loss()), kl=kl, top=top, right=(0.0, accuracy()), **more)
    look = lambda p, b: Obs(b, jnp.int32(0), {STUDENT: p["hidden"]}, {STUDENT: Unembedding(p["unembed"], 0.7, 5.0, LOGICAL, dot)})
    loss_fn = as_loss_fn(look, loss, [teacher(look, "t")])
    return jax.value_and_grad(lambda p, frozen, b: loss_fn(p, frozen, b, ())[0])


@cache
def one_device(dot: Any = dot_in("float32")) -> Any:
    return jax.jit(mesh_loss(dot), compiler_options=FAST)(*mesh_world(dot is lora_dot))


def on_mesh(shape: tuple[int, int, int], f: Any, lora: bool = False) -> tuple[Any, list[hlo.Collective]]:
    """Value and gradients, and what the program communicates."""
    mesh = sharding.make_mesh(MeshConfig(*shape))
    params, frozen, batch = mesh_world(lora)
    layout = {"hidden": P(("slice", "data"), None, "model"), "kernel": P("model", "data"), "a": P(), "b": P()}
    place = jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, layout[path[-1].key]), params)
    with jax.set_mesh(mesh):
        args = jax.device_put((params, frozen, batch), (place, {"t": place}, sharding.batch_sharding(mesh)))
        program = jax.jit(f, out_shardings=(None, place), compiler_options=FAST).lower(*args).compile()
        return program(*args), hlo.collectives(str(program.as_text()), mesh.shape)


def complaints(found: list[hlo.Collective], models: int) -> list[str]:
    """What the vocabulary pass must not communicate."""
    gathers = hlo.select(found, "all-gather", "all-to-all", axis="model")
    wrong = [f"the vocabulary is gathered over model: {c}" for c in gathers if any({PADDED, LOGICAL} & set(a.shape) for a in c.results)]
    for axis in ("data", "slice"):
        wrong += [f"traffic over {axis} inside the chunk loop: {c}" for c in hlo.select(found, axis=axis, in_loop=True)]
        kernel = PADDED * WIDTH // models
        whole = [a for c in hlo.select(found, "all-gather", axis=axis) for a in c.results if a.size >= kernel]
        if len(whole) > 2:  # the student's and the teacher's
            wrong.append(f"{len(whole)} gathers of an unembedding over {axis}")
        reduced = [a for c in hlo.select(found, "all-reduce", "reduce-scatter", axis=axis) for a in c.operands if a.size > 64]
        if len(reduced) > 1:
            wrong.append(f"{len(reduced)} gradient reductions over {axis}")
    return wrong


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8), (2, 2, 2)])
def test_sharded_equals_one_device_with_the_least_traffic(shape: tuple[int, int, int], capfd: Any) -> None:
    """No gather over `model` of unembedding or logits; over `data` one gather per unembedding and one reduction, none per chunk."""
    result, found = on_mesh(shape, mesh_loss())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6 * float(jnp.abs(b).max())), result, one_device())
    assert complaints(found, shape[2]) == []
    assert len(hlo.select(found, "reduce-scatter", axis="data")) == (shape[1] > 1)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_bfloat16_on_a_mesh() -> None:
    """Equal to one device, and every sum over data shards is float32: a bf16 one would abort XLA:CPU."""
    result, found = on_mesh((2, 2, 2), mesh_loss(dot_in("bfloat16")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max())), result, one_device(dot_in("bfloat16")))
    assert complaints(found, 2) == []
    assert {a.dtype for c in hlo.select(found, "all-reduce", "reduce-scatter", axis="data") for a in c.operands} == {"f32"}


def test_any_dot_on_a_mesh() -> None:
    """LoRA on the head: each of its leaves is reduced once, after the loop, by the pass's own derivative of that `dot`."""
    result, found = on_mesh((1, 4, 2), mesh_loss(lora_dot), lora=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6 * float(jnp.abs(b).max())), result, one_device(lora_dot))
    assert hlo.select(found, axis="data", in_loop=True) == []


def test_a_token_loss_that_looks_at_the_whole_vocabulary_is_caught() -> None:
    whole = lambda view: jnp.max(jnp.sort(sharding.constrain(view.logits(), "B T .")[..., :LOGICAL], axis=-1), axis=-1)
    _, found = on_mesh((1, 2, 4), mesh_loss(most=(0.1, whole)))
    assert any("gathered over model" in line for line in complaints(found, 4))


def test_a_pass_left_to_the_partitioner_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab, "_on_mesh", vocab._chunks)
    _, found = on_mesh((1, 4, 2), mesh_loss())
    assert any("inside the chunk loop" in line for line in complaints(found, 2))


def test_means_add_up() -> None:
    assert (Mean(jnp.float32(3), jnp.float32(2)) + Mean(jnp.float32(1), jnp.float32(2))).value == 1.0
