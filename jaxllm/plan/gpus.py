"""A plan for GPUs, whose compiler needs a GPU: work counted on the traced step, memory, traffic and time by arithmetic.

    plan(experiment, parse('h100:8x16'), precision='bfloat16')

No figure here was compiled, and each says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from jaxllm import chips, sharding, tree
from jaxllm.chips import Chip
from jaxllm.config import ConfigError, MeshConfig
from jaxllm.plan import arithmetic, kernels, links, lower
from jaxllm.plan.arithmetic import Buffer
from jaxllm.plan.result import Plan
from jaxllm.plan.roofline import roofline
from jaxllm.plan.work import Work, count
from jaxllm.step import Experiment, Frozen, TrainState, program

CAVEAT = "modelled, not compiled: a GPU's compiler needs the GPU; work is counted on the traced step, everything else is arithmetic"


ATTENTION = r".*/attention\.attend(/.*)?"
"""Scope of attention in `models/transformer.py`: on a GPU it is one kernel, whatever was traced here."""


LARGEST = 2**20
"""GPUs of a plan, at most."""


@dataclass(frozen=True)
class Cluster:
    """Equal hosts of one kind of GPU."""

    chip: Chip
    gpus_per_host: int
    num_hosts: int

    @property
    def num_chips(self) -> int:
        """GPUs of all hosts."""
        return self.gpus_per_host * self.num_hosts

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        return f"{self.chip.name}:{self.gpus_per_host}x{self.num_hosts}"


def parse(text: str) -> Cluster:
    """`CHIP:PER_HOSTxHOSTS`, or `CHIP:NUMBER` for one host.

    Raises:
      ConfigError: neither, no such GPU, or more on a host than reach each other by NVLink.

    >>> parse('h100:8x16').num_chips, parse('h200:1').name
    (128, 'h200:1x1')
    """
    match = re.fullmatch(r"([\w-]+):(\d+)(?:x(\d+))?", text)
    if not match or not int(match[2]) or match[3] == "0":
        raise ConfigError(f"--gpus is '{text}'; write CHIP:GPUS_PER_HOSTxHOSTS, e.g. h100:8x16")
    chip = chips.find(match[1])
    if chip.torus_dims:
        raise ConfigError(f"--gpus names the TPU {chip.name}; use --topology {chip.name}:… for it")
    if int(match[2]) > chip.chips_per_host:
        raise ConfigError(f"--gpus {text} has {match[2]} GPUs on a host; {chip.name} hosts have at most {chip.chips_per_host}")
    cluster = Cluster(chip, int(match[2]), int(match[3] or 1))
    if cluster.num_chips > LARGEST:
        raise ConfigError(f"--gpus {text} is {cluster.num_chips:,} GPUs; plans go up to {LARGEST:,}")
    return cluster


def mesh_sizes(config: MeshConfig, num_chips: int) -> dict[str, int]:
    """slice, data, model -> size, with -1 filled in, so that they use every chip.

    Raises:
      ConfigError: sizes that do not multiply to the chips; names the nearest that do.

    >>> mesh_sizes(MeshConfig(data=-1, model=4), 32)
    {'slice': 1, 'data': 8, 'model': 4}
    """
    sizes = [config.slice, config.data, config.model]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_chips % known == 0:
        sizes[sizes.index(-1)] = num_chips // known
    if math.prod(sizes) != num_chips or -1 in sizes:
        given = tuple(sizes)
        wanted = [num_chips / known if size == -1 else size for size in sizes]
        near = sorted(_factorings(num_chips), key=lambda f: sum(abs(math.log(a / b)) for a, b in zip(f, wanted, strict=True)))
        raise ConfigError(
            f"mesh (slice, data, model) = {given} does not multiply to {num_chips} chips; nearest that do: {near[0]}"
            + "".join(f", {other}" for other in near[1:3])
        )
    return dict(zip(sharding.AXES, sizes, strict=True))


def _factorings(number: int) -> Iterator[tuple[int, int, int]]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = sorted({*small, *(number // n for n in small)})
    return ((a, number // (a * c), c) for a in divisors for c in divisors if number % (a * c) == 0)


@dataclass(frozen=True)
class Traced:
    """A step as JAX traces it for a mesh of chips that are not here."""

    mesh: dict[str, int]
    state: TrainState
    """Shapes with shardings."""
    frozen: Frozen
    work: Work
    num_params: int
    notes: list[str]


def trace(experiment: Experiment, mesh: Mapping[str, int]) -> Traced:
    """The work of one step of the full batch, without devices or a compiler.

    Attention is that of the machine at hand, plain JAX in blocks on a CPU, which skips what a causal mask hides as a kernel does.

    Raises:
      ConfigError: what `train` would refuse.
    """
    config = experiment.config
    # As good as a mesh for shapes and shardings; the signatures of `step` and `sharding` ask for one with devices.
    abstract: Any = AbstractMesh(tuple(mesh[axis] for axis in sharding.AXES), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    notes = sharding.check_fit(config.model, config.data, config.optim, abstract, updates_per_batch=experiment.updates_per_batch)
    with jax.sharding.use_abstract_mesh(abstract):
        step, _, state = program(experiment, abstract)
        frozen = lower.frozen_shapes(experiment, abstract)
        batch = lower.batch_shapes(experiment, abstract)
        traced = step.trace(state, frozen, batch)
    flags = [False] * len(jax.tree.leaves((state, frozen))) + [True] * len(jax.tree.leaves(batch))
    work = count(traced.jaxpr, from_batch=flags, mesh=mesh, kernels=kernels.attention(), stands_for_kernel=ATTENTION)
    num_params = tree.count(experiment.lm.param_shapes)
    return Traced(dict(mesh), state, frozen, work, num_params, notes)


def state_of(traced: Traced) -> list[Buffer]:
    """What lies in a chip's memory between steps."""
    return arithmetic.state_buffers(traced.state, traced.frozen)


def plan(experiment: Experiment, cluster: Cluster, precision: str, target: str = "") -> Plan:
    """What one step of an experiment takes on GPUs.

    Args:
      precision: 'bfloat16', as `train` chooses on a GPU, or what the configuration asks for.
      target: what is planned, for the title.

    Raises:
      ConfigError: what `train` would refuse, or a mesh that does not use all GPUs.
    """
    config = experiment.config
    mesh = mesh_sizes(config.mesh, cluster.num_chips)
    traced = trace(experiment, mesh)
    collectives = arithmetic.collectives(config, mesh, precision, tree.count(traced.state.trainable))
    tokens = config.data.batch_size * config.data.sequence_length
    line = roofline(
        cluster.chip,
        cluster.num_chips,
        traced.work,
        collectives,
        links.switch(cluster.chip, mesh, cluster.gpus_per_host),
        tokens_per_step=tokens,
        model_flops=tokens * lower.token_flops(experiment).model,
        causal_flops=tokens * lower.token_flops(experiment, causal=True).model,
    )
    return Plan(
        target=target or config.name,
        machine=f"{cluster.name} = {cluster.num_chips} × {cluster.chip.name}",
        config=config,
        precision=precision,
        num_params=traced.num_params,
        mesh=mesh,
        chip=cluster.chip,
        num_chips=cluster.num_chips,
        memory=arithmetic.memory(config, mesh, precision, state_of(traced)),
        memory_how="modelled",
        largest=(),
        work=traced.work,
        collectives=collectives,
        collectives_how="modelled",
        roofline=line,
        notes=(CAVEAT, *traced.notes, *traced.work.notes),
    )
