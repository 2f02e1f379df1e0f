"""Where a run is in its data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Position:
    """The next batch to train: plain JSON, and enough to go on from.

    >>> Position(step=5, skipped=((2, 4),)).batch_id
    7
    """

    step: int = 0
    """Batches trained."""
    skipped: tuple[tuple[int, int], ...] = ()
    """Batch ids first … last - 1 that are never trained, as sorted disjoint ranges (first, last)."""
    reader: dict[str, Any] | None = field(default=None, compare=False)
    """State of a source that cannot seek."""

    @property
    def batch_id(self) -> int:
        """The step-th batch id, from 0, that is not skipped."""
        id = self.step
        for first, last in self.skipped:
            if id >= first:
                id += last - first
        return id

    def following(self, reader: dict[str, Any] | None = None) -> Position:
        """The position once this batch is trained."""
        return replace(self, step=self.step + 1, reader=reader)

    def skip(self, first: int, last: int) -> Position:
        """Also skip batch ids first … last - 1. Every other id keeps its content.

        >>> Position(skipped=((2, 4),)).skip(3, 6).skipped
        ((2, 6),)
        """
        merged: list[tuple[int, int]] = []
        for start, end in sorted((*self.skipped, (first, last))):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            elif start < end:
                merged.append((start, end))
        return replace(self, skipped=tuple(merged))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"step": self.step, "skipped": [list(pair) for pair in self.skipped], "reader": self.reader}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Position:
        """The inverse of `to_json`."""
        return cls(values["step"], tuple((first, last) for first, last in values["skipped"]), values["reader"])
