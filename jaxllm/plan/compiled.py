"""What XLA says of a compiled step: bytes per chip, the largest buffers by the code that makes them, and its collectives.

On TPU both memory and buffers come from the files that `xla_dump_to` writes, because the serialised buffer assignment is empty
there; elsewhere memory is what `memory_analysis()` says. All are sizes on one chip.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxllm.flops import TokenFlops
from jaxllm.plan import hlo
from jaxllm.plan.arithmetic import Buffer as Part
from jaxllm.plan.collectives import Collective
from jaxllm.plan.work import Work


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip."""

    argument_bytes: int
    """State, frozen weights and the batch."""
    output_bytes: int
    """State and metrics."""
    alias_bytes: int
    """Outputs that take an argument's place: donation."""
    temp_bytes: int
    """Activations and whatever else lives inside the step."""
    code_bytes: int | None
    """The program itself; None where code was not generated."""

    @property
    def total_bytes(self) -> int:
        """What a chip must have free."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes + (self.code_bytes or 0)


@dataclass(frozen=True)
class Buffer:
    """A piece of the temporary memory of one chip, and what it is mostly used for."""

    num_bytes: int
    shape: str
    op_name: str
    """JAX's name of the operation that fills it."""
    where: str
    """`file:line function` of ours, '' where XLA made it."""
    phase: str
    """forward, backward, or recomputed in the backward pass; 'update' is what comes after."""


@dataclass(frozen=True)
class Compiled:
    """One step, compiled for one machine."""

    memory: Memory
    buffers: Sequence[Buffer]
    collectives: Sequence[Collective]
    unknown_loops: Sequence[str]
    """Loops with collectives whose number of trips the text does not say; they count once."""
    mesh: Mapping[str, int]
    notes: Sequence[str]
    seconds: Mapping[str, float]
    """Wall clock of tracing and lowering, and of compiling."""
    versions: Mapping[str, str]
    work: Work
    """Of the step as it was traced for this machine, on all chips."""
    num_params: int
    state: Sequence[Part]
    """What lies in one chip's memory between steps, by its parts."""
    per_token: TokenFlops
    """As `train` counts it."""
    causal_per_token: TokenFlops


def analysed(executable: Any) -> Memory:
    """The statistics of a compiled program."""
    stats = executable.memory_analysis()
    return Memory(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
        code_bytes=stats.generated_code_size_in_bytes,
    )


# ------------------------------------------------------------------------------- what XLA wrote down


def dumped(folder: Path, kind: str) -> str | None:
    """The text of the dump file whose name ends in `kind`, of the largest module in the folder."""
    found = sorted(folder.glob(f"*{kind}"), key=lambda path: path.stat().st_size)
    return found[-1].read_text() if found else None


@dataclass(frozen=True)
class Value:
    """An array that XLA placed in memory."""

    name: str
    """Of the instruction that makes it."""
    offset: int
    num_bytes: int
    shape: str


@dataclass(frozen=True)
class Allocation:
    """One piece of memory with the values that share it."""

    num_bytes: int
    color: int
    """0 is the chip's main memory."""
    kind: str
    """'parameter', 'output', 'temp', 'constant' or 'thread-local'."""
    values: tuple[Value, ...]


def allocations(text: str) -> list[Allocation]:
    """The buffer assignment of a module, from its dump."""
    found: list[Allocation] = []
    for block in re.split(r"(?m)^(?=allocation \d+:)", text)[1:]:
        head, *lines = block.splitlines()
        size = re.search(r"size (\d+)", head)
        color = re.search(r"color (\d+)", head)
        assert size, head
        matches = (re.match(r"\s*value: <\d+ ([^\s@{]+)\S*.*? \(size=(\d+),offset=(\d+)\): (\S+)", line) for line in lines)
        values = tuple(Value(m[1], int(m[3]), int(m[2]), re.sub(r"\{.*", "", m[4])) for m in matches if m)
        kinds = {"preallocated-temp": "temp", "parameter": "parameter", "output": "output", "constant": "constant"}
        kind = next((name for word, name in kinds.items() if word in head), "thread-local")
        found.append(Allocation(int(size[1]), int(color[1]) if color else 0, kind, values))
    return found


