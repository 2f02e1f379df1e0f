"""The evaluation side of the data: held-out documents as batches, as text, and what ties the two together.

Whatever the packing of the training rows, evaluation packs documents that are hidden from each other, cut into
windows of T predictions: its numbers do not depend on how a run packs. Rows come in one fixed order that mixes all sources, so that
the first few batches are a sample of all of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from jaxllm.config import DataConfig
from jaxllm.data.corpus import Corpus
from jaxllm.data.mixture import Places
from jaxllm.data.packing import permute
from jaxllm.data.rows import Arrays, PackedCorpus, Rows, empty
from jaxllm.data.source import Source
from jaxllm.data.tokenizer import Tokenizer


class Window(NamedTuple):
    """A stretch of a held-out document that one evaluation row predicts."""

    row: int
    """Evaluation row, counted over all batches."""
    document: int
    """Index into the held-out texts."""
    first: int
    """The first predicted token, counted in the document's tokens."""
    last: int
    """One past the last predicted token."""
    num_bytes: int
    """Bytes of text that the predictions with loss stand for."""


class HeldOut:
    """Held-out documents of some sources.

    Args:
      fraction: of each corpus, by hash; None takes all of it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        corpora: Sequence[Corpus],
        fraction: float | None,
        tokenizer: Tokenizer,
        config: DataConfig,
        fill_id: int,
    ) -> None:
        self.sources, self.tokenizer, self.fraction = sources, tokenizer, fraction
        self.packed = [
            PackedCorpus(
                corpus, held_out=None if fraction is None else True, fraction=fraction or 0.0, sequence_length=config.sequence_length,
                packing="first_fit", separate=True, key=None,
            )
            for corpus in corpora
        ]  # fmt: skip
        self._rows = Rows(self.packed, replace(config, mixture="concatenate"), None, fill_id)

    @cached_property
    def num_documents(self) -> int:
        """Documents held out."""
        return sum(len(packed.documents) for packed in self.packed)

    @cached_property
    def _places(self) -> Places:
        counts = [packed.plan(0).num_rows for packed in self.packed]
        source = np.repeat(np.arange(len(counts)), counts)
        places = Places(source, np.zeros_like(source), np.concatenate([np.arange(count) for count in counts]))
        return Places(*(part[np.argsort(self._row_of(len(source)))] for part in places))

    def _row_of(self, num: int) -> np.ndarray:
        """Where each row, counted source by source, comes in the order of evaluation."""
        return permute(np.arange(num), num, key=0)

    @property
    def num_rows(self) -> int:
        """Evaluation rows."""
        return len(self._places.row)

    def batches(self, batch_size: int, rows: Callable[[int], np.ndarray] | None = None) -> Iterator[Arrays]:
        """Every held-out prediction once; the last batch is filled up with rows of loss_mask 0.

        Args:
          rows: batch size -> which rows of a batch this process wants; None for all.
        """
        members = np.arange(batch_size) if rows is None else rows(batch_size)
        for start in range(0, self.num_rows, batch_size):
            wanted = start + members
            there = wanted < self.num_rows
            real = self._rows.at(Places(*(part[wanted[there]] for part in self._places)))
            arrays = empty(len(members), real["tokens"].shape[1], self._rows.fill_id)
            for name, array in arrays.items():
                array[there] = real[name]
            yield arrays

    def texts(self) -> Iterator[str]:
        """The documents, in the order in which windows count them."""
        for source, packed in zip(self.sources, self.packed, strict=True):
            for index in packed.documents:
                yield source[int(index)].content

    @cached_property
    def windows(self) -> list[Window]:
        """What each row predicts, in the order of the rows.

        Nats over all rows / ln 2 / bytes over all windows = bits per byte.
        """
        size_of = np.array([len(self.tokenizer.token_bytes(id)) for id in range(self.tokenizer.num_vocab)], np.int64)
        out: list[Window] = []
        row = document = 0
        row_of = self._row_of(self.num_rows)
        for packed in self.packed:
            plan, corpus = packed.plan(0), packed.corpus
            rows = np.repeat(np.arange(plan.num_rows), np.diff(plan.rows))
            owners = np.searchsorted(corpus.offsets, plan.starts, side="right") - 1
            for r, owner, start, length in zip(rows.tolist(), owners.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True):
                begin, end = int(corpus.offsets[owner]), int(corpus.offsets[owner + 1])
                labels = np.arange(start + 1, start + 1 + length)
                num_bytes = int((size_of[corpus.tokens[labels]] * corpus.carries_loss(labels)).sum())
                if start == begin and self.tokenizer.bos_id is not None and corpus.carries_loss(labels[:1])[0]:
                    # A space that the tokenizer put before the document is not in its text; what a chat's template wrote counts.
                    longer = size_of[corpus.tokens[begin:end]].sum() > corpus.sizes[owner]
                    num_bytes -= longer and self.tokenizer.token_bytes(int(corpus.tokens[begin + 1])).startswith(b" ")
                index = document + int(np.searchsorted(packed.documents, owner))
                out.append(Window(int(row_of[row + r]), index, labels[0] - begin, labels[-1] + 1 - begin, num_bytes))
            row, document = row + plan.num_rows, document + len(packed.documents)
        return sorted(out)

    def window_bytes(self, window: Window) -> bytes:
        """The text that a window predicts, without its context: what a compressor of the same window may be given."""
        document = window.document
        for packed in self.packed:
            if document < len(packed.documents):
                begin = int(packed.corpus.offsets[packed.documents[document]])
                tokens = packed.corpus.tokens[begin + window.first : begin + window.last]
                return b"".join(self.tokenizer.token_bytes(int(id)) for id in tokens)
            document -= len(packed.documents)
        raise IndexError(f"no held-out document {window.document}; there are {self.num_documents}")
