"""Hugging Face streaming: the one source that cannot seek.

Documents are read in blocks of `shuffle_buffer`, each block in a pseudo-random order. A checkpoint keeps where the
reader was when the block began, how much of the block is used, and the packer's open rows; resuming reads that
block again, and whatever the `datasets` library itself re-reads to find the place. Every host reads the whole
stream and keeps its own rows.
"""

from __future__ import annotations

import base64
import copy
import glob
import importlib
import os
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import ConfigError, DataConfig, SourceConfig
from jaxllm.data import cache as caching
from jaxllm.data.chat import Encoded, encode
from jaxllm.data.corpus import held_out_by_hash, split_hash
from jaxllm.data.packing import combine, permute
from jaxllm.data.rows import Arrays, empty
from jaxllm.data.source import Document, from_record
from jaxllm.data.tokenizer import Tokenizer

type State = dict[str, Any]

_NUM_OPEN = 64
"""Rows that the packer keeps open: they are part of every checkpoint."""
_UNSHUFFLED_BLOCK = 1000


class Head:
    """The first documents of a stream, kept in memory: they train a tokenizer and give the held-out documents."""

    def __init__(self, config: SourceConfig, num_documents: int, num_bytes: int) -> None:
        self.name, self.config = f"hf_stream:{config.path}", config
        self._documents: list[Document] = []
        for document in Reader(config).documents(None):
            self._documents.append(document)
            num_bytes -= len(document.content.encode())
            if len(self._documents) >= num_documents and num_bytes <= 0:
                break
        if not self._documents:
            raise ConfigError(f"the stream '{config.path}' has no documents; put some in it")
        self.fingerprint = caching.key(config.path, [split_hash(document) for document in self._documents])

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        return self._documents[index]

    def describe(self) -> dict[str, Any]:
        """What is known of a stream: its name and a hash of its first documents."""
        return {"path": self.config.path, "head_hash": self.fingerprint, "head_documents": len(self)}


