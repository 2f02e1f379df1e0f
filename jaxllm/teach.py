"""`jaxllm teach TEACHER TARGET OUT`: what a teacher expects at every position of a configuration's text, on disk.

The k most probable next tokens, their log-probabilities and the probability of all others go into shards of 65,536 positions
(`data/taught.py`), by position in the tokenised corpus, so that any packing, batch size or epoch of a student finds its own. Documents do
not see each other; one longer than --context is read in windows of that many tokens, cut where `data.packing first_fit` cuts rows
of the same length: with --context equal to the student's data.sequence_length the teacher saw exactly what the student sees.

A shard is there once its mark is. The same command goes on after a kill, makes shards again whose size or hash is not what
was written, and leaves the others. Several processes divide the work by --part 0/4, 1/4, …
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, TextIO

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm import manifest, pretrained, sharding
from jaxllm.config import ConfigError, MeshConfig, TrainConfig
from jaxllm.contract import Batch
from jaxllm.data import batch as batches
from jaxllm.data import taught
from jaxllm.data.corpus import Corpus
from jaxllm.data.packing import first_fit, windows
from jaxllm.data.rows import empty, fill
from jaxllm.data.taught import Best, Meta
from jaxllm.evals.display import Bar
from jaxllm.files import path_of
from jaxllm.flags import parse_flags
from jaxllm.losses.best import Expected, best_of
from jaxllm.pretrained import ONE_DEVICE, Pretrained

USAGE = """usage: jaxllm teach TEACHER TARGET OUT [--k 64] [--context 0] [--FIELD VALUE …]

