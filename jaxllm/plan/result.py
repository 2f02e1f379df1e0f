"""What a plan says, as numbers: the same whether a compiler or arithmetic made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxllm.chips import GIB, Chip
from jaxllm.config import TrainConfig
from jaxllm.plan.arithmetic import Buffer
from jaxllm.plan.links import Collective
from jaxllm.plan.roofline import Roofline
from jaxllm.plan.work import Work

type How = Literal["compiled", "counted", "modelled", "published"]
"""compiled: by XLA for this machine. counted: exactly, on the program that JAX traced. modelled: by arithmetic.
published: by the chip's maker."""


@dataclass(frozen=True)
class Plan:
    """One step of one configuration on one machine."""

    target: str
    machine: str
    config: TrainConfig
    precision: str
    num_params: int
    mesh: Mapping[str, int]
    chip: Chip
    num_chips: int
    memory: Sequence[Buffer]
    """What makes up one chip's peak."""
    memory_how: How
    largest: Sequence[Buffer]
    """The largest buffers by the code that makes them, if known."""
    work: Work
    collectives: Sequence[Collective]
    collectives_how: How
    roofline: Roofline
    notes: Sequence[str] = ()

    @property
    def memory_bytes(self) -> int:
        """One chip's peak."""
        return sum(buffer.num_bytes for buffer in self.memory)

    @property
    def fits(self) -> bool:
        """Whether it is no more than the chip has."""
        return self.memory_bytes <= self.chip.memory_bytes

    @property
    def num_tokens(self) -> int:
        """Of the whole run, without a ramp."""
        return self.config.num_steps * self.config.data.batch_size * self.config.data.sequence_length


def what_would_fit(plan: Plan) -> str:
    """One line on a plan that does not fit: what it lacks, and what would make room, most first."""
    over = (plan.memory_bytes - plan.chip.memory_bytes) / GIB
    config, ways = plan.config, list[tuple[int, str]]()
    rows = config.data.batch_size // (config.optim.num_microbatches * plan.mesh["slice"] * plan.mesh["data"])
    state = plan.memory_bytes
    for buffer in plan.memory:
        if "activations" in buffer.name or "temporar" in buffer.name or "working" in buffer.name:
            state -= buffer.num_bytes
            if config.remat != "full":
                ways.append((buffer.num_bytes, "--remat full"))
            if rows > 1:
                ways.append((buffer.num_bytes // 2, f"--optim.num_microbatches {2 * config.optim.num_microbatches}"))
            else:
                ways.append((buffer.num_bytes // 2, f"--mesh.model {2 * plan.mesh['model']}"))
    chips = -(-plan.num_chips * state // plan.chip.memory_bytes)
    more = f"{2 * chips:,} chips or more" if state > plan.chip.memory_bytes else "more chips"
    ways.append((state, more))
    ways.append((state // 6 if config.optim.moment_dtype == "float32" else 0, "--optim.moment_dtype bfloat16"))
    names = list(dict.fromkeys(name for size, name in sorted(ways, key=lambda way: -way[0]) if size > 0))
    return (
        f"does not fit: {plan.memory_bytes / GIB:.1f} GiB of {plan.chip.memory_bytes / GIB:.0f} GiB per chip, "
        f"{over:.1f} GiB too much; what makes room: {', '.join(names)}"
    )


def what_makes_room(config: TrainConfig) -> str:
    """What to try where a step does not even compile into a chip's memory, so that nothing is known of its parts.

    >>> what_makes_room(TrainConfig(remat='dots'))
    '--remat full, --optim.num_microbatches 2, --mesh.model 2, more chips, --optim.moment_dtype bfloat16'
    """
    ways = ["--remat full"] if config.remat != "full" else []
    ways += [f"--optim.num_microbatches {2 * config.optim.num_microbatches}", f"--mesh.model {2 * config.mesh.model}", "more chips"]
    return ", ".join(ways + (["--optim.moment_dtype bfloat16"] if config.optim.moment_dtype == "float32" else []))
