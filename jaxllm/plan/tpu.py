"""A plan for TPUs: memory and collectives by the chip's own compiler, work counted on the step that it compiled, time by roofline."""

from __future__ import annotations

from collections.abc import Callable

from jaxllm import chips
from jaxllm.config import TrainConfig
from jaxllm.plan import links
from jaxllm.plan.arithmetic import Buffer
from jaxllm.plan.child import Request, compile_step
from jaxllm.plan.compiled import Compiled
from jaxllm.plan.result import Plan
from jaxllm.plan.roofline import roofline
from jaxllm.plan.topology import Topology


def plan(
    config: TrainConfig,
    build: str,
    machine: Topology,
    precision: str,
    target: str = "",
    progress: Callable[[str, float], None] = lambda stage, seconds: None,
    *,
    generate_code: bool = True,
) -> Plan:
    """What one step of a configuration takes on TPU slices.

    Args:
      build: `MODULE:NAME` or `FILE.py:NAME` of (config, precision=…) -> Experiment.
      target: what is planned, for the title.
      progress: called every second with what the compiler is at and the seconds since its start.
      generate_code: False stops when memory is assigned; nothing but the size of the code is missing.

    Raises:
      ConfigError: what `train` would refuse, no libtpu, or a slice that it does not know.
      OutOfMemory: too large for the compiler itself.
    """
    found = compile_step(Request(build, config, precision, machine, generate_code), progress)
    chip, mesh = chips.find(machine.chip), dict(found.mesh)
    collectives = [links.of_compiled(c) for c in found.collectives]
    tokens = config.data.batch_size * config.data.sequence_length
    line = roofline(
        chip,
        machine.num_chips,
        found.work,
        collectives,
        links.torus(chip, machine.shape, machine.wraps, mesh),
        tokens_per_step=tokens,
        model_flops=tokens * found.per_token.model,
        causal_flops=tokens * found.causal_per_token.model,
    )
    seconds = found.seconds["lower"] + found.seconds["compile"]
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    unknown = (f"a loop of unknown length counts once: {name}" for name in found.unknown_loops)
    return Plan(
        target=target or config.name,
        machine=f"{machine.num_slices} × {machine.name} = {machine.num_chips:,} × {chip.name}",
        config=config,
        precision=precision,
        num_params=found.num_params,
        mesh=mesh,
        chip=chip,
        num_chips=machine.num_chips,
        memory=memory(found),
        memory_how="compiled",
        largest=[Buffer(f"{b.shape} {b.phase}".strip(), b.num_bytes, b.where or b.op_name) for b in found.buffers],
        work=found.work,
        collectives=collectives,
        collectives_how="compiled",
        roofline=line,
        notes=(
            f"compiled in {seconds:.0f} s by {versions}{'' if generate_code else ', without its code'}",
            *found.notes,
            *found.work.notes,
            *unknown,
        ),
    )


def memory(found: Compiled) -> list[Buffer]:
    """What makes up a chip's peak: the state by its parts, and what the compiler adds to it."""
    sizes = found.memory
    rest = sizes.argument_bytes - sum(buffer.num_bytes for buffer in found.state)
    return [
        *found.state,
        Buffer("batch and padding", max(rest, 0), "arguments of the step, less the state"),
        Buffer("results", max(sizes.output_bytes - sizes.alias_bytes, 0), "that take no argument's place"),
        Buffer("activations and temporaries", sizes.temp_bytes, "live at the peak"),
        *([Buffer("code", sizes.code_bytes)] if sizes.code_bytes else []),
    ]
