"""Which source's which row is row r of the run: a function of r, found by cumulative sums, never by replaying.

concatenate   an epoch is the rows of all sources, permuted as one; each row once
weighted      rows are dealt to the sources in proportion to weights that may change at given rows; each
              source runs through its own epochs
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np

from jaxllm.config import ConfigError, DataConfig
from jaxllm.data.packing import combine, permute


class Places(NamedTuple):
    """Where rows are: row `row[i]` of the plan of epoch `epoch[i]` of source `source[i]`."""

    source: np.ndarray
    epoch: np.ndarray
    row: np.ndarray


class Order:
    """Places of the rows of a run.

    Args:
      num_rows: (source, epoch) -> rows in that epoch of that source; asked for no later epoch than is needed.
      key: of the order; None keeps rows in the order of the plans.
    """

    def __init__(self, config: DataConfig, num_rows: Callable[[int, int], int], key: int | None) -> None:
        self._num_sources, self._num_rows, self._key = len(config.sources), num_rows, key
        self._shares = shares(config) if config.mixture == "weighted" else None
        self._starts: dict[int, list[int]] = {}

    def epoch_rows(self, epoch: int) -> int:
        """Rows of all sources in one epoch."""
        return sum(self._num_rows(source, epoch) for source in range(self._num_sources))

    def places(self, rows: np.ndarray) -> Places:
        """The places of these rows of the run."""
        if self._shares is None:
            epoch, row = self._in_epochs(rows, -1, self.epoch_rows)
            source = np.zeros_like(row)
            for e in np.unique(epoch):
                at = epoch == e
                ends = np.cumsum([self._num_rows(s, int(e)) for s in range(self._num_sources)])
                source[at] = np.searchsorted(ends, row[at], side="right")
                row[at] -= np.concatenate([[0], ends])[source[at]]
            return Places(source, epoch, row)
        dealt = np.array([self._shares.locate(int(row)) for row in rows], np.int64).reshape(-1, 2)
        source, row = dealt[:, 0], dealt[:, 1].copy()
        epoch = np.zeros_like(row)
        for s in np.unique(source).tolist():
            at = source == s
            epoch[at], row[at] = self._in_epochs(row[at], s, partial(self._num_rows, s))
        return Places(source, epoch, row)

    def _in_epochs(self, rows: np.ndarray, sequence: int, num_rows: Callable[[int], int]) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, permuted row within it) of positions in one endless sequence of epochs, by the epochs' cumulative sums."""
        starts = self._starts.get(sequence, [0])
        last = int(rows.max(initial=0))
        if starts[-1] <= last:
            starts = list(starts)  # readers in other threads keep the old list
            while starts[-1] <= last:
                starts.append(starts[-1] + num_rows(len(starts) - 1))
            self._starts[sequence] = starts
        epoch = np.searchsorted(starts, rows, side="right") - 1
        row = np.asarray(rows, np.int64) - np.array(starts)[epoch]
        if self._key is not None:
            for e in np.unique(epoch).tolist():
                row[epoch == e] = permute(row[epoch == e], starts[e + 1] - starts[e], combine(self._key, sequence, e))
        return epoch, row


# ------------------------------------------------------------------------------------------ weights


class Shares:
    """Rows dealt to sources by weight.

    Args:
      schedule: ((first row, weights), ...), the first row of the first being 0.
    """

    def __init__(self, schedule: Sequence[tuple[int, Sequence[float]]]) -> None:
        self._firsts = [first for first, _ in schedule]
        self._deals = [_deal([Fraction(weight) for weight in weights]) for _, weights in schedule]
        num = len(schedule[0][1])
        self._dealt = [[0] * num]
        for deal, first, end in zip(self._deals, self._firsts, self._firsts[1:], strict=False):
            self._dealt.append([before + _count(deal, source, end - first) for source, before in enumerate(self._dealt[-1])])

    def locate(self, row: int) -> tuple[int, int]:
        """(source, how many of the rows before this one were that source's).

        >>> [Shares([(0, (2, 1))]).locate(r) for r in range(4)]
        [(0, 0), (1, 0), (0, 1), (0, 2)]
        """
        segment = bisect_right(self._firsts, row) - 1
        node, index = self._deals[segment], row - self._firsts[segment]
        while isinstance(node, _Split):
            left = node.left_of(index)
            node, index = (node.left, left) if node.left_of(index + 1) > left else (node.right, index - left)
        return node, self._dealt[segment][node] + index


class _Split(NamedTuple):
    """Deal rows to two sides: of the first n, round(share * n) go left."""

    share: Fraction
    left: _Split | int
    right: _Split | int

    def left_of(self, num: int) -> int:
        return (2 * num * self.share.numerator + self.share.denominator) // (2 * self.share.denominator)


def _deal(weights: Sequence[Fraction]) -> _Split | int:
    """A Huffman tree over the sources.

    Each split is off by at most 1/2 and passes its own error on times a share. In a Huffman tree a node weighs
    at least as much as all it joined two levels below, so the errors along any path stay below 2 rows.
    """
    nodes: list[tuple[Fraction, int, _Split | int]] = [(weight, i, i) for i, weight in enumerate(weights) if weight > 0]
    while len(nodes) > 1:
        nodes.sort(key=lambda node: (-node[0], node[1]))
        (light, _, right), (heavy, first, left) = nodes.pop(), nodes.pop()
        nodes.append((heavy + light, first, _Split(heavy / (heavy + light), left, right)))
    return nodes[0][2]


def _count(node: _Split | int, source: int, num: int) -> int:
    """How many of the first `num` rows dealt by `node` go to `source`."""
    if not isinstance(node, _Split):
        return num if node == source else 0
    left = node.left_of(num)
    return _count(node.left, source, left) + _count(node.right, source, num - left)


def shares(config: DataConfig) -> Shares:
    """The weights of `config.sources`, then those of `config.mixture_schedule` from their rows on.

    Raises:
      ConfigError: weights that are negative, all zero or of the wrong number; rows that do not increase.
    """
    schedule = [*config.mixture_schedule]
    if not schedule or schedule[0][0] != 0:
        schedule.insert(0, (0, tuple(source.weight for source in config.sources)))
    for (first, weights), following in zip(schedule, [*schedule[1:], None], strict=True):
        if len(weights) != len(config.sources):
            raise ConfigError(
                f"data.mixture_schedule gives {len(weights)} weights from row {first} "
                f"and there are {len(config.sources)} sources; give one each"
            )
        if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
            raise ConfigError(f"the mixture's weights from row {first} are {tuple(weights)}; they must be 0 or more, finite, and not all 0")
        if following is not None and following[0] <= first:
            raise ConfigError(f"data.mixture_schedule has row {following[0]} after row {first}; first rows must be 0 or more and increase")
    return Shares(schedule)