TEACHER is a run directory, a converted folder, or one checkpoint of either; TARGET the configuration of the student, of which the data
are used (--data.… changes them); OUT the folder to write. The student trains on it with --distill.stored OUT 1.0"""


@dataclass(frozen=True)
class TeachConfig:
    """What is kept, and how it is computed."""

    k: int = 64
    """Most probable tokens that are kept at each position."""
    context: int = 0
    """Most tokens of a document that the teacher sees at once; 0 means the student's data.sequence_length."""
    batch_tokens: int = 4096
    """Tokens of a batch, at least one row."""
    part: str = "0/1"
    """i/n: this process makes every n-th shard, from the i-th on."""
    precision: Literal["auto", "float32", "bfloat16", "bfloat16_matmul"] = "auto"
    """auto: float32 on CPU, bfloat16 elsewhere."""
    mesh: MeshConfig = ONE_DEVICE
    """Devices to spread the teacher over."""

    def __post_init__(self) -> None:
        for name, least in {"k": 1, "context": 0, "batch_tokens": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least {least}")
        taught.part_of(self.part)


def main(words: list[str], load_target: Callable[[str], TrainConfig]) -> int:
    """The command; returns the exit status.

    Args:
      load_target: gives the configuration that a target names.
    """
    if not words or words[0] in ("-h", "--help"):
        print(USAGE + "\n")
        if words:
            parse_flags(TeachConfig(), ["--help"], "jaxllm teach TEACHER TARGET OUT")
        return 0 if words else 2
    if len(words) < 3 or any(word.startswith("-") for word in words[:3]):
        raise ConfigError("jaxllm teach needs a teacher, a target and a folder to write, e.g. jaxllm teach runs/A configs/base.py taught/A")
    own, data = _split(words[3:])
    program = f"jaxllm teach {' '.join(words[:3])}"
    config = parse_flags(TeachConfig(), own, program)
    target = parse_flags(load_target(words[1]), data, program)
    teach(words[0], target, words[2], config)
    return 0


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """(the command's own flags, those of the data)."""
    own: list[str] = []
    data: list[str] = []
    into = own
    for word in words:
        if word.startswith("--"):
            into = data if word.startswith("--data.") else own
        into.append(word)
    return own, data


def teach(teacher: str, target: TrainConfig, out: str, config: TeachConfig, *, bar: TextIO | None = None) -> None:
    """Make the shards of `out` that are not there, or not as they were written.

    Args:
      bar: where the progress bar goes; None means standard error.

    Raises:
      ConfigError: a teacher with another tokenizer than the data, or a shorter context; a folder of another teacher or tokenizer (both
        fingerprints are named), or made with other settings; k larger than the vocabulary.
    """
    mesh = sharding.make_mesh(config.mesh)
    say = lambda line: print(line, file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        model = pretrained.load(teacher, mesh=mesh, precision=None if config.precision == "auto" else config.precision)
    dataset = batches.load(target.data, seed=target.seed, say=say)
    meta = _meta(teacher, model, dataset, target, config)
    folder = path_of(out)
    if (there := taught.read_meta(folder)) is None:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{out} is not empty, and jaxllm teach did not write it; choose another folder")
        taught.write_meta(folder, meta)
    elif there != meta:
        raise ConfigError(
            f"{out} holds the predictions of another teacher: {_difference(there, meta)}; choose another folder, or remove it"
        )
    rows = max(1, config.batch_tokens // meta.context)
    shards = sharding.axis_size(mesh, sharding.BATCH_AXES)
    rows += -rows % shards
    expect = partial(jax.jit(best_of(model.lm, config.k)), model.params)
    with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
        for corpus in dataset.corpora:
            progress = Bar(f"{out}: corpus {corpus.folder.name[:8]}, {corpus.meta['num_tokens']:,} tokens", taught.num_shards(corpus), bar)
            try:
                for index in range(taught.num_shards(corpus))[taught.part_of(config.part)]:
                    file = taught.shard_file(folder, corpus, index)
                    problem = taught.problem_of(file, contents=True)
                    if problem and file.exists():
                        say(f"{file} {problem}: making it again")
                    if problem:
                        taught.write_shard(file, _records(expect, mesh, meta, corpus, index, rows, batches.fill_id_of(dataset.tokenizer)))
                    progress.add(1)
            finally:
                progress.close()


def _meta(teacher: str, model: Pretrained, dataset: batches.Dataset, target: TrainConfig, config: TeachConfig) -> Meta:
    """What the folder will say of itself, after all checks."""
    ours, theirs = dataset.tokenizer, model.tokenizer
    if ours.fingerprint != theirs.fingerprint:
        raise ConfigError(
            f"the data are in tokens of {ours.fingerprint[:12]} ({ours.num_vocab} tokens), and {teacher} reads those of "
            f"{theirs.fingerprint[:12]} ({theirs.num_vocab}); give the data the teacher's tokenizer (--data.tokenizer.path), or align its "
            "predictions to the student's tokens afterwards"
        )
    context = config.context or target.data.sequence_length
    if context > model.config.max_length:
        raise ConfigError(
            f"the teacher's context is {model.config.max_length} tokens, and rows of {context} are asked for; "
            f"--context {model.config.max_length} reads them in windows of that length"
        )
    if config.k > model.config.vocab_size:
        raise ConfigError(f"--k is {config.k}, and the teacher's vocabulary has {model.config.vocab_size} entries; lower it")
    return Meta(config.k, model.config.vocab_size, teacher, manifest.fingerprint(teacher), ours.fingerprint, context)


def _difference(there: Meta, meta: Meta) -> str:
    names = [name for name in Meta.__dataclass_fields__ if getattr(there, name) != getattr(meta, name)]
    return ", ".join(f"{name} was {getattr(there, name)}, is {getattr(meta, name)}" for name in names)


# ------------------------------------------------------------------------------------------- compute


def _records(
    expect: Callable[[Batch], Expected], mesh: Mesh, meta: Meta, corpus: Corpus, index: int, rows: int, fill_id: int
) -> np.ndarray:
    """The records of one shard."""
    begin = index * taught.SHARD
    num = min(taught.SHARD, corpus.meta["num_tokens"] - begin)
    best = taught.nothing(meta.layout, num)
    for arrays, positions, at in _batches(corpus, begin, begin + num, meta.context, rows, fill_id):
        found = Best(*(np.asarray(x)[at] for x in expect(batches.to_global(arrays, mesh, rows))))
        inside = (positions >= begin) & (positions < begin + num)
        for ours, theirs in zip(best, found, strict=True):
            ours[positions[inside] - begin] = theirs[inside]
    return meta.layout.encode(best)


type Found = tuple[Batch, np.ndarray, tuple[np.ndarray, np.ndarray]]
"""Rows of tokens; the flat position of each that predicts something, and where it lies."""


def _batches(corpus: Corpus, begin: int, end: int, context: int, rows: int, fill_id: int) -> Iterator[Found]:
    """All windows of documents that have a part in [begin, end), packed into rows."""
    first = max(0, int(np.searchsorted(corpus.offsets, begin, side="right")) - 1)
    last = int(np.searchsorted(corpus.offsets, end, side="left"))
    offsets = np.asarray(corpus.offsets[first : last + 1], np.int64)
    starts, lengths = windows(offsets[:-1], np.diff(offsets) - 1, context)
    near = (starts < end) & (starts + lengths > begin)
    starts, lengths = starts[near], lengths[near]
    row = first_fit(lengths, context)
    order = np.argsort(row, kind="stable")
    row, starts, lengths = row[order], starts[order], lengths[order]
    for first_row in range(0, int(row.max(initial=-1)) + 1, rows):
        members = (row >= first_row) & (row < first_row + rows)
        arrays = empty(rows, context, fill_id)
        positions, at = fill(arrays, row[members] - first_row, starts[members], lengths[members], corpus, separate=True)
        yield batches.as_batch(arrays), positions, at
