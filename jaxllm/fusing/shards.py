"""A shard of fused predictions: all its documents at once, but for finding the rows.

Sizes: `sources` is the number of teachers, `documents` and `rows` are those of the shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxllm.align import dtw, fuse, spans
from jaxllm.align.project import project
from jaxllm.config import ConfigError
from jaxllm.data import batch as batches
from jaxllm.data import cache as caching
from jaxllm.data import taught
from jaxllm.data.chat import pieces
from jaxllm.data.corpus import Corpus
from jaxllm.data.source import Document, open_source
from jaxllm.data.taught import SHARD, Best, Meta, Taught, TopK
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.files import path_of, write_atomic
from jaxllm.fusing.teachers import open_teacher
from jaxllm.fusing.values import Job

_MOST_CELLS = 1 << 30
"""Of the dynamic programme's table, a byte each."""

type Tally = dict[str, Any]
"""{'documents', 'rows', 'bytes', 'sources': [sums of each teacher]}: what adds up over shards."""


def tally_file(shard: Path) -> Path:
    """Of what a shard counts."""
    return shard.with_suffix(".tally")


class Seen(NamedTuple):
    """One document under all tokenizers."""

    target: spans.Spans
    sources: list[spans.Spans]
    num_bytes: int


class Stretch(NamedTuple):
    """The documents that have a part in a shard."""

    corpus: int
    first: int
    """The first of them, of all documents of the corpus."""
    seen: list[Seen]
    starts: Int[np.ndarray, " documents"]
    """Where they begin, counted from the shard's first row: the first one may begin before it."""
    cuts: Int[np.ndarray, " documents+1"]
    """The same inside the shard, and the end."""
    targets: Int[np.ndarray, " rows+1"]
    """The target's tokens at the shard's positions, and the one after: row i predicts targets[i + 1]."""
    predicts: Bool[np.ndarray, " rows"]
    """No where a document ends."""

    @property
    def document(self) -> Int[np.ndarray, " rows"]:
        """Of each row."""
        return np.repeat(np.arange(len(self.seen)), np.diff(self.cuts))


class Scores(NamedTuple):
    """Of each document under each teacher, over the text that all of them predict."""

    nats: Float[np.ndarray, "sources documents"]
    num_tokens: Int[np.ndarray, "sources documents"]
    num_bytes: Int[np.ndarray, " documents"]


