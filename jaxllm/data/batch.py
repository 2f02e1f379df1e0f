"""Batches of a run: any one of them from (seed, batch id) alone, read ahead by grain.

    dataset = load(config, seed=0)
    for item in dataset.read(position, lambda size: sharding.host_rows(mesh, size)):
        train(to_global(item.batch, mesh, dataset.batch_size(item.batch_id)))
        position = item.next_position          # what a checkpoint keeps

A row of the run is found by cumulative sums: batch id -> first row (the batch ramp), row -> source and epoch
(`mixture.py`), row of the epoch -> pieces of documents (`packing.py`) -> tokens (`corpus.py`). So of earlier epochs
resuming reads only how many rows each had, skipping a batch moves no other, and hosts differ only in which rows they
read. A Hugging Face stream (`stream.py`) is the exception.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from jaxllm import sharding
from jaxllm.config import ConfigError, DataConfig
from jaxllm.contract import Batch
from jaxllm.data import cache as caching
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.corpus import Corpus, sample, tokenise
from jaxllm.data.held_out import HeldOut, Window
from jaxllm.data.packing import combine
from jaxllm.data.position import Position
from jaxllm.data.ramp import Ramp
from jaxllm.data.rows import EXTRAS, Arrays, PackedCorpus, Rows, Steps
from jaxllm.data.source import Source, open_source
from jaxllm.data.stream import Head, Stream, assemble
from jaxllm.data.taught import open_taught
from jaxllm.data.tokenizer import Tokenizer

_NUM_READ_AHEAD = 8
_NUM_THREADS = 2

type RowsOf = Callable[[int], np.ndarray]
"""Batch size -> which rows of a batch of that size this process wants."""


class Item(NamedTuple):
    """One batch of this process's rows, and where the run is once it is trained."""

    batch_id: int
    batch: Batch
    next_position: Position


class Dataset:
    """Tokenised sources in the order of one run. Made by `load`.

    Args:
      rows: the training rows by number, or None for a stream.
    """

    def __init__(
        self, config: DataConfig, sources: Sequence[Source], tokenizer: Tokenizer, held: HeldOut, rows: Rows | None, seed: int
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._sources, self._held, self._rows, self._seed = sources, held, rows, seed
        self._ramp = Ramp(config)
        stored = {name: asdict(corpora[0].meta) for name, corpora in rows.taught.items()} if rows else {}
        self.fingerprint = caching.key(
            [source.fingerprint for source in (*sources, *held.sources)], tokenizer.fingerprint, *([stored] if stored else [])
        )

    def batch_size(self, batch_id: int) -> int:
        """Rows of a global batch."""
        return self._ramp.batch_size(batch_id)

    def num_rows(self, epoch: int) -> int:
        """Rows of one epoch of all sources; 0 for a stream. In a weighted mixture each source repeats on its own."""
        return self._rows.order.epoch_rows(epoch) if self._rows else 0

    def read(self, position: Position, rows: RowsOf) -> Iterator[Item]:
        """Batches from `position` on, without end, read ahead in threads or processes of grain. Close it when done."""
        wanted = {size: np.asarray(rows(size)) for size in self._ramp.sizes}
        source = self._stream(position, wanted) if self._rows is None else self._random_access(self._rows, position, wanted)
        reading = [iter(source)]
        items = _items(reading, position)
        weakref.finalize(items, _stop, reading)  # threads and processes end before the interpreter does, whoever forgot to close
        return items

    def _random_access(self, rows: Rows, position: Position, wanted: dict[int, np.ndarray]) -> grain.IterDataset:
        options = grain.ReadOptions(num_threads=_NUM_THREADS, prefetch_buffer_size=_NUM_READ_AHEAD)
        ahead = grain.MapDataset.source(Steps(rows, self._ramp, position, wanted)).to_iter_dataset(options)
        if not self.config.num_workers:
            return ahead
        if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which only absl's own main parses
            flags.FLAGS.mark_as_parsed()
        return ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.config.num_workers, per_worker_buffer_size=2))

    def _stream(self, position: Position, wanted: dict[int, np.ndarray]) -> grain.IterDataset:
        fraction = self._held.fraction or 0.0
        fill_id = fill_id_of(self.tokenizer)

        def batches() -> Iterator[tuple[Arrays, dict[str, Any]]]:
            state = position.reader or {"batch_id": 0, "stream": None}
            stream = Stream(self.config, self.tokenizer, fill_id, fraction, self._seed, state["stream"])
            at, here = state["batch_id"], position
            while True:
                rows = stream.take(self._ramp.batch_size(at))
                at += 1
                if at > here.batch_id:  # else a skipped batch: read, and dropped
                    mine = [rows[i] for i in wanted[len(rows)]]
                    arrays = assemble(mine, self.config.sequence_length, fill_id, self.config.segment_mask)
                    yield arrays, {"batch_id": at, "stream": stream.state()}
                    here = here.following()

        return grain.experimental.ThreadPrefetchIterDataset(_Generated(batches), prefetch_buffer_size=_NUM_READ_AHEAD)

    # -------------------------------------------------------------------------------- evaluation

    def held_out(self, batch_size: int, rows: RowsOf | None = None) -> Iterator[Batch]:
        """Evaluation batches: every held-out prediction once; the last is filled up with rows of loss_mask 0."""
        return (as_batch(arrays) for arrays in self._held.batches(batch_size, rows))

    def held_out_texts(self) -> Iterator[str]:
        """The held-out documents."""
        return self._held.texts()

    def train_texts(self) -> Iterator[str]:
        """The training documents, mixed from all parts of each source."""
        return sample(self._sources, self.config.held_out_fraction if not self.config.held_out else 0.0)

    @property
    def corpora(self) -> list[Corpus]:
        """The tokenised training sources.

        Raises:
          ConfigError: a stream, which has none.
        """
        if self._rows is None:
            raise ConfigError("an hf_stream source is not tokenised as a whole; save it as JSON lines, and use a jsonl source")
        return [packed.corpus for packed in self._rows.packed]

    @property
    def held_out_windows(self) -> list[Window]:
        """What each evaluation row predicts: nats of all rows / ln 2 / bytes of all windows = bits per byte."""
        return self._held.windows

    def window_bytes(self, window: Window) -> bytes:
        """The text that a window predicts."""
        return self._held.window_bytes(window)

    def describe(self) -> dict[str, Any]:
        """Numbers for the run directory: sources, tokens, rows, padding, what is held out."""
        out: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "tokenizer": {"fingerprint": self.tokenizer.fingerprint, "num_vocab": self.tokenizer.num_vocab},
            "sources": [{"name": source.name, **source.describe()} for source in self._sources],
            "held_out": {"num_documents": self._held.num_documents, "num_rows": self._held.num_rows},
        }
        if self._rows:
            for entry, packed in zip(out["sources"], self._rows.packed, strict=True):
                entry.update(packed.corpus.meta)
            num_rows, num_inputs = (sum(numbers) for numbers in zip(*(packed.counts(0) for packed in self._rows.packed), strict=True))
            padding = 1 - num_inputs / (num_rows * self.config.sequence_length)
            out["first_epoch"] = {"num_rows": num_rows, "num_inputs": num_inputs, "padding": padding}
        return out


