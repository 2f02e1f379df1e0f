"""A source's documents as one memory-mapped array of tokens, made once for each content and tokenizer.

A corpus folder holds
    tokens.bin   every document's ids one after the other, uint16 or uint32
    offsets.npy  [num + 1] where each document begins
    toggles.npy  flat positions at which "carries loss as a label" changes; it begins as yes
    hashes.npy   [num] uint64 that decide which documents are held out
    sizes.npy    [num] bytes of text
    meta.json    and, beside them, the packing plans (`packing.py`) and how many rows each has (counts-*.json)
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxllm.config import SourceConfig
from jaxllm.data import cache as caching
from jaxllm.data.chat import encode
from jaxllm.data.packing import permute
from jaxllm.data.source import Document, Parquet, Source
from jaxllm.data.tokenizer import Tokenizer

_VERSION = "v1"
_GROUP_CHARS = 1 << 20
_GROUP_DOCUMENTS = 4096
_PARTS = 8
"""Visits to a group of rows: more mix a sample better, and read more."""


class Corpus:
    """A finished corpus folder. It is picklable: only the path travels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())

    def __reduce__(self) -> Any:
        return Corpus, (self.folder,)

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens."""
        return np.memmap(self.folder / "tokens.bin", self.meta["dtype"], "r")

    @cached_property
    def offsets(self) -> np.ndarray:
        """[num_documents + 1] beginnings of the documents in `tokens`."""
        return np.load(self.folder / "offsets.npy", mmap_mode="r")

    @cached_property
    def sizes(self) -> np.ndarray:
        """[num_documents] bytes of text."""
        return np.load(self.folder / "sizes.npy", mmap_mode="r")

    @cached_property
    def toggles(self) -> np.ndarray:
        """Flat positions where loss turns off, on, off, …"""
        return np.load(self.folder / "toggles.npy", mmap_mode="r")

    def carries_loss(self, index: np.ndarray) -> np.ndarray:
        """Whether the tokens at these flat positions carry loss as labels."""
        if not len(self.toggles):
            return np.ones(index.shape, bool)
        return np.searchsorted(self.toggles, index, side="right") % 2 == 0

    def documents(self, held_out: bool | None, fraction: float) -> np.ndarray:
        """Indices of the documents on one side of the held-out split; None means all of them.

        >>> held_out_by_hash(np.array([0, 2**63], np.uint64), 0.5).tolist()
        [True, False]
        """
        if held_out is None:
            return np.arange(len(self.offsets) - 1)
        hashes = np.load(self.folder / "hashes.npy", mmap_mode="r")
        return np.flatnonzero(held_out_by_hash(hashes, fraction) == held_out)


def held_out_by_hash(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents' hashes fall into the lowest `fraction` of all uint64."""
    return hashes < np.uint64(min(round(fraction * 2.0**64), 2**64 - 1))


def split_hash(document: Document) -> int:
    """The uint64 that decides whether a document is held out: equal documents fall on the same side."""
    return xxhash.xxh3_64_intdigest((document.split_key or document.content).encode())


def tokenise(source: Source, config: SourceConfig, tokenizer: Tokenizer, cache: Path, say: Callable[[str], None]) -> Corpus:
    """The corpus of `source` under `tokenizer`, from the cache or made now.

    Raises:
      ConfigError: a document that cannot be read, with its file and line; no space.
    """
    key = caching.key(
        _VERSION, source.fingerprint, tokenizer.fingerprint, config.kind, config.field, config.prompt_field, config.loss_on, config.document
    )
    documents = (source[i] for i in range(len(source)))
    return Corpus(
        caching.folder(cache / "corpora" / key, lambda to: _write(to, source.name, documents, len(source), config, tokenizer, say), say)
    )


def _write(
    to: Path, name: str, documents: Iterable[Document], total: int, config: SourceConfig, tokenizer: Tokenizer, say: Callable[[str], None]
) -> None:
    """Encode group by group and append: memory holds one group and a few numbers for each document."""
    dtype = np.dtype(np.uint16 if tokenizer.num_vocab <= 1 << 16 else np.uint32)
    lengths, sizes, hashes, toggles = array("q"), array("q"), array("Q"), array("q")
    num_tokens, carries, start, said = 0, True, time.monotonic(), time.monotonic()
    with (to / "tokens.bin").open("wb") as file:
        for group in _groups(iter(documents)):
            for document, encoded in zip(group, encode(group, tokenizer, config.loss_on), strict=True):
                file.write(encoded.ids.astype(dtype).tobytes())
                loss = np.ones(1, bool) if encoded.loss is None else encoded.loss
                changes = np.flatnonzero(np.diff(loss, prepend=carries))
                toggles.extend((num_tokens + changes).tolist())
                carries = bool(loss[-1])
                num_tokens += len(encoded.ids)
                lengths.append(len(encoded.ids))
                sizes.append(len(document.content.encode()))
                hashes.append(split_hash(document))
            if time.monotonic() - said > 2:
                said = time.monotonic()
                rate = sum(sizes) / (said - start) / 1e6
                say(f"data: tokenising {name}: {len(lengths):,} of {total:,} documents, {num_tokens:,} tokens, {rate:.1f} MB/s")
    np.save(to / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))
    np.save(to / "sizes.npy", np.array(sizes, np.int64))
    np.save(to / "hashes.npy", np.array(hashes, np.uint64))
    np.save(to / "toggles.npy", np.array(toggles, np.int64))
    meta = {"num_documents": len(lengths), "num_tokens": num_tokens, "num_bytes": sum(sizes), "dtype": dtype.name}
    (to / "meta.json").write_text(json.dumps(meta))
    seconds = time.monotonic() - start
    say(f"data: tokenised {name}: {len(lengths):,} documents, {sum(sizes):,} bytes, {num_tokens:,} tokens ({seconds:.1f} s)")


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    chars = 0
    for document in documents:
        group.append(document)
        chars += len(document.content)
        if chars >= _GROUP_CHARS or len(group) >= _GROUP_DOCUMENTS:
            yield group
            group, chars = [], 0
    if group:
        yield group


def sample(sources: Iterable[Source], fraction: float) -> Iterator[str]:
    """Training text of the sources, turn about, in a fixed pseudo-random order: what a tokenizer is trained on."""
    iterators = [_training_text(source, fraction) for source in sources]
    while iterators:
        for iterator in list(iterators):
            text = next(iterator, None)
            if text is None:
                iterators.remove(iterator)
            else:
                yield text


def _training_text(source: Source, fraction: float) -> Iterator[str]:
    for i in _mixed(source):
        document = source[i]
        if not held_out_by_hash(np.array([split_hash(document)], np.uint64), fraction)[0]:
            yield document.content


def _mixed(source: Source) -> Iterator[int]:
    """Every index once, in a fixed pseudo-random order; of a source that reads whole groups of rows, an eighth of a group at a time."""
    if not isinstance(source, Parquet):
        for start in range(0, len(source), _GROUP_DOCUMENTS):
            yield from permute(np.arange(start, min(start + _GROUP_DOCUMENTS, len(source))), len(source), key=0).tolist()
        return
    starts, ends = [0, *source.ends[:-1].tolist()], source.ends.tolist()
    groups = permute(np.arange(len(ends)), len(ends), key=0).tolist()
    for part in range(_PARTS):
        for start, end in ((starts[group], ends[group]) for group in groups):
            yield from (start + permute(np.arange(part, end - start, _PARTS), end - start, key=0)).tolist()