class Fuser:
    """Makes shards of one job.

    Raises:
      ConfigError: as of `fuse_taught`.
    """

    def __init__(self, job: Job, say: Callable[[str], None]) -> None:
        if not job.sources:
            raise ConfigError("a fusion needs a teacher at least: --source FOLDER CONFIGURATION, what jaxllm teach wrote and was given")
        data = job.target.data
        dataset = batches.load(data, seed=job.target.seed, say=say)
        self.config, self.folder = job.config, path_of(job.out)
        self.tokenizer, self.corpora = dataset.tokenizer, dataset.corpora
        self.teachers = [open_teacher(*source, dataset, job.config.mapping, data.cache_dir, say) for source in job.sources]
        self.loss_on = [source.loss_on for source in data.sources]
        self.texts = [open_source(source, caching.root(data)) for source in data.sources]
        metas = [teacher.meta for teacher in self.teachers]
        self.description: dict[str, Any] = {
            "options": job.config.options(),
            "sources": [{"taught": teacher.path} | asdict(meta) for teacher, meta in zip(self.teachers, metas, strict=True)],
        }
        identity = [[m.k, m.num_vocab, m.teacher_fingerprint, m.tokenizer_fingerprint, m.context] for m in metas]
        self.meta = Meta(
            k=job.config.k,
            num_vocab=self.tokenizer.num_vocab,
            teacher=" + ".join(meta.teacher for meta in metas),
            teacher_fingerprint=caching.key("fusion 1", self.description["options"], identity),
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            context=min(meta.context for meta in metas),
        )

    def make(self, corpus: int, number: int) -> None:
        """Write one shard, its tally first."""
        best, tally = self.shard(corpus, number)
        file = taught.shard_file(self.folder, self.corpora[corpus], number)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(tally_file(file), json.dumps(tally).encode())
        taught.write_shard(file, self.meta.layout.encode(best))

    def shard(self, corpus: int, number: int) -> tuple[Best, Tally]:
        """What the records of a shard hold, and what it counts."""
        stretch = self._read(corpus, number)
        scores = self._scores(stretch)
        weights = self._weights(scores)
        begins = stretch.starts >= 0  # documents count where they begin
        tops, counts = [], []
        for j in range(len(self.teachers)):
            used = (weights[j] > 0)[stretch.document] & stretch.predicts
            where = np.where(used, self._where(j, stretch, weights[j] > 0), -1)
            top, named, mapped = self._project(j, stretch, where)
            tops.append(top)
            counts.append({
                "won": float(weights[j, begins].sum()), "rows": int(used.sum()), "accepted": int((where >= 0).sum()),
                "named": named, "mapped": mapped,
                "nats": float(scores.nats[j, begins].sum()), "tokens": int(scores.num_tokens[j, begins].sum()),
            })  # fmt: skip
        best = self._together(tops, weights, stretch)
        for field, empty in zip(best, taught.nothing(self.meta.layout, 1), strict=True):
            field[~stretch.predicts] = empty
        return best, {
            "documents": int(begins.sum()), "rows": int(stretch.predicts.sum()), "bytes": int(scores.num_bytes[begins].sum()),
            "sources": counts,
        }  # fmt: skip

    # ------------------------------------------------------------------------------------- reading

    def _read(self, corpus: int, number: int) -> Stretch:
        one, begin = self.corpora[corpus], number * SHARD
        end = min(begin + SHARD, int(one.meta["num_tokens"]))
        first = int(np.searchsorted(one.offsets, begin, side="right")) - 1
        last = int(np.searchsorted(one.offsets, end, side="left"))
        offsets = np.asarray(one.offsets[first : last + 1], np.int64) - begin
        targets, predicts = np.zeros(end - begin + 1, np.int64), np.ones(end - begin, bool)
        following = one.tokens[begin : end + 1]
        targets[: len(following)] = following
        predicts[offsets[1:][offsets[1:] <= end - begin] - 1] = False
        seen = [self._see(corpus, document) for document in range(first, last)]
        return Stretch(corpus, first, seen, offsets[:-1], np.clip(offsets, 0, end - begin), targets, predicts)

    def _see(self, corpus: int, document: int) -> Seen:
        tokenizers = [self.tokenizer, *(teacher.tokenizer for teacher in self.teachers)]
        text = text_of(self.texts[corpus][document], tokenizers, self.loss_on[corpus])
        locate = lambda tokenizer, one: spans.locate(tokenizer, ids_of(one, document), text, changed=self.config.changed)
        try:
            ours = locate(self.tokenizer, self.corpora[corpus])
            theirs = [ours if teacher.own else locate(teacher.tokenizer, teacher.records[corpus].corpus) for teacher in self.teachers]
        except ConfigError as error:
            raise ConfigError(f"document {document} of {self.texts[corpus].name}: {error}") from None
        return Seen(ours, theirs, len(text.encode()))

    # ------------------------------------------------------------------------------------- choosing

    def _scores(self, stretch: Stretch) -> Scores:
        num = len(stretch.seen)
        nats, num_tokens = np.zeros((len(self.teachers), num)), np.zeros((len(self.teachers), num), np.int64)
        # Where the first token that a teacher predicts begins: 0 where bos stands before it.
        starts = np.array([max(0, *(int(s.bounds[1]) for s in one.sources)) for one in stretch.seen], np.int64)
        for j, teacher in enumerate(self.teachers):
            records = teacher.records[stretch.corpus]
            offsets = np.asarray(records.corpus.offsets[stretch.first : stretch.first + num + 1], np.int64)
            actual = _actual(records, int(offsets[0]), int(offsets[-1]))
            for d, one in enumerate(stretch.seen):
                counted = np.flatnonzero(one.sources[j].bounds[1:-1] >= starts[d])  # row i predicts token i + 1, which begins there
                nats[j, d] = -actual[offsets[d] - offsets[0] + counted].sum()
                num_tokens[j, d] = len(counted)
        return Scores(nats, num_tokens, np.maximum(np.array([one.num_bytes for one in stretch.seen], np.int64) - starts, 0))

    def _weights(self, scores: Scores) -> Float[np.ndarray, "sources documents"]:
        """Of the teachers in each document; all 0 where one of them predicts nothing of it."""
        out = np.zeros(scores.nats.shape)
        here = (scores.num_tokens > 0).all(axis=0)
        if not here.any():
            return out
        num_bytes = np.maximum(scores.num_bytes[here], 1)  # of a very short text its end alone may be predicted
        ce = fuse.cross_entropy(scores.nats[:, here], num_tokens=scores.num_tokens[:, here], num_bytes=num_bytes, per=self.config.per)
        out[:, here] = fuse.avg_ce(ce) if self.config.fuse == "avg_ce" else np.eye(len(ce))[:, fuse.min_ce(ce)]
        return out

    # ------------------------------------------------------------------------------------- aligning

    def _where(self, j: int, stretch: Stretch, wanted: Bool[np.ndarray, " documents"]) -> Int[np.ndarray, " rows"]:
        """The flat position in teacher j's corpus that each row takes, -1 for none and in documents that are not wanted."""
        out = np.full(len(stretch.predicts), -1, np.int64)
        offsets = self.teachers[j].records[stretch.corpus].corpus.offsets
        for d in np.flatnonzero(wanted).tolist():
            begin, end = stretch.cuts[d], stretch.cuts[d + 1]
            source = self._rows(j, stretch, d).source[begin - stretch.starts[d] : end - stretch.starts[d]].astype(np.int64)
            out[begin:end] = np.where(source >= 0, int(offsets[stretch.first + d]) + source, -1)
        return out

    def _rows(self, j: int, stretch: Stretch, d: int) -> spans.Rows:
        teacher, target, source = self.teachers[j], stretch.seen[d].target, stretch.seen[d].sources[j]
        how, num, document = self.config.how, len(target.kinds), stretch.first + d
        if teacher.own:
            return spans.Rows(np.ones(num, bool), np.arange(num, dtype=np.int32))
        if how == "spans":
            return spans.rows(target, source)
        if (cells := num * len(source.kinds)) > _MOST_CELLS:
            raise ConfigError(
                f"document {document} of {self.texts[stretch.corpus].name} has {num:,} tokens and {len(source.kinds):,} of {teacher.path}: "
                f"--how {how} fills a table of {cells / 1e9:.1f} GB for it; cut the text finer (`document` of its source), or take spans"
            )
        ours, theirs = ids_of(self.corpora[stretch.corpus], document), ids_of(teacher.records[stretch.corpus].corpus, document)
        return dtw.rows(self.tokenizer, ours, teacher.tokenizer, theirs, how, vocab=teacher.vocab, strict=self.config.strict)

    def _project(self, j: int, stretch: Stretch, where: Int[np.ndarray, " rows"]) -> tuple[Best, float, float]:
        """(teacher j's predictions at the shard's rows, the probability that they name, and what of it has a target id)."""
        teacher, accepted, config = self.teachers[j], where >= 0, self.config
        found = teacher.records[stretch.corpus].at(where[accepted])
        p, known = np.exp(found.logp.astype(np.float64)), teacher.vocab[found.ids] >= 0
        named, mapped = float(p.sum()), float(p[known].sum())
        rows = np.full(len(stretch.targets), -1, np.int32)  # one more, so that the last row has a next token
        rows[:-1][accepted] = np.arange(len(found.ids))
        top = project(
            found.top, spans.Rows(rows >= 0, rows), teacher.vocab, stretch.targets, k=config.k,
            collisions=config.collisions, unmapped=config.unmapped, rejected=config.rejected,
        )  # fmt: skip
        top = TopK(*(field[:-1] for field in top))
        best = Best(*top, logp_of(top, stretch.targets[1:]))
        if teacher.own and config.unmapped == "tail" and config.k == teacher.meta.k:  # as it is, where it names no padding of its table
            whole = known.all(axis=1)
            for ours, theirs in zip(best, found, strict=True):
                ours[np.flatnonzero(accepted)[whole]] = theirs[whole]
        return best, named, mapped

    def _together(self, tops: Sequence[Best], weights: Float[np.ndarray, "sources documents"], stretch: Stretch) -> Best:
        """The chosen teacher's predictions in each document, or the mean of all."""
        out = taught.nothing(self.meta.layout, len(stretch.predicts))
        if self.config.fuse == "min_ce" or len(tops) == 1:
            for top, weight in zip(tops, weights, strict=True):
                rows = (weight > 0)[stretch.document]
                for ours, theirs in zip(out, top, strict=True):
                    ours[rows] = theirs[rows]
            return out
        for d in np.flatnonzero(weights.sum(axis=0)).tolist():
            here = slice(stretch.cuts[d], stretch.cuts[d + 1])
            mixed = fuse.mix([TopK(*(field[here] for field in top[:3])) for top in tops], weights[:, d], self.config.k)
            for ours, theirs in zip(out, (*mixed, logp_of(mixed, stretch.targets[1:][here])), strict=True):
                ours[here] = theirs
        return out


