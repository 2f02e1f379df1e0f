"""FuseLLM's own alignment of two tokenizations: a dynamic programme over the strings of their tokens. For parity; see `spans`.

    C[i, j] = lev(source i, target j) + min(C[i-1, j-1], C[i-1, j], C[i, j-1])

with lev the edit distance of the tokens without their word-start marker, and the path traced back from the end; of equal costs the
diagonal first, then up (one source token back), then left (one target token back).
Source: arXiv:2401.10491, section 3.2, with the released code's ties. Quadratic in the text: the distances of distinct strings are taken
once (rapidfuzz, vectorised), the loop is compiled (numba); what the table costs is a byte a cell.

What we do differently: tokens are compared as the text that they spell, so that `Ã©` of a byte-level vocabulary is the `é` of another;
the code compares their spellings in the vocabulary files.

Sizes: `target` and `source` are the numbers of tokens of one text under either tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxllm.align.extra import require
from jaxllm.align.spans import Rows
from jaxllm.config import ConfigError, nearest
from jaxllm.data.tokenizer import Tokenizer

_DIAGONAL, _UP, _LEFT = 0, 1, 2
_WHAT = "pairing tokens by edit distance"


class Warp(NamedTuple):
    """The cheapest path through both token lists, from their beginnings to their ends."""

    cost: int
    """Sum of edit distances along it."""
    source: Int[np.ndarray, " steps"]
    target: Int[np.ndarray, " steps"]

    def sources(self) -> list[list[int]]:
        """For each target token, the source tokens that the path pairs it with, in order."""
        out: list[list[int]] = [[] for _ in range(int(self.target[-1]) + 1)] if len(self.target) else []
        for source, target in zip(self.source.tolist(), self.target.tolist(), strict=True):
            out[target].append(source)
        return out


def bare(piece: str) -> str:
    """A token's spelling in a vocabulary file without its word-start marker.

    >>> bare("▁love"), bare("Ġto")
    ('love', 'to')
    """
    return piece.replace("\u2581", "").replace("\u0120", "")


def spellings(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text of each token without spaces, which is what a marker stands for. A byte that is no character alone is one surrogate."""
    return [tokenizer.token_bytes(int(id)).decode(errors="surrogateescape").replace(" ", "") for id in ids]


def warp(source: Sequence[str], target: Sequence[str]) -> Warp:
    """The cheapest path that pairs two lists of token strings.

    Args:
      source, target: without markers, from `spellings` or `bare`. If either is empty, so is the path.

    Raises:
      ConfigError: rapidfuzz or numba is not installed.
    """
    if not len(source) or not len(target):
        return Warp(0, np.zeros(0, np.int64), np.zeros(0, np.int64))
    process, levenshtein = require("rapidfuzz.process", _WHAT), require("rapidfuzz.distance", _WHAT).Levenshtein
    (strings, rows), (others, columns) = (_distinct(side) for side in (source, target))
    distances = process.cdist(strings, others, scorer=levenshtein.distance, dtype=np.int32)
    moves = np.empty((len(rows), len(columns)), np.uint8)
    cost = _compiled(fill)(distances, rows, columns, moves)
    steps = _compiled(trace)(moves)
    return Warp(int(cost), *steps.T)


def _distinct(strings: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(distinct strings, index of each string among them)."""
    index: dict[str, int] = {}
    places = np.array([index.setdefault(string, len(index)) for string in strings], np.int64)
    return list(index), places


@functools.cache
def _compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    return require("numba", _WHAT).njit(loop)


def fill(distances: np.ndarray, rows: np.ndarray, columns: np.ndarray, moves: np.ndarray) -> int:
    """Write into `moves` [source, target] which neighbour each cell's path comes from; returns the cost of the last cell.

    Args:
      distances: int32, between distinct strings, which `rows` and `columns` index.
    """
    above = np.empty(len(columns), np.int64)
    for i in range(len(rows)):
        corner = left = 0  # C[i-1, j-1] and C[i, j-1]
        for j in range(len(columns)):
            move = _DIAGONAL
            best = corner
            if i == 0 or j == 0:
                move = _UP if i else _LEFT
                best = above[j] if i else left
            else:
                if above[j] < best:
                    move = _UP
                    best = above[j]
                if left < best:
                    move = _LEFT
                    best = left
            corner = above[j]
            left = best + distances[rows[i], columns[j]]
            above[j] = left
            moves[i, j] = move
    return above[-1]


def trace(moves: np.ndarray) -> np.ndarray:
    """The path [steps 2] of (source, target) through `moves`, from the first cell to the last."""
    i, j = moves.shape[0] - 1, moves.shape[1] - 1
    path = np.empty((i + j + 1, 2), np.int64)
    at = i + j + 1
    while True:
        at -= 1
        path[at, 0] = i
        path[at, 1] = j
        if i == 0 and j == 0:
            return path[at:]
        move = moves[i, j]
        if move != _LEFT:
            i -= 1
        if move != _UP:
            j -= 1


# ------------------------------------------------------------------------------------------ acceptance


def rows(
    target: Tokenizer,
    target_ids: Sequence[int] | np.ndarray,
    source: Tokenizer,
    source_ids: Sequence[int] | np.ndarray,
    how: Literal["hard", "soft"] = "soft",
    *,
    vocab: Int[np.ndarray, " source_vocab"] | None = None,
    strict: bool = False,
) -> Rows:
    """The source row of each target row of one text by FuseLLM's rules: the row of the source token that it is paired with.

    Args:
      how: which pairs count. hard (the paper's EM): equal strings. soft (MinED): those, and what `vocab` sends to each other.
      vocab: target id of each source id, from `jaxllm.align.vocab`; for 'soft'.
      strict: as of `accept`.

    Raises:
      ConfigError: another `how`; 'soft' without `vocab`; rapidfuzz or numba is not installed.
    """
    if how not in (choices := ("hard", "soft")):
        raise ConfigError(f"how is '{how}'; it is one of {', '.join(choices)}{nearest(how, choices)}")
    if how == "soft" and vocab is None:
        raise ConfigError("how='soft' also takes what the vocabulary map pairs: give vocab, from vocab_map(...), or how='hard'")
    theirs, ours = spellings(source, source_ids), spellings(target, target_ids)
    path = warp(theirs, ours)
    similar = np.array([theirs[j] == ours[i] for j, i in zip(path.source.tolist(), path.target.tolist(), strict=True)], bool)
    if how == "soft" and vocab is not None and len(similar):
        similar |= vocab[np.asarray(source_ids)[path.source]] == np.asarray(target_ids)[path.target]
    return accept(path, similar, len(target_ids), strict=strict)


def accept(path: Warp, similar: Bool[np.ndarray, " steps"], num_target: int, *, strict: bool = False) -> Rows:
    """The target tokens that the path pairs with exactly one source token, a similar one.

    Args:
      similar: for each step of the path, whether its two tokens count as the same.
      strict: reject a source token that serves several target tokens, which the released code does not: the source's `gets` at the
        target's `get` of `get` + `s` predicts what follows `gets`.
    """
    alone = np.bincount(path.target, minlength=num_target)[path.target] == 1
    if strict:
        alone &= np.bincount(path.source)[path.source] == 1
    good = alone & similar
    source = np.full(num_target, -1, np.int32)
    source[path.target[good]] = path.source[good]
    return Rows(source >= 0, source)
