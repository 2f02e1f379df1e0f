"""One training step for every paper: rollout? → annotate → forward → loss → gradient → optimizer.

A paper is an `Experiment`, a value. The step differentiates the trainable leaves only; everything
else (a base under adapters, teachers, references) is `frozen`: an argument of the jitted step, placed
by its own rules, never donated, never closed over, not in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jaxllm import optim, sharding, tree
from jaxllm.config import ConfigError, OptimConfig, TrainConfig, nearest_divisors
from jaxllm.contract import LM, STUDENT, Batch, Mean, Obs, Params
from jaxllm.losses.core import LossTransform

BASE = "base"
"""Key, in `frozen`, of the student's own leaves that do not train."""

type Frozen = dict[str, Params]
type Forward = Callable[[Params, Batch, Array | None, Array], Obs]
"""(student's params, batch, dropout key, step) -> what the loss sees of the student."""
type Annotate = Callable[[Frozen, Obs, Array], Obs]
type Rollout = Callable[[Params, Frozen, Batch, Array], Batch]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trainable", "opt_state", "loss_state", "ema", "key"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and all that a checkpoint holds."""

    step: Int[Array, ""]
    """Batches trained on so far."""
    trainable: Params
    opt_state: Any
    loss_state: Any
    ema: Params | None
    """Moving average of `trainable`, if asked for."""
    key: Array
    """Never changes: the randomness of a step is a function of it and the step."""


@dataclass(frozen=True)
class Experiment:
    """A paper, as a value: what `loop.run` works on.

    Built by `jaxllm.pretrain.experiment` and changed with `dataclasses.replace`.
    """

    config: TrainConfig
    lm: LM
    loss: LossTransform
    load_data: Callable[..., Any]
    """(config, seed, say) -> data.batch.Dataset; called once the configuration has been checked."""
    extras: Mapping[str, jax.ShapeDtypeStruct] = field(default_factory=dict)
    """`Batch.extras` of its batches, by name: the shape after [B T]. A plan makes batches without reading data."""
    forward: Forward | None = None
    """None means the LM's own (`observe`)."""
    annotators: tuple[Annotate, ...] = ()
    load_frozen: Callable[[Mesh], Frozen] | None = None
    """Teachers and references by name, already placed on the mesh. Not the student's own frozen leaves: those are `frozen_base`'s."""
    initial_params: Callable[[Mesh], Params] | None = None
    """Starting weights from elsewhere, e.g. a checkpoint; None initialises from the seed."""
    rollout: Rollout | None = None
    """The student's own samples (on-policy distillation, PPO), made inside the step before the updates, with whatever
    number of rows divides into micro-batches."""
    updates_per_batch: int = 1
    """The (rolled out) batch is split into this many optimizer updates, each cut into `optim.num_microbatches`. Schedules
    still count batches: the learning rate moves on by a fraction of a step at each update."""
    other_flops_per_token: float = 0.0
    """Work of annotators and rollouts for a token of the batch, for MFU: 2 · params for each model that runs forward once."""
    evaluate: Callable[..., dict[str, Any]] | None = None
    """(params, dataset, mesh, max batches) -> numbers by name; {} where there is nothing to evaluate on."""
    sample: Callable[..., list[dict[str, str]]] | None = None
    """(params, dataset, mesh) -> [{'prompt', 'completion'}]."""
    finish: Callable[..., dict[str, Any]] | None = None
    """(dataset, last evaluation) -> what `results.json` also holds at the end of the run."""

    def __post_init__(self) -> None:
        if self.updates_per_batch < 1:
            raise ConfigError(f"Experiment.updates_per_batch is {self.updates_per_batch}; it must be at least 1")