def ids_of(corpus: Corpus, document: int) -> np.ndarray:
    """A document's tokens."""
    return np.asarray(corpus.tokens[corpus.offsets[document] : corpus.offsets[document + 1]])


def text_of(document: Document, tokenizers: Sequence[Tokenizer], loss_on: str) -> str:
    """The text that a document's tokens spell, under each of the tokenizers.

    Raises:
      ConfigError: a chat, where one of them has a template: it is another text for each.
    """
    if document.messages and any(tokenizer.chat_template for tokenizer in tokenizers):
        raise ConfigError("a chat is another text under each chat template, so it cannot be aligned; write it out as text of one field")
    return "".join(piece.text for piece in pieces(document, None, loss_on))


def logp_of(top: TopK, ids: np.ndarray) -> np.ndarray:
    """Log-probability [rows] of one id a row; that of the tail where the row does not name it."""
    hit = (top.ids == ids[:, None]) & np.isfinite(top.logp)
    with np.errstate(divide="ignore"):
        return np.where(hit.any(axis=1), np.where(hit, top.logp, -np.inf).max(axis=1), np.log(top.tail)).astype(np.float32)


def _actual(records: Taught, begin: int, end: int) -> np.ndarray:
    """Log-probabilities of the tokens that came, float64, at flat positions begin … end - 1."""
    parts = [records.at(np.arange(start, min(start + SHARD, end))).actual for start in range(begin, end, SHARD)]
    return np.concatenate(parts or [np.zeros(0)]).astype(np.float64)
