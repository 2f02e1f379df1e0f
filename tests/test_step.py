"""The step's own order of things: several updates per batch, schedules, batch ramps, rollouts, and the keys of its randomness.

References are loops written out here, in NumPy where that is possible; on one device and on 2 × 2 × 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import optim, sharding, tree
from jaxllm.config import ConfigError, ScheduleConfig
from jaxllm.contract import Batch, Obs, Params
from jaxllm.losses.core import adaptive, as_loss_fn
from jaxllm.losses.tokens import next_token
from jaxllm.losses.vocab import over_vocab
from jaxllm.step import Frozen, frozen_base, make_step, observe, state_factory, student_params
from tests.stepper import (
    CONFIG,
    MODEL,
    SGD,
    STUDENT_LM,
    VOCAB,
    Stepper,
    assert_close,
    batch_of,
    experiment_of,
    initial,
    mesh_of,
    numpy,
    observe_student,
    on_both_meshes,
    pieces,
    place_params,
    value,
)  # fmt: skip

# ------------------------------------------------------------------------------ updates per batch

ADAPTED = adaptive(lambda means: 1 + means["ce"].value / 10, over_vocab(chunk=4, ce=(1.0, next_token())))
"""A loss with memory: its coefficient comes from the update before."""


@cache
def adapted_gradient() -> Callable[..., Any]:
    return jax.jit(jax.value_and_grad(as_loss_fn(observe_student, ADAPTED), has_aux=True))


@cache
def reference(parts: int, shards: int) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """Two batches of `parts` updates each, as a loop over pieces: SGD with momentum and decay in NumPy."""
    config, grad = SGD, adapted_gradient()
    params: Params = initial()
    memory = ADAPTED.init(params)
    momentum = jax.tree.map(np.zeros_like, params)
    history = []
    for step in range(2):
        seen = []
        for index, piece in enumerate(pieces(batch_of(step), parts, shards)):
            at = step + index / parts
            rate = config.lr * (at if at < 1 else 1 - 0.9 * (at - 1) / (CONFIG.num_steps - 1))
            (scalar, (means, memory)), grads = grad(params, {}, piece, memory)
            momentum = jax.tree.map(lambda m, g: config.b1 * m + np.array(g), momentum, grads)
            decay = tree.map_with_path(lambda path, p: 0.0 if path.endswith("scale") else config.weight_decay * p, params)
            params = jax.tree.map(lambda p, m, d: p - rate * (m + d), params, momentum, decay)
            norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
            seen.append({"loss": scalar, "ce": means["ce"].value, "grad_norm": norm, "lr": rate})
        history.append({name: float(np.mean([one[name] for one in seen])) for name in seen[0]})
        history[-1]["tokens"] = float((batch_of(step).segment_ids > 0).sum())
    return numpy(params), history


@pytest.mark.parametrize("mesh_name, parts, micro", [("1", 2, 1), ("1", 2, 2), ("2×2×2", 2, 2)])
def test_updates_per_batch_are_separate_steps_on_pieces_of_each_shard(mesh_name: str, parts: int, micro: int) -> None:
    mesh = mesh_of(mesh_name)
    shards = sharding.axis_size(mesh, sharding.BATCH_AXES)
    config = replace(CONFIG, optim=replace(SGD, num_microbatches=micro))
    step = Stepper(experiment_of(config, ADAPTED, updates_per_batch=parts), mesh)
    got = [step(batch_of(i)) for i in range(2)]
    params, want = reference(parts, shards)
    for ours, theirs in zip(got, want, strict=True):
        for name, number in theirs.items():
            np.testing.assert_allclose(ours[name], number, rtol=2e-5, err_msg=name)
    assert_close(numpy(step.state.trainable), params, rtol=1e-4, atol=1e-6)
    assert int(step.state.step) == 2 and step.jitted._cache_size() == 1


def test_the_references_differ_where_a_mistake_would() -> None:
    """Twin: pieces of another cut end at other weights, by far more than the tolerance."""
    one, other = reference(2, 1)[0], reference(2, 4)[0]
    assert max(float(np.abs(one[path] - other[path]).max()) for path in one) > 1e-3


@pytest.mark.parametrize("schedule", [
    ScheduleConfig("cosine", warmup_steps=2), ScheduleConfig("wsd", warmup_steps=1, decay_steps=2), ScheduleConfig("inverse_sqrt", 3)
])  # fmt: skip
def test_schedules_count_batches(schedule: ScheduleConfig) -> None:
    """The rate that the optimizer uses at the first update of a batch is the schedule's at that batch."""
    config = replace(CONFIG, num_steps=8, optim=replace(SGD, b1=0.0, weight_decay=0.0, schedule=schedule))
    optimizer = state_factory(experiment_of(config, updates_per_batch=4), mesh_of("1"))[2]
    ones = jax.tree.map(np.ones_like, initial())

    def one(state: Any, _: None) -> tuple[Any, jax.Array]:
        changes, state = optimizer.update(ones, state, ones)
        return state, -changes["final_norm"]["scale"][0]

    used = jax.jit(lambda: jax.lax.scan(one, optimizer.init(ones), length=4 * config.num_steps)[1])()
    rates = jax.jit(jax.vmap(optim.schedule(config.optim, config.num_steps)))(np.arange(config.num_steps))
    np.testing.assert_allclose(used[::4], rates, rtol=1e-5)