def observe(lm: LM, taps: Sequence[str] = ()) -> Callable[..., Obs]:
    """The usual `Forward`: run the LM on the batch's tokens and leave hidden states, taps and the unembedding."""

    def forward(params: Params, batch: Batch, key: Array | None, step: Array | None = None) -> Obs:
        out = lm(params, batch, key=key if lm.has_dropout else None, taps=taps)
        return Obs(
            batch=batch,
            step=jnp.int32(0) if step is None else step,
            hidden={STUDENT: out.hidden},
            unembeddings={STUDENT: lm.unembed(params)},
            taps={STUDENT: out.taps},
        )

    return forward


def split_rows(batch: Batch, parts: int, shards: int) -> Batch:
    """Rows [B …] to [parts, B / parts …], so that each data shard keeps its rows and neighbours stay together.

    Shard s holds rows [s·B/shards, (s+1)·B/shards); each part takes a contiguous piece of every shard's rows.
    """

    def split(x: Array) -> Array:
        rows = x.shape[0] // (shards * parts)
        x = x.reshape(shards, parts, rows, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(x.reshape(parts, shards * rows, *x.shape[3:]), " ".join([".", "B"] + ["."] * (x.ndim - 3)))

    return jax.tree.map(split, batch)


def make_step(
    experiment: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, Array]]]:
    """The function that `jax.jit` compiles: (state, frozen, batch) -> (state, metrics).

    The gradients of micro-batches add up to the full batch's exactly, because every term of the loss divides
    by its weight over the whole batch, known from the masks before the first forward pass. The number of
    micro-batches is read off the batch's shape, so that a batch ramp keeps one micro-batch shape.

    Metrics are means over the updates of a batch, but for `tokens`, which is the batch's.

    Raises:
      ConfigError: a batch that does not divide into updates, micro-batches and data shards. For the configuration's batch
        at once, for a rollout's when the step is traced.
    """
    config, loss = experiment.config, experiment.loss
    forward = experiment.forward or observe(experiment.lm)
    shards = sharding.axis_size(mesh, sharding.BATCH_AXES)
    updates = experiment.updates_per_batch
    micro_rows = sharding.check_batch(config.data, config.optim, mesh, updates)
    rate = optim.schedule(*_counted_in_updates(experiment))

    def micro_loss(
        trainable: Params, frozen: Frozen, batch: Batch, step: Array, loss_state: Any, weights: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Mean]]:
        # A key is used once or split, never both: a parent's children are whatever its user derives from it.
        key, *others = jax.random.split(key, 1 + len(experiment.annotators)) if experiment.annotators else (key,)
        params = tree.merge(trainable, frozen.get(BASE, {}))
        obs = forward(params, batch, key, step)
        for annotate, other in zip(experiment.annotators, others, strict=True):
            obs = annotate(frozen, obs, other)
        return loss.update(obs, loss_state, weights)

    def update(state: TrainState, frozen: Frozen, batch: Batch, key: Array, index: int | Array = 0) -> tuple[TrainState, dict[str, Array]]:
        parts = batch.tokens.shape[0] // micro_rows
        weights = loss.weigh(batch)
        grad = jax.value_and_grad(micro_loss, has_aux=True)
        call = partial(grad, state.trainable, frozen, step=state.step, loss_state=state.loss_state, weights=weights)
        if parts == 1:
            (value, means), grads = call(batch, key=key)
            micro_sq_norms = None
        else:
            keys = jax.random.split(key, parts)

            def add_one(total: Any, part: tuple[Batch, Array]) -> tuple[Any, Array]:
                out = call(part[0], key=part[1])
                return jax.tree.map(jnp.add, total, out), jnp.square(optim.global_norm(out[1]))

            split = split_rows(batch, parts, shards)
            shapes = jax.eval_shape(lambda: call(jax.tree.map(lambda x: x[0], split), key=keys[0]))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            ((value, means), grads), micro_sq_norms = jax.lax.scan(add_one, zeros, (split, keys))
        changes, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, changes)
        ema = None if state.ema is None else optim.ema(state.ema, trainable, config.optim.ema_decay or 0.0)
        metrics = {name: mean.value for name, mean in means.items()}
        metrics |= {
            "loss": value,
            "grad_norm": optim.global_norm(grads),
            "param_norm": optim.global_norm(trainable),
            "lr": jnp.asarray(rate(state.step * updates + index), jnp.float32),
        }
        if config.optim.noise_scale and micro_sq_norms is not None:
            # Each micro-gradient was divided by the whole batch's weight: times `parts` it is the mean gradient of its rows.
            small, big = micro_sq_norms.mean() * parts**2, jnp.square(metrics["grad_norm"])
            metrics["noise_signal"], metrics["noise_variance"] = optim.noise_scale(small, big, micro_rows, batch.tokens.shape[0])
        state = TrainState(state.step, trainable, opt_state, loss.finish(state.loss_state, means), ema, state.key)
        return state, metrics

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        if experiment.rollout is not None:
            key, own = jax.random.split(key)
            batch = experiment.rollout(tree.merge(state.trainable, frozen.get(BASE, {})), frozen, batch, own)
            batch = jax.tree.map(lambda x: sharding.constrain(x, " ".join(["B"] + ["."] * (x.ndim - 1))), batch)
        _check_rows(batch.tokens.shape[0], micro_rows, updates)
        if updates == 1:
            state, metrics = update(state, frozen, batch, key)
        else:

            def one(state: TrainState, part: tuple[Batch, Array, Array]) -> tuple[TrainState, dict[str, Array]]:
                return update(state, frozen, *part)

            parts = split_rows(batch, updates, shards), jax.random.split(key, updates), jnp.arange(updates)
            state, stacked = jax.lax.scan(one, state, parts)
            metrics = jax.tree.map(lambda x: x.mean(0), stacked)
        metrics["tokens"] = (batch.segment_ids > 0).sum().astype(jnp.float32)
        return TrainState(state.step + 1, state.trainable, state.opt_state, state.loss_state, state.ema, state.key), metrics

    return step


