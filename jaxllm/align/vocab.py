"""Source ids as target ids: which token of another vocabulary means the same.

1. A special token goes by its role: eos to eos, bos to bos, padding to padding, and nowhere else.
2. A token that spells bytes goes to the token that spells the same bytes. `▁the` and `Ġthe` both spell ` the`, so this is the paper's
   exact match after the word-start marker is replaced, for any pair of formats. Where a vocabulary has two tokens of the same byte, a
   piece and SentencePiece's fallback `<0x41>`, a fallback token goes to a fallback token and a piece to a piece, as far as there is one.
   Of other tokens with the same bytes, the one that the target's `encode` gives.
3. 'min_edit' only (the paper's MinED): any other goes to the token with the least edit distance, the lowest id of several. Tokens of
   one byte, tokens beyond ASCII and names of special tokens (`</s>`, `<|im_start|>`) take no part on either side.

Source: arXiv:2401.10491, section 3.2. The distance of strings with a marker is kept: a space counts as a character.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from jaxllm.align.extra import require
from jaxllm.config import ConfigError, DataConfig, nearest
from jaxllm.data import cache
from jaxllm.data.tokenizer import Tokenizer

type Mode = Literal["exact", "min_edit"]

_BLOCK_PAIRS = 1 << 24
_CONTROL = re.compile(r"</?s>|<(unk|pad|bos|eos|mask)>|<\|.*\|>|\[(PAD|UNK|CLS|SEP|MASK)\]")
"""What names a special token, though this tokenizer may take it for text."""


def vocab_map(source: Tokenizer, target: Tokenizer, mode: Mode = "min_edit") -> Int[np.ndarray, " source_vocab"]:
    """Target id of each source id, int32; -1 where there is none. Of equal tokenizers, each id itself.

    Raises:
      ConfigError: another `mode`; 'min_edit' without rapidfuzz.
    """
    if mode not in (choices := ("exact", "min_edit")):
        raise ConfigError(f"mode is '{mode}'; it is one of {', '.join(choices)}{nearest(mode, choices)}")
    if source.fingerprint == target.fingerprint:
        return np.arange(source.num_vocab, dtype=np.int32)
    theirs, ours = pieces(source), pieces(target)
    out = _exact(source, target, theirs, ours)
    if mode == "min_edit":
        texts = [_text(piece) for piece in theirs]
        rest = [id for id in np.flatnonzero(out < 0).tolist() if texts[id]]
        candidates = [id for id, piece in enumerate(ours) if _text(piece)]
        nearest_ids = least_edits([texts[id] for id in rest], [_text(ours[id]) for id in candidates])
        if candidates:
            out[rest] = np.array(candidates, np.int32)[nearest_ids]
    for theirs_id, ours_id in _roles(source, target).items():
        out[theirs_id] = ours_id
    return out


def cached_vocab_map(
    source: Tokenizer, target: Tokenizer, mode: Mode = "min_edit", cache_dir: str = ""
) -> Int[np.ndarray, " source_vocab"]:
    """`vocab_map`, computed once for a pair of tokenizers.

    Args:
      cache_dir: as `data.cache_dir`; '' for $JAXLLM_CACHE, else ~/.cache/jaxllm.

    Raises:
      ConfigError: as of `vocab_map`; the cache cannot be written.
    """
    home: Path = cache.root(DataConfig(cache_dir=cache_dir))
    roles = [[tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.num_vocab] for tokenizer in (source, target)]
    name = cache.key("vocab map 1", source.fingerprint, target.fingerprint, roles, mode)
    made = cache.folder(home / "align" / name, lambda folder: np.save(folder / "map.npy", vocab_map(source, target, mode)))
    return np.load(made / "map.npy")


def pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id spells; none for special tokens and those with a role."""
    out = list(map(tokenizer.token_bytes, range(tokenizer.num_vocab)))
    for id in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id):
        if id is not None:
            out[id] = b""
    return out


def _text(piece: bytes) -> str:
    """What edit distance may compare, else ''."""
    text = piece.decode() if len(piece) > 1 and piece.isascii() else ""
    return "" if _CONTROL.fullmatch(text) else text


