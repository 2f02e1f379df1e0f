"""How long a collective takes: over the links between chips, and over the data-centre network where its group is larger than that.

Bandwidth only, no latency, every link at its published rate: bounds from below.

    ring, both ways     all-gather, reduce-scatter (n − 1)/n · bytes / (2 · link);  all-reduce twice that
                        all-to-all n/8 · bytes / link: a byte goes n/4 hops on average; half of one that does not wrap is twice as slow
    torus               a group over several dimensions uses the links of all of them
    switch              the same with the chip's whole bandwidth; all-to-all (n − 1)/n · bytes / bandwidth
    two levels          a group of n = inner · outer: the inner step on links, while 1/inner of the bytes crosses the network

Source: https://jax-ml.github.io/scaling-book/sharding (rings, tori), /gpus (two levels); NVIDIA nccl-tests, doc/PERFORMANCE.md (factors).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.chips import Chip
from jaxllm.plan import collectives

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One exchange between chips, as often as it runs in a step."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which the members of a group differ."""
    num_bytes: float
    """Of the whole array that a chip has before (reduce-scatter, all-reduce, all-to-all, permute) or after (all-gather)."""
    count: float = 1
    what: str = ""
    """What is exchanged, for people."""
    group: int = 0
    """Members of a group that lies on a part of its axes (one stage of several); 0: on all of them."""

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def moved_bytes(self, size: int) -> float:
        """Bytes that a chip of a group of `size` sends in all runs, by the best algorithm; what "bytes per chip" means in a plan."""
        return _share(self.kind, size) * self.num_bytes * self.count


def _share(kind: str, size: int) -> float:
    """Part of the whole array that a member of a group of `size` sends."""
    return {"all-reduce": 2 * (size - 1) / size, "collective-permute": 1.0}.get(kind, (size - 1) / size)


def of_compiled(found: collectives.Collective) -> Collective:
    """A collective that was read off a compiled program."""
    kind = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"}.get(found.kind, found.kind)
    group = 0 if kind == "collective-permute" else found.group_size
    return Collective(kind, found.axes, max(found.operand_bytes, found.result_bytes), found.times, found.op_name, group)


type Links = Callable[[Collective], dict[str, float]]
"""A collective -> seconds on each network that it uses: 'links …' between chips, 'network' between hosts or slices."""


def torus(chip: Chip, shape: Sequence[int], wraps: Sequence[bool], mesh: Mapping[str, int], slice_axis: str = "slice") -> Links:
    """Links of TPU slices of `shape` chips each.

    Args:
      wraps: which dimensions are rings.
      mesh: axis -> size, slow to fast. All axes but `slice_axis` lie inside a slice.
    """
    inside = {axis: size for axis, size in mesh.items() if axis != slice_axis}
    assert math.prod(inside.values()) == math.prod(shape), f"{dict(mesh)} does not fill a slice of {tuple(shape)}"
    lies = place(shape, wraps, inside)

    def seconds(collective: Collective) -> dict[str, float]:
        here = [axis for axis in collective.axes if axis in inside and inside[axis] > 1]
        dims = [piece for axis in here for piece in lies[axis]]
        inner, outer = math.prod(mesh[axis] for axis in here), mesh.get(slice_axis, 1) if slice_axis in collective.axes else 1
        if outer == 1 and 1 < collective.group < inner:  # one stage of several, along the dimensions that it fills
            inner = collective.group
            dims = _subset(dims, inner) or sorted(dims)[-1:]
        out = {}
        if inner > 1:
            out[f"links {'+'.join(here)}"] = collective.count * _on_torus(collective, inner, dims, chip.link_bytes_per_second)
        if outer > 1:
            each = _exchange(collective.kind, outer, collective.num_bytes / inner, chip.network_bytes_per_second)
            out["network"] = collective.count * each
        return out

    return seconds


def switch(chip: Chip, mesh: Mapping[str, int], chips_per_host: int) -> Links:
    """Links of hosts whose chips share a switch; devices lie in the mesh host by host, the last axis fastest."""
    sizes = tuple(mesh.values())
    hosts = np.arange(math.prod(sizes)).reshape(sizes) // chips_per_host

    def seconds(collective: Collective) -> dict[str, float]:
        group = hosts[tuple(slice(None) if axis in collective.axes else 0 for axis in mesh)].ravel()
        outer = len(set(group.tolist()))
        inner = len(group) // outer
        out = {}
        if inner > 1:
            out["links"] = collective.count * _exchange(collective.kind, inner, collective.num_bytes, chip.link_bytes_per_second)
        if outer > 1:
            share = collective.num_bytes / (1 if collective.kind in ("all-to-all", "collective-permute") else inner)
            out["network"] = collective.count * _exchange(collective.kind, outer, share, chip.network_bytes_per_second)
        return out

    return seconds


type Piece = tuple[int, bool]
"""(chips in a row, whether the last is linked to the first)."""


def place(shape: Sequence[int], wraps: Sequence[bool], mesh: Mapping[str, int]) -> dict[str, list[Piece]]:
    """Which dimensions of a torus each mesh axis lies on: whole ones where sizes allow, else parts of one, which do not wrap.

    >>> place((12, 16, 16), (True,) * 3, {'data': 256, 'model': 12})
    {'data': [(16, True), (16, True)], 'model': [(12, True)]}
    """
    free = sorted(zip(shape, wraps, strict=True), key=lambda piece: -piece[0])
    found: dict[str, list[Piece]] = {}
    for axis, size in sorted(mesh.items(), key=lambda item: -item[1]):
        whole = _subset(free, size)
        if whole is None:
            whole, free, rest = [], list(free), size
            while rest > 1:
                index = max(range(len(free)), key=lambda i: math.gcd(free[i][0], rest))
                part = math.gcd(free[index][0], rest)
                if part == 1:
                    break  # sizes with nothing in common: a mesh that no compiler lays on this torus either
                length, wrap = free.pop(index)
                whole.append((part, wrap and part == length))
                if part < length:
                    free.append((length // part, False))
                rest //= part
        else:
            for piece in whole:
                free.remove(piece)
        found[axis] = whole
    return {axis: found[axis] for axis in mesh}


def _subset(pieces: Sequence[Piece], size: int) -> list[Piece] | None:
    """Some of the pieces whose sizes multiply to `size`, the fewest."""
    if size == 1:
        return []
    best: list[Piece] | None = None
    for i, piece in enumerate(pieces):
        if piece[0] > 1 and size % piece[0] == 0:
            rest = _subset(pieces[i + 1 :], size // piece[0])
            if rest is not None and (best is None or len(rest) + 1 < len(best)):
                best = [piece, *rest]
    return best


def _on_torus(collective: Collective, size: int, dims: Sequence[Piece], link: float) -> float:
    """Seconds of one run in a group of `size` chips along `dims`."""
    if collective.kind == "collective-permute":
        return collective.num_bytes / link
    if collective.kind == "all-to-all":
        return max((length * collective.num_bytes / ((8 if wrap else 4) * link) for length, wrap in dims if length > 1), default=0.0)
    bandwidth = sum((2 if wrap and length > 2 else 1) * link for length, wrap in dims if length > 1)
    return _exchange(collective.kind, size, collective.num_bytes, bandwidth)


def _exchange(kind: str, size: int, num_bytes: float, bandwidth: float) -> float:
    """Seconds of one run among `size` members that each send at `bandwidth`."""
    return _share(kind, size) * num_bytes / bandwidth