def _check_rows(rows: int, micro_rows: int, updates: int) -> None:
    unit = micro_rows * updates
    if rows % unit or not rows:
        raise ConfigError(
            f"a step was given, or its rollout made, {rows} rows; with {updates} updates per batch and micro-batches of {micro_rows} rows "
            f"it must be a multiple of {updates} × {micro_rows} = {unit}: {nearest_divisors(rows, unit)}"
        )


def _counted_in_updates(experiment: Experiment) -> tuple[OptimConfig, int]:
    """(optimizer, number of steps) with lengths in updates, as an optimizer counts; the user's are in batches."""
    config, updates = experiment.config, experiment.updates_per_batch
    lengths = config.optim.schedule
    decay_steps = None if lengths.decay_steps is None else updates * lengths.decay_steps
    stretched = replace(lengths, warmup_steps=updates * lengths.warmup_steps, decay_steps=decay_steps)
    return replace(config.optim, schedule=stretched), updates * config.num_steps


# ------------------------------------------------------------------------------------------- state


def param_specs(experiment: Experiment, mesh: Mesh, part: Params) -> Params:
    """PartitionSpecs of some of the student's leaves, by the rules for all of them: a user's rule may be for a frozen one."""
    lm, config = experiment.lm, experiment.config
    shapes = jax.eval_shape(partial(sharding.pad_vocab, multiple=mesh.shape["model"]), lm.param_shapes)
    specs = sharding.param_specs(shapes, mesh, config.mesh.rules)
    return tree.partition(specs, set(tree.paths(part)).__contains__)[0]


def state_shardings(experiment: Experiment, shapes: TrainState, mesh: Mesh) -> TrainState:
    """A NamedSharding for every leaf of a TrainState: params by rule, whatever copies them likewise, the rest replicated."""
    specs = param_specs(experiment, mesh, shapes.trainable)
    place = lambda part: sharding.shardings(sharding.like_params(part, specs), mesh)
    whole: Any = NamedSharding(mesh, P())
    return TrainState(
        step=whole,
        trainable=sharding.shardings(specs, mesh),
        opt_state=place(shapes.opt_state),
        loss_state=jax.tree.map(lambda _: whole, shapes.loss_state),
        ema=None if shapes.ema is None else place(shapes.ema),
        key=whole,
    )


