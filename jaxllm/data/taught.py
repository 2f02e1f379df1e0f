"""What a teacher expects at every position of a corpus, on disk: written by `jaxllm teach`, read with the batches.

A folder holds

    meta.json               k, the teacher and its tokenizer by fingerprint, the corpora
    CORPUS/00000.bin        records of flat positions 0 … 65,535 of that corpus, one after the other
    CORPUS/00000.json       their size and hash, written last: without it the shard is not there

The record of position p says what the teacher expects at p + 1:

    ids    k × bits, bits = ⌈log2 V⌉, most significant bit first, most probable token first, filled up to a byte
    logp   k × float16, natural
    tail   float16, the probability of all other tokens
    actual float16, log-probability of the token that came, named or not: a text's cross-entropy is their mean

At k = 64 that is 260 bytes for vocabularies up to 65,536, and at most 292 up to a million. float16 keeps a log-probability of -10
to 0.004. A position that predicts nothing, a document's last, has tail 1, log-probabilities of -inf, and 0 for the actual one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from jaxtyping import Float, Int

from jaxllm.config import ConfigError
from jaxllm.data.corpus import Corpus
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.files import path_of, write_atomic

SHARD = 1 << 16
"""Positions in a shard."""
META = "meta.json"


class TopK(NamedTuple):
    """The k most probable next tokens at each position: the fields of `losses.divergences.TopK`, in NumPy."""

    ids: Int[np.ndarray, "rows k"]
    """int32."""
    logp: Float[np.ndarray, "rows k"]
    """float32, log-probabilities over the model's whole vocabulary; -inf marks an unused entry."""
    tail: Float[np.ndarray, " rows"]
    """float32, probability of everything else."""


class Best(NamedTuple):
    """What a record holds: `TopK`, and the log-probability of the token that came."""

    ids: np.ndarray
    """[n k] int32."""
    logp: np.ndarray
    """[n k] float32."""
    tail: np.ndarray
    """[n] float32."""
    actual: np.ndarray
    """[n] float32."""

    @property
    def top(self) -> TopK:
        """What a loss needs of it."""
        return TopK(*self[:3])


