"""Rows of token arrays out of corpora and plans: random access by row number of the run, NumPy only.

This is what grain's worker processes unpickle, so nothing here imports jax.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import DataConfig
from jaxllm.data import cache as caching
from jaxllm.data.corpus import Corpus
from jaxllm.data.mixture import Order, Places
from jaxllm.data.packing import Packing, Plan, combine, make_plan
from jaxllm.data.position import Position
from jaxllm.data.ramp import Ramp
from jaxllm.data.taught import Layout, Taught, nothing

type Arrays = dict[str, np.ndarray]
"""tokens, labels, loss_mask, segment_ids, positions [B T], source [B], and what losses need besides under `extra(name)`, B first."""

EXTRAS = "extras/"

_VERSION = "v1"
_OPEN_PLANS = 8
_ENDLESS = 1 << 40


class Counts(NamedTuple):
    """Of one epoch's plan."""

    num_rows: int
    num_inputs: int


class PackedCorpus:
    """One corpus with its plan of every epoch, each planned once and kept beside the corpus.

    No plan is ever deleted: another run, on another host too, may have it mapped, and a mapped file that goes ends its reader.

    Args:
      held_out: which side of the held-out split; None for all documents.
      key: of the order of the documents; None keeps their own, and all epochs are the same.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        held_out: bool | None,
        fraction: float,
        sequence_length: int,
        packing: Packing,
        separate: bool,
        key: int | None,
    ) -> None:
        self.corpus, self.held_out, self.fraction = corpus, held_out, fraction if held_out is not None else 0.0
        self.sequence_length, self.packing, self.separate, self.key = sequence_length, packing, separate, key
        self._plans: OrderedDict[int, Plan] = OrderedDict()

    @cached_property
    def documents(self) -> np.ndarray:
        """Indices of the documents on this side of the split."""
        return self.corpus.documents(self.held_out, self.fraction)

    def plan(self, epoch: int) -> Plan:
        """The plan of one epoch."""
        epoch = 0 if self.key is None else epoch
        plan = self._plans.get(epoch)
        if plan is None:
            key = None if self.key is None else combine(self.key, epoch)
            folder = caching.folder(self.corpus.folder / f"plan-{self._name(key)}", lambda to: self._make(key).save(to))
            self._plans[epoch] = plan = Plan.load(folder)
            while len(self._plans) > _OPEN_PLANS:
                self._plans.popitem(last=False)
        return plan

    def counts(self, epoch: int) -> Counts:
        """Of one epoch; once counted, its plan is not opened for them."""
        epoch = 0 if self.key is None else epoch

        def count() -> Counts:
            plan = self.plan(epoch)
            return Counts(plan.num_rows, int(plan.lengths.sum()))

        return Counts(*caching.remembered(self.corpus.folder / f"counts-{self._name(self.key)}.json", str(epoch), count))

    def _name(self, key: int | None) -> str:
        return caching.key(_VERSION, self.held_out, self.fraction, self.sequence_length, self.packing, self.separate, key)

    def _make(self, key: int | None) -> Plan:
        return make_plan(self.corpus.offsets, self.documents, self.sequence_length, self.packing, separate=self.separate, key=key)

    def __reduce__(self) -> Any:
        names = ("held_out", "fraction", "sequence_length", "packing", "separate", "key")
        return _reopen, (self.corpus, {name: getattr(self, name) for name in names})


def _reopen(corpus: Corpus, options: dict[str, Any]) -> PackedCorpus:
    return PackedCorpus(corpus, **options)


class Rows:
    """Any rows of a run, by number.

    Args:
      taught: what teachers expect at each position, by name, corpus by corpus.
    """

    def __init__(
        self, packed: Sequence[PackedCorpus], config: DataConfig, key: int | None, fill_id: int, taught: Mapping[str, Sequence[Taught]] = {}
    ) -> None:
        self.packed, self.config, self.key, self.fill_id, self.taught = list(packed), config, key, fill_id, dict(taught)
        self.order = Order(config, lambda source, epoch: self.packed[source].counts(epoch).num_rows, key)

    def __reduce__(self) -> Any:
        return Rows, (self.packed, self.config, self.key, self.fill_id, self.taught)

    def read(self, rows: np.ndarray) -> Arrays:
        """The arrays of these rows of the run, in order."""
        return self.at(self.order.places(rows))

    def at(self, places: Places) -> Arrays:
        """The arrays of the rows at these places; rows of one plan are gathered at once."""
        out = empty(len(places.row), self.config.sequence_length, self.fill_id)
        out["source"][:] = places.source
        for name, corpora in self.taught.items():
            out |= _untaught(name, corpora[0].meta.layout, out["tokens"].shape)
        for source, epoch in set(zip(places.source.tolist(), places.epoch.tolist(), strict=True)):
            packed = self.packed[source]
            plan = packed.plan(epoch)
            members = np.flatnonzero((places.source == source) & (places.epoch == epoch))
            wanted = places.row[members]
            counts = plan.rows[wanted + 1] - plan.rows[wanted]
            pieces = np.repeat(plan.rows[wanted] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
            index, at = fill(out, np.repeat(members, counts), plan.starts[pieces], plan.lengths[pieces], packed.corpus, packed.separate)
            for name, corpora in self.taught.items():
                for field, values in corpora[source].at(index).top._asdict().items():
                    out[extra(f"{name}/{field}")][at] = values
        return out


class Steps:
    """The batches of a run as a random-access source for grain: element i is (arrays, None) of step position.step + i.

    Args:
      wanted: batch size -> which rows of such a batch to read.
    """

    def __init__(self, rows: Rows, ramp: Ramp, position: Position, wanted: dict[int, np.ndarray]) -> None:
        self._rows, self._ramp, self._position, self._wanted = rows, ramp, position, wanted

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: Any) -> tuple[Arrays, None]:
        batch_id = Position(self._position.step + int(index), self._position.skipped).batch_id
        members = self._wanted[self._ramp.batch_size(batch_id)]
        return self._rows.read(self._ramp.first_row(batch_id) + members), None


def empty(num_rows: int, sequence_length: int, fill_id: int) -> Arrays:
    """Rows of padding."""
    shape = (num_rows, sequence_length)
    return {
        "tokens": np.full(shape, fill_id, np.int32),
        "labels": np.full(shape, fill_id, np.int32),
        "loss_mask": np.zeros(shape, np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "source": np.zeros(num_rows, np.int32),
    }


def extra(name: str) -> str:
    """Key, among `Arrays`, of what becomes `Batch.extras[name]`."""
    return f"{EXTRAS}{name}"


def _untaught(name: str, layout: Layout, shape: tuple[int, ...]) -> Arrays:
    """Rows of which a teacher says nothing."""
    best = nothing(layout, math.prod(shape))
    return {extra(f"{name}/{field}"): values.reshape(*shape, *values.shape[1:]) for field, values in best.top._asdict().items()}


type At = tuple[np.ndarray, np.ndarray]
"""(row, column) of each token."""


def fill(out: Arrays, row: np.ndarray, starts: np.ndarray, lengths: np.ndarray, corpus: Corpus, separate: bool) -> tuple[np.ndarray, At]:
    """Write pieces into rows of padding, one after the other within each row; returns each input's flat position, and where it is.

    Args:
      row: [num] row of each piece, pieces of a row being consecutive.
      starts, lengths: [num] which tokens of the corpus are the inputs.
      separate: number the pieces of a row as segments 1, 2, … with positions from 0; else a row is one segment.
    """
    if not len(row):
        return np.empty(0, np.int64), (np.empty(0, np.int64), np.empty(0, np.int64))
    lengths = lengths.astype(np.int64)
    before = np.cumsum(lengths) - lengths  # places taken by earlier pieces, over all rows
    is_first = np.diff(row, prepend=-1) != 0
    row_begin = np.maximum.accumulate(np.where(is_first, before, 0))
    piece_begin = np.maximum.accumulate(np.where(is_first, np.arange(len(row)), 0))
    within = np.arange(lengths.sum()) - np.repeat(before, lengths)
    index = np.repeat(starts, lengths) + within
    at = (np.repeat(row, lengths), within + np.repeat(before - row_begin, lengths))
    # A piece that ends where a document ends has eos as its last input, which predicts nothing.
    ends = starts + lengths
    is_border = corpus.offsets[np.searchsorted(corpus.offsets, ends)] == ends
    predicts = np.ones(len(index), bool)
    predicts[before[is_border] + lengths[is_border] - 1] = False
    label = index[predicts] + 1
    where = (at[0][predicts], at[1][predicts])
    out["tokens"][at] = corpus.tokens[index]
    out["labels"][where] = corpus.tokens[label]
    out["loss_mask"][where] = corpus.carries_loss(label)
    out["segment_ids"][at] = np.repeat(np.arange(len(row)) - piece_begin + 1, lengths) if separate else 1
    out["positions"][at] = within if separate else at[1]
    return index, at