class _Generated(grain.IterDataset):
    """A generator function as a grain data set. Its state travels with its elements."""

    def __init__(self, generate: Callable[[], Iterator[Any]]) -> None:
        super().__init__()
        self._generate = generate

    def __iter__(self) -> grain.DatasetIterator:
        return _GeneratedIterator(self._generate())


class _GeneratedIterator(grain.DatasetIterator):
    def __init__(self, elements: Iterator[Any]) -> None:
        super().__init__()
        self._elements = elements

    def __next__(self) -> Any:
        return next(self._elements)

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("a stream resumes from the Position that came with its last batch")


def _items(reading: list[grain.DatasetIterator], position: Position) -> Iterator[Item]:
    try:
        while reading:
            arrays, reader = next(reading[0])
            batch = as_batch(arrays)
            del arrays
            following = position.following(reader)
            yield Item(position.batch_id, batch, following)
            position = following
    finally:
        while reading:
            reading.pop().close()


def _stop(reading: list[grain.DatasetIterator]) -> None:
    while reading:
        reading.pop().close()


def as_batch(arrays: Arrays) -> Batch:
    """Arrays as a Batch, NumPy's."""
    # A worker process hands over views of shared memory; copies let go of it at once.
    copied = {name: np.array(array) if type(array) is not np.ndarray else array for name, array in arrays.items()}
    extras = {name.removeprefix(EXTRAS): copied.pop(name) for name in [*copied] if name.startswith(EXTRAS)}
    return Batch(**cast(dict[str, Any], copied), extras=cast(dict[str, Any], extras))


def to_global(batch: Batch, mesh: Mesh, batch_size: int) -> Batch:
    """This process's rows as global arrays [batch_size, …] sharded over the data axes.

    Args:
      batch: NumPy arrays of the rows `sharding.host_rows(mesh, batch_size)`, in that order.
    """
    placement, rows = sharding.batch_sharding(mesh), sharding.host_rows(mesh, batch_size)

    def place(array: np.ndarray) -> jax.Array:
        assert len(array) == len(rows), f"to_global: {len(array)} rows, and this process holds {len(rows)} of {batch_size}"
        local = lambda index: array[np.searchsorted(rows, np.arange(*index[0].indices(batch_size)))]
        return jax.make_array_from_callback((batch_size, *array.shape[1:]), placement, local)

    return jax.tree.map(place, batch)