class Reader:
    """An opened stream, which can go back to a state that it gave.

    Raises:
      ConfigError: no such data set or file.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self._dataset = _open(config)
        self._beginning = copy.deepcopy(self._dataset.state_dict())

    def documents(self, state: State | None) -> Iterator[Document]:
        """From `state`, or the beginning, to the end.

        Raises:
          ConfigError: a record without the field.
        """
        self._dataset.load_state_dict(copy.deepcopy(state or self._beginning))
        for number, record in enumerate(self._dataset):
            where = lambda number=number: f"'{self.config.path}' document {number + 1}{' after the resumed position' if state else ''}"
            yield from_record(record, self.config, where)

    def state(self) -> State:
        """Where the document after the last one given begins."""
        return copy.deepcopy(self._dataset.state_dict())


def _open(config: SourceConfig) -> Any:
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(f"an hf_stream source needs Hugging Face datasets ({error}); pip install 'jaxllm[stream]'") from None
    is_file = config.path.endswith((".jsonl", ".json", ".jsonl.gz"))
    files = sorted(glob.glob(os.path.expanduser(config.path))) if is_file else []
    if is_file and not files:
        raise ConfigError(f"data path '{config.path}' has no files (looked in {Path(config.path).parent.absolute()})")
    name, _, split = config.path.partition(":")
    try:
        if is_file:  # not load_dataset, which would ask the hub about a local file
            return library.Dataset.from_json(files, split="train", streaming=True)
        return library.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the library's own, its dependencies' and the network's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the stream '{config.path}' cannot be opened ({reason}); give 'name[:split]' or a .jsonl file") from None


# ----------------------------------------------------------------------------------------- packing


class Part(NamedTuple):
    """A run of inputs of one document, with what each predicts."""

    inputs: np.ndarray
    labels: np.ndarray
    loss: np.ndarray

    def cut(self, at: int) -> tuple[Part, Part]:
        """The first `at` places, and the rest."""
        return Part(*(array[:at] for array in self)), Part(*(array[at:] for array in self))


class Packer:
    """The packings of `packing.py`, with a bounded number of open rows and no view of what comes."""

    def __init__(self, config: DataConfig, fill_id: int) -> None:
        self._capacity, self._packing, self._fill_id = config.sequence_length, config.packing, fill_id
        self._separate = config.segment_mask and config.packing != "concatenate"
        self.open: list[list[Part]] = []
        self.ready: deque[list[Part]] = deque()

    def add(self, document: Encoded) -> None:
        """Place one document."""
        ids = document.ids.astype(np.int32)
        loss = np.ones(len(ids), np.float32) if document.loss is None else document.loss.astype(np.float32)
        labels, weights = ids[1:], loss[1:]
        if not self._separate:  # eos is an input, and its prediction carries no loss
            labels, weights = np.append(labels, np.int32(self._fill_id)), np.append(weights, np.float32(0))
        rest = Part(ids[: len(labels)], labels, weights)
        while len(rest.inputs):
            room = self._capacity - _size(self.open[0]) if self._packing == "concatenate" and self.open else self._capacity
            part, rest = rest.cut(room)
            self._place(part)

    def _place(self, part: Part) -> None:
        size = len(part.inputs)
        fitting = [row for row in self.open if _size(row) + size <= self._capacity] if self._packing != "none" else []
        if fitting:
            row = max(fitting, key=_size)
            row.append(part)
        else:
            row = [part]
            self.open.append(row)
        if _size(row) == self._capacity or self._packing == "none":
            self._close(row)
        elif len(self.open) > _NUM_OPEN:
            self._close(self.open[0])  # the oldest: no document waits for ever

    def _close(self, row: list[Part]) -> None:
        self.open = [other for other in self.open if other is not row]
        self.ready.append(row)

    def state(self) -> State:
        """Open and finished rows, as JSON."""
        return {"open": [_to_json(row) for row in self.open], "ready": [_to_json(row) for row in self.ready]}

    def restore(self, state: State) -> None:
        """The inverse of `state`."""
        self.open = [_from_json(row) for row in state["open"]]
        self.ready = deque(_from_json(row) for row in state["ready"])


def _size(row: list[Part]) -> int:
    return sum(len(part.inputs) for part in row)


def _to_json(row: list[Part]) -> list[list[str]]:
    return [[base64.b64encode(np.ascontiguousarray(array).tobytes()).decode() for array in part] for part in row]


def _from_json(row: list[list[str]]) -> list[Part]:
    types = (np.int32, np.int32, np.float32)
    return [Part(*(np.frombuffer(base64.b64decode(text), dtype) for text, dtype in zip(part, types, strict=True))) for part in row]


def assemble(rows: list[list[Part]], sequence_length: int, fill_id: int, segment_mask: bool) -> Arrays:
    """The arrays of packed rows."""
    out = empty(len(rows), sequence_length, fill_id)
    for r, row in enumerate(rows):
        at = 0
        for number, part in enumerate(row):
            end = at + len(part.inputs)
            out["tokens"][r, at:end], out["labels"][r, at:end], out["loss_mask"][r, at:end] = part
            out["segment_ids"][r, at:end] = number + 1 if segment_mask else 1
            out["positions"][r, at:end] = np.arange(len(part.inputs)) if segment_mask else np.arange(at, end)
            at = end
    return out


# ------------------------------------------------------------------------------------------ rows


class Stream:
    """Packed rows of an endless stream: a generator with a state.

    Args:
      fraction: documents held out by hash.
      seed: of the order within a block.
      state: what `state()` gave, or None to begin.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, fill_id: int, fraction: float, seed: int, state: State | None) -> None:
        self.config, self._tokenizer, self._fraction, self._seed = config, tokenizer, fraction, seed
        self._packer = Packer(config, fill_id)
        self._epoch, self._block, self._used, self._begins = 0, 0, 0, None
        if state is not None:
            self._packer.restore(state["packer"])
            self._epoch, self._block, self._used, self._begins = (state[name] for name in ("epoch", "block", "used", "begins"))
        self._documents = self._read()

    def state(self) -> State:
        """Where the block in use begins, how much of it is used, and the packer's rows."""
        return {"epoch": self._epoch, "block": self._block, "used": self._used, "begins": self._begins, "packer": self._packer.state()}

    def take(self, num_rows: int) -> list[list[Part]]:
        """The next rows."""
        ready = self._packer.ready
        while len(ready) < num_rows:
            self._packer.add(next(self._documents))
        return [ready.popleft() for _ in range(num_rows)]

    def _read(self) -> Iterator[Encoded]:
        source, reader = self.config.sources[0], Reader(self.config.sources[0])
        size = max(1, self.config.shuffle_buffer) if self.config.shuffle else _UNSHUFFLED_BLOCK
        while True:
            whole_epoch, num_kept = self._begins is None and self._used == 0, 0
            documents = reader.documents(self._begins)
            while block := list(islice(documents, size)):
                ends = reader.state()
                order = np.arange(len(block))
                if self.config.shuffle:
                    order = permute(order, len(block), combine(self._seed, self._epoch, self._block))
                hashes = np.array([split_hash(document) for document in block], np.uint64)
                kept = order[~held_out_by_hash(hashes[order], self._fraction)]
                num_kept += len(kept)
                for encoded in encode([block[i] for i in kept[self._used :]], self._tokenizer, source.loss_on):
                    self._used += 1
                    yield encoded
                self._block, self._used, self._begins = self._block + 1, 0, ends
            if whole_epoch and not num_kept:
                raise ConfigError(f"all documents of the stream '{source.path}' are held out; lower data.held_out_fraction")
            self._epoch, self._block, self._used, self._begins = self._epoch + 1, 0, 0, None