def assigned(found: Sequence[Allocation]) -> Memory:
    """What the buffer assignment alone says, before code is generated."""
    total = lambda *kinds: sum(a.num_bytes for a in found if a.kind in kinds and a.color == 0)
    return Memory(
        argument_bytes=total("parameter"),
        output_bytes=total("output"),  # those that take no argument's place
        alias_bytes=0,
        temp_bytes=total("temp", "constant"),
        code_bytes=None,
    )


def measured(executable: Any, found: Sequence[Allocation]) -> Memory:
    """The buffer assignment where XLA wrote one, with the size of the code where there is code; else the statistics.

    The statistics of libtpu 0.0.50 report up to 1.4 times the temporaries that it assigns; what it refuses for want of memory, and the
    statistics of 0.0.51, go by the assignment.
    """
    if not found:
        return analysed(executable)
    code = None if executable is None else executable.memory_analysis().generated_code_size_in_bytes
    return replace(assigned(found), code_bytes=code)


def largest(found: Sequence[Allocation], program: str, limit: int = 12) -> list[Buffer]:
    """The pieces that make up the temporary memory, largest first: each address counts for the largest value that lies there.

    So the sizes add up to no more than the memory, whatever shares a place at other times is left out, and XLA's own scratch
    has no name.

    Args:
      program: the text of the optimised module.
    """
    module, frames = hlo.parse(program), _Frames(program)
    instructions = {name.removeprefix("%"): i for lines in module.computations.values() for name, i in lines.items()}
    taken: list[Value] = []
    for value in sorted((v for a in found if a.kind == "temp" and a.color == 0 for v in a.values), key=lambda v: -v.num_bytes):
        if len(taken) == limit:
            break
        if all(value.offset + value.num_bytes <= t.offset or t.offset + t.num_bytes <= value.offset for t in taken):
            taken.append(value)
    return [_buffer(value, instructions.get(value.name), frames) for value in taken]


def _buffer(value: Value, made_by: hlo.Instruction | None, frames: _Frames) -> Buffer:
    op_name = made_by.op_name if made_by else ""
    return Buffer(value.num_bytes, value.shape, op_name, frames.where(made_by.attributes) if made_by else "", phase(op_name))


def phase(op_name: str) -> str:
    """When in the step an operation runs, by JAX's name of it.

    >>> phase('jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/Block/mlp/up/dot_general')
    'recomputed'
    """
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "update" if op_name.startswith("jit(") else ""


class _Frames:
    """The tables at the head of a module that turn `stack_frame_id=7` into a line of Python."""

    def __init__(self, program: str) -> None:
        head = program[: program.find("\n%")]
        part = lambda name: re.findall(r"(?m)^(\d+) (.*)$", _section(head, name))
        self._files = {int(n): text.strip('"') for n, text in part("FileNames")}
        self._functions = {int(n): text.strip('"') for n, text in part("FunctionNames")}
        number = lambda text, name: int(m[1]) if (m := re.search(rf"\b{name}=(\d+)", text)) else 0
        names = ("file_name_id", "function_name_id", "line")
        self._places = {int(n): tuple(number(text, name) for name in names) for n, text in part("FileLocations")}
        self._frames = {int(n): (number(t, "file_location_id"), number(t, "parent_frame_id")) for n, t in part("StackFrames")}

    def where(self, attributes: str) -> str:
        """The innermost line of ours, as `file:line function`."""
        found = re.search(r"stack_frame_id=(\d+)", attributes)
        frame, seen = int(found[1]) if found else 0, set[int]()
        while frame in self._frames and frame not in seen:
            seen.add(frame)
            location, parent = self._frames[frame]
            file, function, line = self._places.get(location, (0, 0, 0))
            path = self._files.get(file, "")
            if "/jaxllm/" in path and "site-packages/jax/" not in path:
                return f"jaxllm/{path.rsplit('/jaxllm/', 1)[1]}:{line} {self._functions.get(function, '').replace('.<locals>', '')}"
            frame = parent - 1 if parent - 1 in self._frames else 0
        return ""


def _section(head: str, name: str) -> str:
    found = re.search(rf"(?m)^{name}\n((?:\d+ .*\n?)*)", head)
    return found[1] if found else ""