# ------------------------------------------------------------------------------------------- load


def load(
    config: DataConfig, *, seed: int, say: Callable[[str], None] = lambda line: None, taught: Mapping[str, str] = MappingProxyType({})
) -> Dataset:
    """Open the sources, tokenise what is not in the cache, and plan the first epoch.

    Args:
      seed: of the order of documents and rows.
      say: told what takes time.
      taught: folders of `jaxllm teach` by name: `Batch.extras` has NAME/ids, NAME/logp and NAME/tail of each training position.

    Raises:
      ConfigError: any fault of the data, with the fix.
    """
    cache = caching.root(config)
    streamed = any(source.kind == "hf_stream" for source in config.sources)
    if streamed and taught:
        raise ConfigError("an hf_stream source has no fixed positions, so a teacher's stored predictions cannot be found again; use jsonl")
    if streamed and len(config.sources) > 1:
        raise ConfigError("an hf_stream source cannot seek, so it cannot be mixed; make it the only one of data.sources")
    sources: list[Source] = (
        [Head(config.sources[0], config.shuffle_buffer, config.tokenizer.train_bytes)]
        if streamed
        else [open_source(source, cache, say) for source in config.sources]
    )
    held_sources = [open_source(source, cache, say) for source in config.held_out]
    fraction = 0.0 if held_sources else config.held_out_fraction
    tokenizer = tokenizers.from_config(config.tokenizer) or _trained(config, sources, fraction, cache, say)
    corpora = [tokenise(source, c, tokenizer, cache, say) for source, c in zip(sources, config.sources, strict=True)]
    held_corpora = [tokenise(source, c, tokenizer, cache, say) for source, c in zip(held_sources, config.held_out, strict=True)]
    fill_id = fill_id_of(tokenizer)
    key = combine(seed) if config.shuffle else None
    packed = [
        PackedCorpus(
            corpus, held_out=False, fraction=fraction, sequence_length=config.sequence_length, packing=config.packing,
            separate=config.segment_mask, key=None if key is None else combine(key, i),
        )
        for i, corpus in enumerate(corpora)
    ]  # fmt: skip
    held = HeldOut(held_sources or sources, held_corpora or corpora, None if held_sources else fraction, tokenizer, config, fill_id)
    if not streamed:
        _check(config, sources, packed)
    if fraction and not held.num_documents:
        say(
            f"data: none of the {sum(c.meta['num_documents'] for c in corpora):,} documents fell into the held-out share {fraction:g}, so "
            "there is nothing to evaluate on; cut the text finer, e.g. --data.sources.0.document paragraph, or name --data.held_out.0.path"
        )
    records = {name: open_taught(path, corpora, tokenizer) for name, path in taught.items()}
    return Dataset(config, sources, tokenizer, held, None if streamed else Rows(packed, config, key, fill_id, records), seed)


def fill_id_of(tokenizer: Tokenizer) -> int:
    """The id that stands where there is no text."""
    return next(id for id in (tokenizer.pad_id, tokenizer.eos_id, 0) if id is not None)


def _trained(config: DataConfig, sources: Sequence[Source], fraction: float, cache: Path, say: Callable[[str], None]) -> Tokenizer:
    """A SentencePiece tokenizer trained on the sources' training documents, from the cache or made now."""
    options = config.tokenizer
    key = caching.key("v1", [source.fingerprint for source in sources], fraction, options.vocab_size, options.train_bytes)

    def train(to: Path) -> None:
        say(f"data: training a SentencePiece tokenizer of {options.vocab_size:,} tokens on at most {options.train_bytes / 1e6:g} MB")
        tokenizers.train_sentencepiece(sample(sources, fraction), options.vocab_size, max_bytes=options.train_bytes).save(to)

    return tokenizers.load(caching.folder(cache / "tokenizers" / key, train, say))


def _check(config: DataConfig, sources: Sequence[Source], packed: Sequence[PackedCorpus]) -> None:
    """Refuse to train on nothing, or on less than one batch."""
    counts = [p.counts(0).num_rows for p in packed]
    for source, p, num in zip(sources, packed, counts, strict=True):
        if num == 0:
            raise ConfigError(
                f"all {p.corpus.meta['num_documents']} documents of {source.name} are held out for evaluation "
                f"(data.held_out_fraction {p.fraction:g}); lower it, or cut the text finer, e.g. --data.sources.0.document paragraph"
            )
    largest = max(config.batch_size, *(size for _, size in config.batch_ramp), 0)
    if sum(counts) < largest:
        raise ConfigError(
            f"the sources fill {sum(counts)} rows of {config.sequence_length} tokens, fewer than one batch of {largest}; "
            f"set data.batch_size to at most {sum(counts)}, shorten data.sequence_length, or add text"
        )