@pytest.mark.parametrize(
    "rows, updates, micro, mesh_name, message",
    [
        (16, 3, 1, "1", r"a batch of 16 rows does not divide into 3 updates of 1 micro-batches over 1 data shards .* 3: 15 or 18$"),
        (24, 2, 2, "2×2×2", r"24 rows .* 2 updates of 2 micro-batches over 4 data shards .* multiple of 16: 16 or 32$"),
        (16, 0, 1, "1", r"updates_per_batch is 0; it must be at least 1"),
    ],
)
def test_a_batch_that_does_not_divide_into_updates_is_refused(rows: int, updates: int, micro: int, mesh_name: str, message: str) -> None:
    config = replace(CONFIG, data=replace(CONFIG.data, batch_size=rows), optim=replace(SGD, num_microbatches=micro))
    with pytest.raises(ConfigError, match=message):
        make_step(experiment_of(config, updates_per_batch=updates), None, mesh_of(mesh_name))  # type: ignore[arg-type]


def test_a_ramp_runs_whole_updates() -> None:
    """Half the batch is half the micro-batches in each of two updates."""
    optim_config = replace(SGD, num_microbatches=4, noise_scale=True, ema_decay=0.5)
    config = replace(CONFIG, data=replace(CONFIG.data, batch_ramp=((1, 8),)), optim=optim_config)
    step = Stepper(experiment_of(config, updates_per_batch=2), mesh_of("1"))
    metrics = [step(batch_of(0, rows)) for rows in (8, 16)]
    assert all({"noise_signal", "noise_variance"} <= one.keys() for one in metrics) and metrics[0]["tokens"] < metrics[1]["tokens"]
    with pytest.raises(ConfigError, match=r"ramp has 1 steps of 6 rows.*16 / optim.num_microbatches 4 / 2 .*2 × 2 = 4: 4 or 8"):
        make_step(replace(step.experiment, config=replace(config, data=replace(config.data, batch_ramp=((1, 6),)))), None, mesh_of("1"))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- rollouts