def _roles(source: Tokenizer, target: Tokenizer) -> dict[int, int]:
    """Special ids by role; one that has several goes by eos first, then bos."""
    pairs = ((source.pad_id, target.pad_id), (source.bos_id, target.bos_id), (source.eos_id, target.eos_id))
    return {theirs: ours for theirs, ours in pairs if theirs is not None and ours is not None}


def _exact(source: Tokenizer, target: Tokenizer, theirs: Sequence[bytes], ours: Sequence[bytes]) -> Int[np.ndarray, " source_vocab"]:
    """Ids of equal bytes; of several in the target the one that its `encode` gives, else the lowest."""
    index = _first(ours)
    for piece in _several(ours):
        with contextlib.suppress(UnicodeDecodeError):
            given = target.encode(piece.decode())
            if len(given) == 1 and ours[given[0]] == piece:
                index[piece] = given[0]
    fallbacks, their_fallbacks = _fallbacks(ours), _fallbacks(theirs)
    index |= {byte: piece for byte, (_, piece) in fallbacks.items()}
    out = np.fromiter(map(index.get, theirs, itertools.repeat(-1)), np.int32, len(theirs))
    for byte, (fallback, _) in their_fallbacks.items():
        out[fallback] = fallbacks[byte][0] if byte in fallbacks else index.get(byte, -1)
    return out


def _first(pieces: Sequence[bytes]) -> dict[bytes, int]:
    """Lowest id of each spelling."""
    index = dict(zip(reversed(pieces), range(len(pieces) - 1, -1, -1), strict=True))
    index.pop(b"", None)
    return index


def _several(pieces: Sequence[bytes]) -> set[bytes]:
    """What more than one id spells."""
    index = _first(pieces)
    return {piece for id, piece in enumerate(pieces) if piece and index[piece] != id}


def _fallbacks(pieces: Sequence[bytes]) -> dict[bytes, tuple[int, int]]:
    """Bytes with two tokens -> (the byte token, the piece): a SentencePiece model has its byte tokens before its pieces."""
    first, out = dict[bytes, int](), {}
    for id in [id for id, piece in enumerate(pieces) if len(piece) == 1]:
        if first.setdefault(pieces[id], id) != id:
            out[pieces[id]] = (first[pieces[id]], id)
    return out


def least_edits(strings: Sequence[str], candidates: Sequence[str]) -> Int[np.ndarray, " strings"]:
    """For each string, the index of the candidate with the least edit distance, the first of several.

    A candidate that is r characters longer or shorter is r edits away at least. So candidates are tried by length, r = 0, 1, 2, …, and
    only for strings that have none nearer than r yet: no distance is taken twice, and most are never taken.

    >>> least_edits(["gets", "colour"], ["color", "get", "cell", "set"]).tolist()
    [1, 0]

    Raises:
      ConfigError: rapidfuzz is not installed.
    """
    process, levenshtein = (require(f"rapidfuzz.{part}", "mapping tokens by edit distance") for part in ("process", "distance"))
    found = np.zeros(len(strings), np.int64)
    if not candidates or not strings:
        return found
    sizes, their_sizes = (np.fromiter(map(len, side), np.int64, len(side)) for side in (strings, candidates))
    by_size = {size: np.flatnonzero(their_sizes == size) for size in np.unique(their_sizes).tolist()}
    best = np.full(len(strings), np.iinfo(np.int64).max)
    for size in np.unique(sizes).tolist():
        same = np.flatnonzero(sizes == size)
        for theirs in sorted(by_size, key=lambda other: abs(other - size)):
            group = by_size[theirs]
            step = max(1, _BLOCK_PAIRS // len(group))
            open_ = same[best[same] >= abs(theirs - size)]  # at equality a lower index may win
            for block in np.split(open_, range(step, len(open_), step)):
                distances = process.cdist(
                    [strings[i] for i in block.tolist()], [candidates[i] for i in group.tolist()], scorer=levenshtein.Levenshtein.distance,
                    dtype=np.uint8 if max(size, theirs) < 256 else np.int32,
                )  # fmt: skip
                at = distances.argmin(axis=1)
                distance, index = distances[np.arange(len(block)), at].astype(np.int64), group[at]
                better = (distance < best[block]) | ((distance == best[block]) & (index < found[block]))
                best[block[better]], found[block[better]] = distance[better], index[better]
    return found
