"""A source's most probable tokens, expressed at the target's positions and in the target's ids.

Ids that the vocabulary map sends nowhere, and entries beyond the k that are kept, are probability that the target is told nothing about.
Here it stays what it is: part of `tail`, for the loss to decide on (`jaxllm.losses.tokens.soft_ce`). FuseLLM's code instead drops it and
takes a softmax over what is left, which over-sharpens; of several source ids with one target id it keeps the largest and drops the
others, where their probabilities add up. Both of its rules are options here, for parity.

Its fallback for rejected rows is the one-hot of the row's current token, though a row predicts the next one (issues 27 and 28 of its
repository); here it is the next.

Source: arXiv:2401.10491, section 3.2.

Sizes: `target` and `source` are the numbers of tokens of one text under either tokenizer, k entries a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxllm.align.spans import Rows
from jaxllm.config import ConfigError, nearest
from jaxllm.data.taught import TopK

type Collisions = Literal["sum", "highest"]
type Unmapped = Literal["tail", "renormalise"]
type Rejected = Literal["one_hot", "empty"]

_ROUNDING = 1e-2  # of a row's sum, as logits stored in 16 bits leave it


class Entries(NamedTuple):
    """Probabilities as a list of (row, id, probability)."""

    rows: Int[np.ndarray, " entries"]
    ids: Int[np.ndarray, " entries"]
    p: Float[np.ndarray, " entries"]


def project(
    source: TopK,
    rows: Rows,
    vocab: Int[np.ndarray, " source_vocab"],
    target_ids: Sequence[int] | np.ndarray,
    *,
    k: int | None = None,
    collisions: Collisions = "sum",
    unmapped: Unmapped = "tail",
    rejected: Rejected = "one_hot",
) -> TopK:
    """The target's [target k] rows of one text: each most probable first, no id twice, exp(logp) and tail together 1.

    FuseLLM's are collisions='highest', unmapped='renormalise', rejected='one_hot'.

    Args:
      source: of the text under the source's tokenizer, [source k].
      rows: which of its rows serve which of the target's, from `spans.rows` or `dtw.rows`.
      vocab: target id of each source id, -1 for none, from `vocab_map`.
      target_ids: the text under the target's tokenizer; row i predicts token i + 1.
      k: entries to keep; None for as many as the source has.
      collisions: of source ids with one target id. sum: add their probabilities. highest: keep the largest.
      unmapped: what becomes of the rest. tail: it is in `tail`, for a row that keeps none all of it. renormalise: the entries that
        are kept are divided by their sum, and `tail` is 0; a row that keeps none counts as rejected.
      rejected: rows without a source. one_hot: the next token for certain. The last row, which has none, is empty. empty: no entry,
        `tail` is 1.

    Raises:
      ConfigError: another option; shapes or ids that do not go together; source rows that do not sum to 1.
    """
    for name, value, choices in (
        ("collisions", collisions, ("sum", "highest")), ("unmapped", unmapped, ("tail", "renormalise")),
        ("rejected", rejected, ("one_hot", "empty")),
    ):  # fmt: skip
        if value not in choices:
            raise ConfigError(f"{name} is '{value}'; it is one of {', '.join(choices)}{nearest(value, choices)}")
    targets = np.asarray(target_ids)
    check(source)
    _check_goes_together(source, rows, vocab, targets)
    k = source.ids.shape[1] if k is None else k
    taken = np.flatnonzero(rows.accepted)
    found = entries(TopK(*(field[rows.source[taken]] for field in source)))
    at = Entries(taken[found.rows], vocab[found.ids].astype(np.int64), found.p)
    out = top_k(merged(Entries(*(field[at.ids >= 0] for field in at)), collisions), len(targets), k)
    accepted = rows.accepted
    if unmapped == "renormalise":
        out = renormalised(out)
        accepted = accepted & (out.tail == 0)
    if rejected == "one_hot":
        certain = np.flatnonzero(~accepted[:-1])
        out.ids[certain, 0], out.logp[certain, 0], out.tail[certain] = targets[certain + 1], 0.0, 0.0
    return out


def check(top: TopK) -> None:
    """Refuse what are no distributions.

    Raises:
      ConfigError: shapes that differ, or a row that does not sum to 1.
    """
    if top.ids.ndim != 2 or top.ids.shape != top.logp.shape or top.tail.shape != top.ids.shape[:1]:
        raise ConfigError(f"ids {top.ids.shape}, logp {top.logp.shape} and tail {top.tail.shape} must be [rows k], [rows k] and [rows]")
    total = np.exp(top.logp.astype(np.float64)).sum(axis=1) + top.tail
    wrong = np.flatnonzero(~(np.abs(total - 1.0) <= _ROUNDING))
    if len(wrong):
        raise ConfigError(
            f"row {wrong[0]} sums to {total[wrong[0]]:.4g}, tail included, and must sum to 1 (as {len(wrong):,} of {len(total):,} rows "
            "do not); give log-probabilities over the source's whole vocabulary, not logits, and the probability left in tail"
        )


def _check_goes_together(source: TopK, rows: Rows, vocab: np.ndarray, targets: np.ndarray) -> None:
    if len(rows.accepted) != len(targets):
        raise ConfigError(f"rows are of {len(rows.accepted)} target tokens and target_ids has {len(targets)}; give those of one text")
    if rows.accepted.any() and rows.source.max() >= len(source.ids):
        raise ConfigError(f"rows point to source row {rows.source.max()} and source has {len(source.ids)}; give those of one text")
    used = source.ids[np.isfinite(source.logp)]
    if len(used) and not 0 <= used.min() <= used.max() < len(vocab):
        raise ConfigError(
            f"source has ids from {used.min()} to {used.max()} and vocab maps 0 to {len(vocab) - 1}; give the map of the source's tokenizer"
        )


# ------------------------------------------------------------------------------------------- entries


def entries(top: TopK) -> Entries:
    """The entries in use, in float64, where every row with its tail sums to 1."""
    p = np.exp(top.logp.astype(np.float64))
    p /= np.maximum(p.sum(axis=1) + top.tail, np.finfo(np.float64).tiny)[:, None]
    rows, columns = np.nonzero(np.isfinite(top.logp))
    return Entries(rows, top.ids[rows, columns].astype(np.int64), p[rows, columns])


def merged(found: Entries, collisions: Collisions) -> Entries:
    """Each (row, id) once."""
    if not len(found.rows):
        return found
    order = np.lexsort((found.ids, found.rows))
    rows, ids, p = (field[order] for field in found)
    first = np.flatnonzero(np.append(True, (np.diff(rows) != 0) | (np.diff(ids) != 0)))
    join = np.add if collisions == "sum" else np.maximum
    return Entries(rows[first], ids[first], join.reduceat(p, first))


def top_k(found: Entries, num_rows: int, k: int) -> TopK:
    """The k most probable entries of each row, of equal ones the lowest id first; what they leave of 1 is the tail.

    Args:
      found: each (row, id) once.

    Raises:
      ConfigError: k below 1.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; keep at least one entry a row")
    order = np.lexsort((found.ids, -found.p, found.rows))
    rows, ids, p = (field[order] for field in found)
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = rank < k
    rows, rank = rows[kept], rank[kept]
    out = TopK(np.zeros((num_rows, k), np.int32), np.full((num_rows, k), -np.inf, np.float32), np.ones(num_rows, np.float32))
    out.ids[rows, rank] = ids[kept]
    with np.errstate(divide="ignore"):  # a probability may be too small for its logarithm to be kept
        out.logp[rows, rank] = np.log(p[kept])
    left = 1.0 - np.bincount(rows, p[kept], num_rows)
    out.tail[:] = np.maximum(left, 0.0)
    return out


def renormalised(top: TopK) -> TopK:
    """Entries divided by their sum, with no tail; a row without entries stays as it is."""
    p = np.exp(top.logp.astype(np.float64))
    mass = p.sum(axis=1)
    some = mass > 0
    logp = np.where(some[:, None], top.logp - np.log(np.where(some, mass, 1.0))[:, None], top.logp)
    return TopK(top.ids, logp.astype(np.float32), np.where(some, 0.0, top.tail).astype(np.float32))