class Layout(NamedTuple):
    """Of a record."""

    k: int
    num_vocab: int

    @property
    def bits(self) -> int:
        """Of an id.

        >>> [Layout(1, v).bits for v in (2, 49_152, 65_536, 65_537)]
        [1, 16, 16, 17]
        """
        return max(1, (self.num_vocab - 1).bit_length())

    @property
    def id_bytes(self) -> int:
        """Of all ids.

        >>> Layout(64, 49_152).id_bytes, Layout(10, 151_936).id_bytes
        (128, 23)
        """
        return -(-self.k * self.bits // 8)

    @property
    def num_bytes(self) -> int:
        """Of a record.

        >>> [Layout(64, v).num_bytes for v in (49_152, 151_936, 1 << 20)]
        [260, 276, 292]
        """
        return self.id_bytes + 2 * self.k + 4

    def encode(self, best: Best) -> np.ndarray:
        """Records as bytes [n num_bytes]."""
        shifts = np.arange(self.bits - 1, -1, -1, dtype=np.uint32)
        bits = (best.ids.astype(np.uint32)[..., None] >> shifts & 1).astype(np.uint8)
        numbers = np.concatenate([best.logp, best.tail[:, None], best.actual[:, None]], axis=1).astype("<f2")
        return np.concatenate([np.packbits(bits.reshape(len(bits), -1), axis=1), numbers.view(np.uint8)], axis=1)

    def decode(self, records: np.ndarray) -> Best:
        """The inverse of `encode`, to float16's precision."""
        bits = np.unpackbits(records[:, : self.id_bytes], axis=1, count=self.k * self.bits).reshape(-1, self.bits)
        ids = np.packbits(np.pad(bits, ((0, 0), (32 - self.bits, 0))), axis=1).view(">u4").astype(np.int32)
        numbers = np.ascontiguousarray(records[:, self.id_bytes :]).view("<f2").astype(np.float32)
        return Best(ids.reshape(-1, self.k), numbers[:, :-2], numbers[:, -2], numbers[:, -1])


def nothing(layout: Layout, num: int) -> Best:
    """What is known of a position that predicts nothing."""
    ids, logp = np.zeros((num, layout.k), np.int32), np.full((num, layout.k), -np.inf, np.float32)
    return Best(ids, logp, np.ones(num, np.float32), np.zeros(num, np.float32))


@dataclass(frozen=True)
class Meta:
    """Of a folder."""

    k: int
    num_vocab: int
    teacher: str
    """What was asked, as the command named it."""
    teacher_fingerprint: str
    tokenizer_fingerprint: str
    context: int
    """Most tokens of a document that the teacher saw at once."""
    version: int = 1

    @property
    def layout(self) -> Layout:
        """Of the records."""
        return Layout(self.k, self.num_vocab)


def read_meta(folder: Path) -> Meta | None:
    """What a folder says of itself; None where there is no meta.json.

    Raises:
      ConfigError: one that `jaxllm teach` did not write.
    """
    try:
        return Meta(**json.loads((folder / META).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{folder / META} is not what jaxllm teach writes ({error}); choose another folder, or remove this one") from None


def write_meta(folder: Path, meta: Meta) -> None:
    """Claim a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / META, json.dumps(asdict(meta), indent=1).encode())


# --------------------------------------------------------------------------------------------- shards


def part_of(text: str) -> slice:
    """Which shards `--part i/n` means: every n-th, from the i-th on.

    >>> part_of("1/4")
    slice(1, None, 4)

    Raises:
      ConfigError: not such a part.
    """
    part = re.fullmatch(r"(\d+)/(\d+)", text)
    if part is None or not int(part[1]) < int(part[2]):
        raise ConfigError(f"--part is '{text}'; it is i/n with i from 0 to n - 1, e.g. 0/4")
    return slice(int(part[1]), None, int(part[2]))


def num_shards(corpus: Corpus) -> int:
    """How many a corpus has."""
    return -(-int(corpus.meta["num_tokens"]) // SHARD)


def shard_file(folder: Path, corpus: Corpus, index: int) -> Path:
    """Of its records; beside it lies a .json with size and hash."""
    return folder / corpus.folder.name / f"{index:05d}.bin"


def write_shard(file: Path, records: np.ndarray) -> None:
    """Records, then what they hash to: killed in between, the shard is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = records.tobytes()
    mark = file.with_suffix(".json")
    mark.unlink(missing_ok=True)
    for left in [*file.parent.glob(f".{file.name}.*.tmp"), *file.parent.glob(f".{mark.name}.*.tmp")]:  # by a killed process
        left.unlink(missing_ok=True)
    write_atomic(file, data)
    write_atomic(mark, json.dumps({"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}).encode())


def problem_of(file: Path, *, contents: bool) -> str | None:
    """What is wrong with a shard, or None.

    Args:
      contents: hash it too, not only look at its size.
    """
    try:
        mark = json.loads(file.with_suffix(".json").read_text())
        size, digest = int(mark["bytes"]), str(mark["xxh3"])
    except FileNotFoundError:
        return "is missing"
    except (ValueError, TypeError, KeyError):
        return "has a mark that is damaged"
    if not file.exists():
        return "is missing"
    if (found := file.stat().st_size) != size:
        return f"has {found:,} bytes instead of {size:,}"
    if contents and xxhash.xxh3_128_hexdigest(file.read_bytes()) != digest:
        return "has changed since it was written (its hash differs)"
    return None


# -------------------------------------------------------------------------------------------- reading


class Taught:
    """A teacher's records of one corpus, by flat position. It is picklable: only the paths travel. Made by `open_taught`."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        self.folder, self.corpus = folder, corpus

    def __reduce__(self) -> Any:
        return Taught, (self.folder, self.corpus)

    @cached_property
    def meta(self) -> Meta:
        """Of the folder."""
        meta = read_meta(self.folder)
        assert meta is not None
        return meta

    @cached_property
    def _shards(self) -> dict[int, np.ndarray]:
        return {}

    def _shard(self, index: int) -> np.ndarray:
        """Its records, mapped; hashed when it is first opened."""
        if index not in self._shards:
            file = shard_file(self.folder, self.corpus, index)
            if problem := problem_of(file, contents=True):
                raise ConfigError(f"{file} {problem}; the jaxllm teach command that wrote it makes this shard again, and no other")
            self._shards[index] = np.memmap(file, np.uint8, "r").reshape(-1, self.meta.layout.num_bytes)
        return self._shards[index]

    def at(self, index: np.ndarray) -> Best:
        """The records of these flat positions."""
        records = np.empty((len(index), self.meta.layout.num_bytes), np.uint8)
        shard = index // SHARD
        for one in np.unique(shard).tolist():
            members = shard == one
            records[members] = self._shard(one)[index[members] % SHARD]
        return self.meta.layout.decode(records)


def open_taught(path: str | os.PathLike[str], corpora: Sequence[Corpus], tokenizer: Tokenizer) -> list[Taught]:
    """A teacher's records of each corpus, all of them there.

    Raises:
      ConfigError: nothing there; of another tokenizer, with both fingerprints; corpora or shards that are missing, with the first few.
    """
    folder = path_of(path)
    meta = read_meta(folder)
    if meta is None:
        raise ConfigError(f"{path} holds nothing that jaxllm teach wrote; make it: jaxllm teach TEACHER TARGET {path}")
    if meta.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"{path} is of teacher {meta.teacher} with tokenizer {meta.tokenizer_fingerprint[:12]}, and the data are in tokens of "
            f"{tokenizer.fingerprint[:12]}; teach with this run's data configuration, or align the teacher's tokens first"
        )
    for corpus in corpora:
        files = [shard_file(folder, corpus, index) for index in range(num_shards(corpus))]
        problems = [(file, problem) for file in files if (problem := problem_of(file, contents=False))]
        if problems:
            raise ConfigError(
                f"{path} lacks {len(problems)} of {len(files)} shards of corpus {corpus.folder.name} ({problems[0][0].name} "
                f"{problems[0][1]}); the jaxllm teach command that began it makes what is missing, with this run's data configuration"
            )
    return [Taught(folder, corpus) for corpus in corpora]
