"""What single losses, combinators and annotators promise beyond the laws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.config import ConfigError
from jaxllm.contract import STUDENT, Mean, Obs
from jaxllm.losses.annotate import chain, teacher
from jaxllm.losses.core import adaptive, as_loss_fn, masked, partition, scale, total
from jaxllm.losses.divergences import forward_kl
from jaxllm.losses.sequence import cosine, mse, pairwise_ranking, states
from jaxllm.losses.tokens import accuracy, next_token, z_loss
from jaxllm.losses.vocab import View, over_vocab
from tests.observed import alone, batch_of, observe, random_batch, value

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
    run = alone({"ce": next_token(), "z": z_loss()})
    here, shifted = run(logits, batch), run(logits + 4.0, batch)
    np.testing.assert_allclose(shifted["ce"][0], here["ce"][0], rtol=2e-6)
    assert abs(shifted["z"][0] - here["z"][0]) > 1.0


def test_label_smoothing_is_optax() -> None:
    rng = np.random.default_rng(1)
    logits, batch = rng.normal(size=(2, 4, 6)), random_batch(rng, 2, 4, 6)

    def reference(x: jax.Array) -> jax.Array:
        targets = optax.losses.smooth_labels(jax.nn.one_hot(batch.labels, 6), 0.1)
        return jnp.sum(optax.losses.softmax_cross_entropy(x, targets) * batch.loss_mask) / batch.loss_mask.sum()

    ours = alone({"smoothed": next_token(0.1)})(logits, batch)["smoothed"]
    theirs = jax.jit(jax.value_and_grad(reference))(jnp.asarray(logits, jnp.float32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), ours, theirs)


def test_metrics_are_measured_and_not_trained() -> None:
    logits = np.log([[[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]])
    obs = observe(logits, batch_of([[0, 2]]))
    loss = over_vocab(right=(0.0, accuracy()), log_z=(0.0, View.log_z))
    scalar, means = jax.jit(lambda obs: loss.update(obs, (), loss.weigh(obs.batch)))(obs)
    assert scalar == 0.0
    assert means["right"].value == 0.5
    np.testing.assert_allclose(means["log_z"].value, 0.0, atol=1e-6)


# ------------------------------------------------------------------------------------------- ranking


def rank(scores: Any, group: Any, order: Any = None, mask: Any = None) -> tuple[Any, Any, Any]:
    """(loss, d scores, means)."""
    scores = jnp.asarray(scores, jnp.float32)
    extras = {} if order is None else {"rank": jnp.asarray(order)}
    batch = batch_of(np.zeros((scores.shape[0], 2), int), None if mask is None else np.repeat(np.asarray(mask)[:, None], 2, 1))
    batch = batch.replace(group=jnp.asarray(group), extras=extras)
    loss = pairwise_ranking()
    f = lambda s: loss.update(Obs(batch, jnp.int32(0), scores={"reward": s}), (), loss.weigh(batch))
    (scalar, means), gradient = jax.jit(jax.value_and_grad(f, has_aux=True))(scores)
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
    batch = batch_of(np.zeros((2, 3), int), [[1, 1, 0], [1, 1, 1]], group=jnp.array([0, 0]))
    scores = jnp.array([[9.0, 2.0, 9.0], [9.0, 9.0, 1.0]])
    got = value(pairwise_ranking(), Obs(batch, jnp.int32(0), scores={"reward": scores}))
    np.testing.assert_allclose(got, np.log1p(np.exp(-1.0)), rtol=1e-6)


# ------------------------------------------------------------------------- combinators and annotators


def test_hidden_state_losses_in_closed_form() -> None:
    batch = batch_of(np.zeros((1, 3), int), [[1, 1, 0]])
    ours, theirs = jnp.array([[[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]]), jnp.array([[[3.0, 4.0], [0.0, 2.0], [1.0, 1.0]]])
    obs = Obs(batch, jnp.int32(0), {STUDENT: ours, "t": theirs})
    np.testing.assert_allclose(value(mse(states(), states("t")), obs), (0 + 2.5) / 2)
    np.testing.assert_allclose(value(cosine(states(), states("t")), obs), (0 + 1) / 2, atol=1e-6)
    with pytest.raises(ConfigError, match=r"'teach'.*Obs\.hidden.*student, t"):
        value(mse(states(), states("teach")), obs)


def test_names_come_from_the_keywords() -> None:
    two = over_vocab(ce=(1.0, next_token()), z=(0.1, z_loss()))
    loss = partition("source", ppo=total(pg=over_vocab(loss=(1.0, next_token())), text=two), ptx=scale(27.8, two))
    batch = batch_of(np.zeros((2, 3), int), source=jnp.array([0, 1]))
    assert list(loss.weigh(batch)) == ["ppo/pg", "ppo/text/ce", "ppo/text/z", "ptx/ce", "ptx/z"]


def test_adaptive_reads_the_step_before() -> None:
    """Minitron: alpha * L_is equals L_logits of the step before, without a gradient through alpha; names reach outwards."""
    alpha = lambda means: means["logits"].value / means["states"].value
    inner = total(logits=over_vocab(loss=(1.0, forward_kl("t"))), states=adaptive(alpha, mse(states(), states("t"))))
    loss = partition("source", all=inner)
    rng = np.random.default_rng(8)
    obs = observe(rng.normal(size=(2, 3, 4)), batch_of(np.zeros((2, 3), int), source=jnp.zeros(2, int)), t=rng.normal(size=(2, 3, 4)))
    weights, state = loss.weigh(obs.batch), loss.init({})
    update = jax.jit(loss.update)
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

    @jax.jit
    def train(params: Any, state: Any, opt_state: Any, step: int) -> Any:
        (scalar, (means, state)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, {}, batch, state, step=step)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return scalar, means, (optax.apply_updates(params, updates), state, opt_state)

    start, means, _ = train(params, (), optimizer.init(params), 2)
    np.testing.assert_allclose(start, 3 * np.log(4), rtol=1e-6)
    np.testing.assert_allclose(means["ce"].value, np.log(4), rtol=1e-6)
    carry = (params, (), optimizer.init(params))
    for _ in range(20):
        scalar, _, carry = train(*carry, 0)
    assert scalar < 0.1


def test_clear_errors() -> None:
    obs = observe(np.zeros((1, 2, 4)))
    cases = [
        (lambda: over_vocab(), "no terms.*a chunk of at least 1"),
        (lambda: over_vocab(0, ce=(1.0, next_token())), "chunk=0"),
        (lambda: next_token(1.0), r"label_smoothing is 1.0; it must be in \[0, 1\)"),
        (lambda: value(partition("source", a=over_vocab(ce=(1.0, next_token()))), obs), "'source' in Batch"),
        (lambda: partition("source", a=(0, pairwise_ranking()), b=pairwise_ranking()), "branch 'b' has no row numbers"),
        (lambda: value(pairwise_ranking(), obs), "Batch.group"),
        (lambda: value(pairwise_ranking("score"), obs.replace(batch=obs.batch.replace(group=jnp.zeros(1)))), "'score' in Obs.scores"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()


def test_means_add_up() -> None:
    assert (Mean(jnp.float32(3), jnp.float32(2)) + Mean(jnp.float32(1), jnp.float32(2))).value == 1.0
