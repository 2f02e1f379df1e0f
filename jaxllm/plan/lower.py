"""The train step of an `Experiment` as `train` compiles it, on shapes alone: no weights, no data, no device of its own.

step = lowered(experiment, devices)
step.jaxpr               # what work.py counts
step.lowered.compile()   # what train would compile on these devices
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm import flops, optim, sharding, tree
from jaxllm.config import ConfigError
from jaxllm.contract import Batch
from jaxllm.step import BASE, Experiment, Frozen, TrainState, param_specs, program


@dataclass(frozen=True)
class Lowered:
    """One step for one mesh, in every form that somebody measures."""

    traced: Any
    """`jax.stages.Traced`."""
    lowered: Any
    """`jax.stages.Lowered`: `compile()` makes it the program of a chip."""
    mesh: Mesh
    state: TrainState
    """Shapes with shardings."""
    frozen: Frozen
    """Shapes with shardings."""
    notes: list[str]
    """What runs less sharded than asked, as `train` says it."""

    @property
    def jaxpr(self) -> Any:
        """The step before partitioning: global shapes, scans with their lengths."""
        return self.traced.jaxpr


def lowered(experiment: Experiment, devices: Sequence[jax.Device]) -> Lowered:
    """Trace and lower the step of the full batch (a ramp's last phase) for `devices`, the way `loop.run` would.

    Raises:
      ConfigError: what `train` would refuse, or frozen weights whose shapes only their file knows.
    """
    config = experiment.config
    mesh = sharding.make_mesh(config.mesh, devices)
    notes = sharding.check_fit(config.model, config.data, config.optim, mesh, updates_per_batch=experiment.updates_per_batch)
    with jax.set_mesh(mesh):
        compiled = program(experiment, mesh)
        frozen = frozen_shapes(experiment, mesh)
        traced = compiled.step.trace(compiled.template, frozen, batch_shapes(experiment, mesh))
        return Lowered(traced, traced.lower(), mesh, compiled.template, frozen, notes)


def batch_shapes(experiment: Experiment, mesh: Mesh) -> Batch:
    """A global batch as the data pipeline gives it: the arrays of `data.rows` and the experiment's extras, rows over the data axes."""
    data = experiment.config.data
    where = sharding.batch_sharding(mesh)
    rows = (data.batch_size,)

    def shape(dims: tuple[int, ...], dtype: Any) -> Any:  # Any: a Batch of shapes stands for one of arrays
        return jax.ShapeDtypeStruct(dims, dtype, sharding=where)

    by_token = partial(shape, (*rows, data.sequence_length))
    return Batch(
        tokens=by_token(jnp.int32),
        labels=by_token(jnp.int32),
        loss_mask=by_token(jnp.float32),
        segment_ids=by_token(jnp.int32),
        positions=by_token(jnp.int32),
        source=shape(rows, jnp.int32),
        extras={name: shape((*rows, data.sequence_length, *one.shape), one.dtype) for name, one in experiment.extras.items()},
    )


def frozen_shapes(experiment: Experiment, mesh: Mesh) -> Frozen:
    """What `step.frozen_base` and `Experiment.load_frozen` would place, as shapes.

    Raises:
      ConfigError: `load_frozen` reads its weights' shapes from a file that is not there.
    """
    config, lm = experiment.config, experiment.lm
    shapes = jax.eval_shape(partial(sharding.pad_vocab, multiple=mesh.shape["model"]), lm.param_shapes)
    base = tree.partition(shapes, partial(optim.trainable, config.optim))[1]
    frozen: Frozen = {BASE: _placed(base, sharding.shardings(param_specs(experiment, mesh, base), mesh))} if base else {}
    if experiment.load_frozen is None:
        return frozen
    load = experiment.load_frozen
    try:
        loaded = jax.eval_shape(lambda: load(mesh))
    except OSError as error:
        raise ConfigError(f"the frozen weights of this experiment cannot be planned without their file: {error}") from error
    specs = {name: sharding.param_specs(params, mesh, ()) for name, params in loaded.items()}
    return frozen | {name: _placed(params, sharding.shardings(specs[name], mesh)) for name, params in loaded.items()}


def token_flops(experiment: Experiment, *, causal: bool = False) -> flops.TokenFlops:
    """The work of a token as `train` counts it for MFU and HFU, or with attention counted causally."""
    config, shapes = experiment.config, experiment.lm.param_shapes
    return flops.of_token(
        config.model,
        tree.count(shapes),
        config.data.sequence_length,
        num_frozen=tree.count(optim.split(config.optim, shapes)[1]),
        others=experiment.other_flops_per_token,
        remat=config.remat,
        causal=causal,
    )


def _placed(shapes: Any, where: Any) -> Any:
    return jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
