"""Try mesh shapes, remat policies and micro-batch counts; compile the most promising, and rank those that fit.

Pure: how a configuration is estimated and how it is planned are arguments. `arithmetic` estimates in microseconds what a plan
takes a minute for, and is right within a factor of 1.5 on memory, so only what is far too large is dropped unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxllm.chips import Chip
from jaxllm.config import ConfigError, TrainConfig
from jaxllm.plan import arithmetic
from jaxllm.plan.arithmetic import Buffer
from jaxllm.plan.links import Links
from jaxllm.plan.result import Plan

REMAT = ("none", "minimal", "dots", "full")
"""From the least recomputation to the most."""

ONE_CHIP = {"slice": 1, "data": 1, "model": 1}
"""The mesh on which `estimator` wants the state."""


@dataclass(frozen=True)
class Estimate:
    """What arithmetic says of a configuration."""

    num_bytes: float
    """One chip's peak."""
    seconds: float
    """Of a step: products and traffic one after the other, because a tie in the slowest part says nothing."""


def candidates(
    config: TrainConfig, num_chips: int, num_slices: int = 1, shapes: Sequence[int] | None = None, *, updates_per_batch: int = 1
) -> Iterator[TrainConfig]:
    """Every mesh, remat policy and micro-batch count that divides the batch, those of its ramp, and the model.

    Args:
      num_chips: of all slices.
      shapes: sizes of the model axis to try; None: all that divide a slice's chips, the query heads and the feed-forward width.
    """
    model, per_slice = config.model, num_chips // num_slices
    if shapes is None:
        shapes = [n for n in range(1, per_slice + 1) if not (per_slice % n or model.num_heads % n or model.ff_width % n)]
    for shards in shapes:
        data_shards = num_chips // shards
        if config.data.batch_size % (data_shards * updates_per_batch):
            continue
        rows = config.data.batch_size // (data_shards * updates_per_batch)
        mesh = replace(config.mesh, slice=num_slices, data=per_slice // shards, model=shards)
        for micro in (n for n in range(1, rows + 1) if rows % n == 0 and (n & (n - 1) == 0 or n == rows)):
            for remat in REMAT:
                optim = replace(config.optim, num_microbatches=micro)
                unit = config.data.batch_size // micro
                if (optim.noise_scale and micro < 2) or any(size % unit for _, size in config.data.batch_ramp):
                    continue
                yield replace(config, mesh=mesh, optim=optim, remat=remat)  # type: ignore[arg-type]


def estimator(
    state: Sequence[Buffer],
    num_params: int,
    flops_per_token: Callable[[TrainConfig], float],
    precision: str,
    chip: Chip,
    links: Callable[[Mapping[str, int]], Links],
) -> Callable[[TrainConfig], Estimate]:
    """The usual estimate, by `arithmetic`.

    Args:
      state: of the whole model, as `ONE_CHIP` would hold it.
      num_params: those that train.
      flops_per_token: executed.
      links: mesh -> its links, by `links.torus` or `links.switch`.
    """

    def estimate(config: TrainConfig) -> Estimate:
        mesh = {"slice": config.mesh.slice, "data": config.mesh.data, "model": config.mesh.model}
        buffers = arithmetic.memory(config, mesh, precision, arithmetic.on_mesh(state, mesh))
        tokens = config.data.batch_size * config.data.sequence_length
        num_chips = mesh["slice"] * mesh["data"] * mesh["model"]
        seconds = tokens * flops_per_token(config) / (num_chips * chip.peak_flops)
        cost = links(mesh)
        seconds += sum(sum(cost(c).values()) for c in arithmetic.collectives(config, mesh, precision, num_params))
        return Estimate(sum(buffer.num_bytes for buffer in buffers), seconds)

    return estimate


def search(
    found: Iterator[TrainConfig],
    estimate: Callable[[TrainConfig], Estimate],
    evaluate: Callable[[TrainConfig], Plan],
    memory_bytes: int,
    *,
    margin: float = 1.5,
    max_plans: int = 8,
    say: Callable[[str], None] = lambda _: None,
) -> list[Plan]:
    """Plans of the most promising configurations: those that fit first, the fastest first.

    Args:
      evaluate: compiles a configuration; a ConfigError drops it, with its reason said.
      memory_bytes: of a chip.
      margin: an estimate of more than so many times `memory_bytes` is not worth a plan; 1.0 where `evaluate` estimates too.
      max_plans: how many to compile, three quarters of them estimated to fit.

    Raises:
      ConfigError: nothing comes near to fitting (says what comes nearest), or `evaluate` took none of them.
    """
    every = [(estimate(config), config) for config in found]
    if not every:
        raise ConfigError("no mesh divides this batch over these chips; choose a batch that is a multiple of the chips over a model axis")
    near = sorted((e for e in every if e[0].num_bytes <= margin * memory_bytes), key=lambda e: e[0].seconds)
    if not near:
        least, config = min(every, key=lambda e: e[0].num_bytes)
        raise ConfigError(
            f"none of {len(every)} configurations fits: the smallest, {describe(config)}, needs about {least.num_bytes / 2**30:.1f} GiB "
            f"of {memory_bytes / 2**30:.0f} GiB per chip; use more chips, a smaller batch or --optim.moment_dtype bfloat16"
        )
    say(f"{len(every)} configurations, {len(near)} of which may fit; planning the {min(max_plans, len(near))} most promising")
    sure = [entry for entry in near if entry[0].num_bytes <= memory_bytes]
    chosen = _spread(sure, max_plans - max_plans // 4)
    chosen += _spread([entry for entry in near if entry not in chosen], max_plans - len(chosen))
    plans: list[Plan] = []
    for number, (_, config) in enumerate(chosen, start=1):
        say(f"{number}/{len(chosen)}  {describe(config)}")
        try:
            plans.append(evaluate(config))
        except ConfigError as error:
            say(f"      left out: {error}")
    if not plans:
        raise ConfigError(f"none of the {len(chosen)} most promising configurations compiled, each for the reason above; try more: --plans")
    return rank(plans)


def _spread(entries: Sequence[tuple[Estimate, TrainConfig]], number: int) -> list[tuple[Estimate, TrainConfig]]:
    """The first `number`, at most half of one mesh while there are others: an estimate wrong about a mesh is wrong about all of it."""
    few: list[tuple[Estimate, TrainConfig]] = []
    for entry in entries:
        if sum(other.mesh == entry[1].mesh for _, other in few) < max(number // 2, 1):
            few.append(entry)
    rest = [entry for entry in entries if entry not in few]
    return (few + rest)[:number]


def rank(plans: Sequence[Plan]) -> list[Plan]:
    """Those that fit first; among them the one whose slowest part is fastest, then what does not overlap, then memory."""
    return sorted(plans, key=lambda plan: (not plan.fits, plan.roofline.seconds, plan.roofline.serial_seconds, plan.memory_bytes))


def describe(config: TrainConfig) -> str:
    """A candidate as flags.

    >>> describe(TrainConfig())
    '--mesh.slice 1 --mesh.data -1 --mesh.model 1 --remat full --optim.num_microbatches 1'
    """
    mesh = config.mesh
    return (
        f"--mesh.slice {mesh.slice} --mesh.data {mesh.data} --mesh.model {mesh.model} --remat {config.remat} "
        f"--optim.num_microbatches {config.optim.num_microbatches}"
    )