@jax.jit
def greedy(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Batch:
    """The most probable tokens under the params that it is given become inputs, and labels after a shift."""
    del frozen, key
    out = STUDENT_LM(params, batch)
    tokens = jnp.argmax(STUDENT_LM.unembed(params).logits(out.hidden), -1).astype(jnp.int32)
    return batch.replace(tokens=tokens, labels=jnp.roll(tokens, -1, 1))


@pytest.mark.parametrize("parts", [1, 2])
@on_both_meshes
def test_a_rollout_is_made_with_the_params_before_the_updates_and_trained_on(mesh_name: str, parts: int) -> None:
    """Each step's loss is that of the tokens which the params at its beginning prefer; frozen leaves are among the params."""
    config = replace(CONFIG, optim=replace(SGD, lr=1.0, freeze=(("unembed/.*", True),)))
    experiment = experiment_of(config, rollout=greedy, updates_per_batch=parts)
    step = Stepper(experiment, mesh_of(mesh_name))
    frozen = frozen_base(experiment, step.mesh, place_params(initial(), step.mesh))
    changed = []
    for i in range(3):
        params = tree.from_items(list(numpy(student_params(step.state, frozen)).items()))
        rolled = greedy(params, {}, batch_of(0), np.zeros(2, np.uint32))
        first, *others = pieces(rolled, parts, sharding.axis_size(step.mesh, sharding.BATCH_AXES))
        before = value(params, first)
        metrics = step(batch_of(0), frozen)
        if not others:
            np.testing.assert_allclose(metrics["loss"], before, rtol=1e-5)
        elif i == 0:  # the first update has rate 0, so both updates see the first params
            np.testing.assert_allclose(metrics["loss"], np.mean([before, *(value(params, other) for other in others)]), rtol=1e-5)
        assert abs(metrics["loss"] - value(params, batch_of(0))) > 1e-2, "the tokens that came are not those trained on"
        changed.append(np.asarray(rolled.tokens))
    assert (changed[0] != changed[2]).any(), "the test needs params whose preferences change"


def draw(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Batch:
    tokens = jax.random.randint(key, batch.tokens.shape, 0, VOCAB, jnp.int32)
    return batch.replace(tokens=tokens, labels=jnp.roll(tokens, -1, 1))


def test_a_rollouts_randomness_is_the_states_and_the_steps() -> None:
    """With nearly no learning the loss changes only with the tokens: again for an equal state, anew at each step, never the batch's."""
    config = replace(CONFIG, optim=replace(SGD, lr=1e-30))
    first, second = (Stepper(experiment_of(config, rollout=draw), mesh_of(name)) for name in ("1", "2×2×2"))
    seen = [first(batch_of(0))["loss"] for _ in range(3)]
    assert len(set(seen)) == 3
    again = [second(batch_of(0))["loss"] for _ in range(3)]
    np.testing.assert_allclose(again, seen, rtol=1e-5)
    other = Stepper(experiment_of(replace(config, seed=1), rollout=draw), mesh_of("1"))
    first.state = replace(first.state, key=other.state.key, step=jnp.zeros((), jnp.int32))
    assert abs(first(batch_of(0))["loss"] - seen[0]) > 1e-4


def test_a_rollout_may_change_the_number_of_rows() -> None:
    """Two answers for each prompt are twice the micro-batches; half an update is refused with the sizes that fit."""
    twice = lambda params, frozen, batch, key: jax.tree.map(lambda x: jnp.repeat(x, 2, 0), batch)
    config = replace(CONFIG, optim=replace(SGD, num_microbatches=2))
    metrics = Stepper(experiment_of(config, rollout=twice), mesh_of("2×2×2"))(batch_of(0))
    np.testing.assert_allclose(metrics["loss"], value(initial(), batch_of(0)), rtol=1e-5)
    assert metrics["tokens"] == 2 * (batch_of(0).segment_ids > 0).sum()
    less = lambda params, frozen, batch, key: jax.tree.map(lambda x: x[:13], batch)
    with pytest.raises(ConfigError, match=r"13 rows.* multiple of 1 × 8 = 8: 8 or 16"):
        Stepper(experiment_of(config, rollout=less), mesh_of("1"))(batch_of(0))


def test_no_key_is_used_twice() -> None:
    """Rollout, dropout of each micro-batch and annotators: all keys differ, and none is what another may be split into."""
    keys: list[tuple[int, ...]] = []
    note = lambda key: jax.debug.callback(lambda k: keys.append(tuple(k.tolist())), key)

    def rollout(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Batch:
        note(key)
        return batch

    def annotate(frozen: Frozen, obs: Obs, key: jax.Array) -> Obs:
        note(key)
        return obs

    def forward(params: Params, batch: Batch, key: jax.Array | None, step: jax.Array) -> Obs:
        assert key is not None
        note(key)
        return observe(STUDENT_LM)(params, batch, None, step)

    config = replace(CONFIG, model=replace(MODEL, residual_dropout=0.1), optim=replace(SGD, num_microbatches=2))
    for parts, micro in ((2, 2), (1, 1)):
        keys.clear()
        config = replace(config, optim=replace(SGD, num_microbatches=micro))
        fields = {"rollout": rollout, "annotators": (annotate, annotate), "forward": forward, "updates_per_batch": parts}
        step = Stepper(experiment_of(config, **fields), mesh_of("1"))
        for i in range(2):
            step(batch_of(i))
        jax.effects_barrier()
        assert len(keys) == 2 * (1 + 3 * parts * micro)
        children = {tuple(child) for key in keys for child in np.asarray(jax.random.split(jnp.array(key, jnp.uint32), 8)).tolist()}
        assert len(set(keys)) == len(keys) and not children & set(keys)