def state_factory(experiment: Experiment, mesh: Mesh) -> tuple[Callable[..., TrainState], TrainState, optax.GradientTransformation]:
    """How a fresh state is made.

    Returns:
      make(params=None) -> TrainState on the mesh, from `params` or the seed; the state's shapes with their
      shardings (the template of a restore); and the optimizer that it was made for.
    """
    config, lm = experiment.config, experiment.lm
    multiple = mesh.shape["model"]

    def fresh_params(key: Array) -> Params:
        return sharding.pad_vocab(lm.init(key), multiple)

    shapes = jax.eval_shape(partial(sharding.pad_vocab, multiple=multiple), lm.param_shapes)
    keep = partial(optim.trainable, config.optim)
    trainable_shapes, _ = optim.split(config.optim, shapes)
    optim_config, num_updates = _counted_in_updates(experiment)
    optimizer = optim.build(optim_config, trainable_shapes, num_steps=num_updates, num_vocab=config.model.vocab_size)

    def assemble(params: Params) -> TrainState:
        trainable, _ = tree.partition(params, keep)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            trainable=trainable,
            opt_state=optimizer.init(trainable),
            loss_state=experiment.loss.init(trainable),
            ema=jax.tree.map(jnp.copy, trainable) if config.optim.ema_decay else None,
            key=jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), 1)),
        )

    state_shapes = jax.eval_shape(assemble, shapes)
    placed = state_shardings(experiment, state_shapes, mesh)
    template = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), state_shapes, placed)

    def make(params: Params | None = None) -> TrainState:
        if params is not None:
            return jax.jit(assemble, out_shardings=placed)(params)
        return jax.jit(lambda key: assemble(fresh_params(key)), out_shardings=placed)(jax.random.key(config.seed))

    return make, template, optimizer


class Program(NamedTuple):
    """A training step ready to run, and the state that it runs on."""

    step: Any
    """Jitted (state, frozen, batch) -> (state, metrics); the state is donated, and keeps its shardings."""
    make_state: Callable[..., TrainState]
    """As `state_factory` describes it."""
    template: TrainState
    """The state's shapes with their shardings."""


def program(experiment: Experiment, mesh: Mesh) -> Program:
    """What the loop runs, the planner compiles and the benchmarks time: the same program. Call `step` under `jax.set_mesh(mesh)`."""
    make_state, template, optimizer = state_factory(experiment, mesh)
    out_shardings = (jax.tree.map(lambda leaf: leaf.sharding, template), None)
    return Program(jax.jit(make_step(experiment, optimizer, mesh), donate_argnums=0, out_shardings=out_shardings), make_state, template)


def frozen_base(experiment: Experiment, mesh: Mesh, params: Params | None = None) -> Frozen:
    """The student's frozen leaves, from `params` or the seed, placed by rule; empty when everything trains."""
    config = experiment.config
    keep = partial(optim.trainable, config.optim)
    if params is not None:
        base = tree.partition(params, keep)[1]
        return {BASE: jax.device_put(base, sharding.shardings(param_specs(experiment, mesh, base), mesh))} if base else {}

    padded = partial(sharding.pad_vocab, multiple=mesh.shape["model"])
    shapes = tree.partition(jax.eval_shape(padded, experiment.lm.param_shapes), keep)[1]
    if not shapes:
        return {}

    def fresh(key: Array) -> Params:
        return tree.partition(padded(experiment.lm.init(key)), keep)[1]

    specs = param_specs(experiment, mesh, shapes)
    return {BASE: jax.jit(fresh, out_shardings=sharding.shardings(specs, mesh))(jax.random.key(config.seed))}


def student_params(state: TrainState, frozen: Frozen, *, average: bool = True) -> Params:
    """The student's whole params: the moving average where one is kept, and the frozen leaves."""
    return tree.merge(state.ema if average and state.ema is not None else state.trainable, frozen.get(BASE, {}))
