"""Read the collectives of a compiled program, so that tests can say what may and may not be communicated.

    program = jax.jit(f).lower(*args).compile()
    gathers = select(collectives(program.as_text(), mesh.shape), 'all-gather', axis='model')

XLA:CPU merges reductions of several arrays into one operation on a tuple, hence `operands`: count those.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclass(frozen=True)
class Array:
    """An array in HLO: element type and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Collective:
    """One collective operation."""

    op: str
    name: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    axes: tuple[str, ...]
    """Mesh axes over which it communicates."""
    in_loop: bool
    """Whether it runs once per iteration of some loop."""
    source: str
    """JAX's name of the operation it came from."""

    @property
    def largest(self) -> int:
        """Elements of its largest operand or result, per device."""
        return max((a.size for a in (*self.operands, *self.results)), default=0)


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective of an optimised HLO module that talks to another device.

    Args:
      text: `compiled.as_text()`.
      mesh_shape: axis name -> size, in the order of the device grid.
    """
    bodies = _computations(text)
    loops = _in_loops(bodies)
    found = []
    for computation, lines in bodies.items():
        shapes = _shapes(lines)
        for line in lines:
            match = re.match(rf"\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ({'|'.join(OPS)})(-start)?\((.*?)\)(.*)", line)
            if not match:
                continue
            name, result, op, _, arguments, attributes = match.groups()
            axes = _axes(_groups(attributes, math.prod(mesh_shape.values())), mesh_shape)
            if not axes:
                continue
            operands = tuple(a for arg in re.findall(r"%[\w.\-]+", arguments) for a in shapes.get(arg, ()))
            source = re.search(r'op_name="([^"]*)"', line)
            found.append(Collective(op, name, operands, _arrays(result), axes, computation in loops, source.group(1) if source else ""))
    return found


def select(
    found: Iterable[Collective], *ops: str, axis: str | None = None, in_loop: bool | None = None, min_size: int = 0
) -> list[Collective]:
    """Those of the given kinds that cross `axis`, in or out of a loop, with an array of at least `min_size` elements."""
    return [
        c
        for c in found
        if (not ops or c.op in ops)
        and (axis is None or axis in c.axes)
        and (in_loop is None or c.in_loop == in_loop)
        and c.largest >= min_size
    ]


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?(%[\w.\-]+) \(.*\{\s*$", line)
        if header:
            current = bodies.setdefault(header.group(1), [])
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    assert bodies, "no computation found: is this HLO text?"
    return bodies


def _in_loops(bodies: dict[str, list[str]]) -> set[str]:
    """Computations reachable from the body or condition of a while."""
    calls = {name: {c for line in lines for c in re.findall(r"%[\w.\-]+", line) if c in bodies} for name, lines in bodies.items()}
    queue = [
        called
        for lines in bodies.values()
        for line in lines
        if re.search(r" while\(", line)
        for called in re.findall(r"(?:body|condition)=(%[\w.\-]+)", line)
    ]
    seen: set[str] = set()
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue.extend(calls[name])
    return seen


def _arrays(text: str) -> tuple[Array, ...]:
    pairs = re.findall(r"\b((?:bf|f|s|u|pred|c)\d*)\[([\d,]*)\]", text)
    return tuple(Array(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in pairs)


def _shapes(lines: list[str]) -> dict[str, tuple[Array, ...]]:
    shapes = {}
    for line in lines:
        if match := re.match(r"\s*(?:ROOT )?(%[\w.\-]+) = (.*?) [\w\-]+\(", line):
            shapes[match.group(1)] = _arrays(match.group(2))
    return shapes


def _groups(attributes: str, num_devices: int) -> np.ndarray | list[list[int]]:
    """Replica groups in any of XLA's spellings, or the pairs of a permute.

    {{0,1},{2,3}}    [2,2]<=[4]    [2,2]<=[2,2]T(1,0)    mesh['data'=2,'model'=2] {'data'}
    """
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match.group(1))}
        grid, names = np.arange(num_devices).reshape(tuple(sizes.values())), list(sizes)
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match.group(2)):
            axis = names.index(name)
            split = (int(before), int(size), -1) if size else (1, sizes[name], 1)
            grid = grid.reshape(*grid.shape[:axis], *split, *grid.shape[axis + 1 :])
            names[axis : axis + 1] = [f"{name} before", "", f"{name} after"]
        inside = [i for i, name in enumerate(names) if name == ""]
        return np.moveaxis(grid, inside, range(-len(inside), 0)).reshape(-1, math.prod(grid.shape[i] for i in inside))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, tiles, order = ([int(n) for n in g.split(",")] if g else None for g in match.groups())
        ids = np.arange(num_devices).reshape(tiles)
        return (ids if order is None else ids.transpose(order)).reshape(shape)
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = [[int(n) for n in g.split(",") if n] for g in re.findall(r"\{([\d,]*)\}", match.group(1))]
        return groups or [list(range(num_devices))]
    raise AssertionError(f"no replica groups in: {attributes[:200]}")


def _axes(groups: np.ndarray | list[list[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ."""
    sizes = tuple(mesh_shape.values())
    crossed = np.zeros(len(sizes), bool)
    for group in groups:
        coordinates = np.stack(np.unravel_index(np.asarray(group), sizes))
        crossed |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(axis for axis, cross in zip(mesh_shape, crossed, strict=True) if cross)
