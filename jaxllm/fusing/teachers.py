"""One teacher: its stored predictions, checked against the target's documents, and target ids for its ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxllm.align import vocab
from jaxllm.config import ConfigError, TrainConfig
from jaxllm.data import batch as batches
from jaxllm.data import taught
from jaxllm.data.corpus import Corpus
from jaxllm.data.taught import Meta, Taught
from jaxllm.data.tokenizer import Tokenizer

type Mapping = Literal["first", "exact", "min_edit"]


@dataclass(frozen=True)
class Teacher:
    """What one teacher expects, in its own tokens."""

    path: str
    tokenizer: Tokenizer
    records: Sequence[Taught]
    """Of each corpus."""
    vocab: np.ndarray
    """Target id of each of its ids, -1 for none."""
    own: bool
    """Whether its tokenizer is the target's."""

    @property
    def meta(self) -> Meta:
        """Of its folder."""
        return self.records[0].meta


def open_teacher(
    path: str, config: TrainConfig, target: batches.Dataset, mapping: Mapping, cache_dir: str, say: Callable[[str], None]
) -> Teacher:
    """The teacher whose predictions lie in `path`.

    Args:
      config: what `jaxllm teach` was given.
      target: the student's data.

    Raises:
      ConfigError: predictions of another tokenizer than that of `config`, or incomplete; documents that are not the target's.
    """
    dataset = batches.load(config.data, seed=config.seed, say=say)
    check_documents(path, target.corpora, dataset.corpora)
    records = taught.open_taught(path, dataset.corpora, dataset.tokenizer)
    theirs, ours = dataset.tokenizer, target.tokenizer
    found = first_tokens(theirs, ours) if mapping == "first" else vocab.cached_vocab_map(theirs, ours, mapping, cache_dir)
    ids = np.full(max(records[0].meta.num_vocab, len(found)), -1, np.int32)  # a table may be padded
    ids[: len(found)] = found
    return Teacher(path, theirs, records, ids, theirs.fingerprint == ours.fingerprint and _same_tokens(target.corpora, dataset.corpora))


def _same_tokens(ours: Sequence[Corpus], theirs: Sequence[Corpus]) -> bool:
    """Of one tokenizer, and still not so where prompts and completions are cut at other places."""
    pairs = ((a, b) for a, b in zip(ours, theirs, strict=True) if a.folder != b.folder)
    return all(np.array_equal(a.offsets, b.offsets) and np.array_equal(a.tokens, b.tokens) for a, b in pairs)


def check_documents(path: str, ours: Sequence[Corpus], theirs: Sequence[Corpus]) -> None:
    """Refuse corpora that do not hold the same documents in the same order.

    Raises:
      ConfigError: with the first that differs.
    """
    if len(ours) != len(theirs):
        raise ConfigError(f"{path} is of {len(theirs)} sources and the target has {len(ours)}; give both the same data.sources")
    for index, pair in enumerate(zip(ours, theirs, strict=True)):
        counts = [int(corpus.meta["num_documents"]) for corpus in pair]
        hashes, sizes = ([np.load(corpus.folder / f"{name}.npy") for corpus in pair] for name in ("hashes", "sizes"))
        least = min(counts)
        same = (hashes[0][:least] == hashes[1][:least]) & (sizes[0][:least] == sizes[1][:least])
        if counts[0] != counts[1] or not same.all():
            first = least if same.all() else int(np.argmin(same))
            raise ConfigError(
                f"{path} was made of other documents: source {index} has {counts[1]:,} there and {counts[0]:,} in the target, and they "
                f"differ from document {first} on (counted from 0; {int((~same).sum()):,} of {least:,} differ); give the teacher's "
                "configuration the same data.sources, and teach again"
            )


def first_tokens(source: Tokenizer, target: Tokenizer) -> np.ndarray:
    """Target id of each source id: of the same bytes; else the token that the target begins these bytes with; -1 for none.

    A source that expects ` gets` says of a target without it that ` get` comes next, if that is how the target writes ` gets`.
    """
    out = vocab.vocab_map(source, target, "exact").copy()
    ours, theirs = vocab.pieces(target), vocab.pieces(source)
    spell = lambda text: b"".join(ours[id] for id in target.encode(text))
    adds_space = spell("a") == b" a"  # to every text, so that only what begins with a space can be asked for
    wanted: dict[int, str] = {}
    for id in np.flatnonzero(out < 0).tolist():
        with suppress(UnicodeDecodeError):
            text = theirs[id].decode()
            if text and (not adds_space or text[0] == " "):
                wanted[id] = text[1:] if adds_space else text
    for id, ids in zip(wanted, target.encode_batch([*wanted.values()]), strict=True):
        if ids and ours[ids[0]] and theirs[id].startswith(ours[ids[0]]):
            out[id] = ids[0]
    return out
