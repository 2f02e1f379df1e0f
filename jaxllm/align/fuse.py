"""One teacher from several: the best source of each text (MinCE), or all of them weighed (AvgCE).

    MinCE   P = P^j*,            j* = argmin_j CE_j
    AvgCE   P = Σ_j w_j P^j,     w = softmax_j(exp(−CE_j))

CE_j is source j's mean negative log-likelihood of the text under its own tokenizer. A longer token costs more than a shorter one, so
that means over tokens of unlike tokenizers do not compare; the same sum over the text's bytes does: `cross_entropy(per='byte')`.
The weights are the released code's. They are almost uniform (CE of 2, 2.5 and 3 gives 0.349, 0.331 and 0.320), and never beyond
e : 1. The code computes CE in bfloat16, where sources that are near each other tie; here it is float64.

Source: arXiv:2401.10491, section 3.3.

Sizes: `sources`; `texts` may be any shape, also of packed blocks, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from jaxllm.align.project import Entries, check, entries, merged, top_k
from jaxllm.config import ConfigError, nearest
from jaxllm.data.taught import TopK

type Per = Literal["token", "byte"]


def cross_entropy(
    nll: Float[np.ndarray, "sources ..."],
    *,
    num_tokens: Int[np.ndarray, "sources ..."] | None = None,
    num_bytes: Int[np.ndarray, ...] | None = None,
    per: Per = "token",
) -> Float[np.ndarray, "sources ..."]:
    """Nats per token, or per byte, float64.

    Args:
      nll: sum of the negative log-likelihoods that each source gives to the tokens of each text, in nats.
      num_tokens: how many of them, under each source's tokenizer; for 'token'.
      num_bytes: of UTF-8 in each text; for 'byte'.

    Raises:
      ConfigError: another `per`; the count that it needs is not there, or not positive.
    """
    if per not in (choices := ("token", "byte")):
        raise ConfigError(f"per is '{per}'; it is one of {', '.join(choices)}{nearest(per, choices)}")
    count = num_tokens if per == "token" else num_bytes
    if count is None:
        raise ConfigError(f"per='{per}' divides by the number of {per}s: give num_{per}s")
    if np.any(np.asarray(count) <= 0):
        raise ConfigError(f"num_{per}s holds {np.min(count)}; leave out texts without a {per}")
    return np.asarray(nll, np.float64) / np.asarray(count, np.float64)


def min_ce(ce: Float[np.ndarray, "sources ..."]) -> Int[np.ndarray, ...]:
    """Index of each text's source with the least cross-entropy, the first of equal ones.

    >>> min_ce(np.array([[2.0, 3.0], [2.0, 1.0]])).tolist()
    [0, 1]

    Raises:
      ConfigError: a cross-entropy that is not finite, or no source.
    """
    return np.argmin(_checked(ce), axis=0)


def avg_ce(ce: Float[np.ndarray, "sources ..."]) -> Float[np.ndarray, "sources ..."]:
    """softmax_j(exp(−CE_j)), the sources' weights in each text, float64.

    Raises:
      ConfigError: a cross-entropy that is not finite, or no source.
    """
    scores = np.exp(np.exp(-_checked(ce)))
    return scores / scores.sum(axis=0)


def _checked(ce: np.ndarray) -> np.ndarray:
    ce = np.asarray(ce, np.float64)
    if ce.ndim < 1 or not len(ce):
        raise ConfigError(f"cross-entropies have shape {ce.shape}; give [sources …] with one source at least")
    if not np.isfinite(ce).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(ce))[0])
        raise ConfigError(f"the cross-entropy at {where} is {ce[where]}; leave out texts that a source could not score")
    if ce.min() < 0:
        raise ConfigError(f"cross-entropies go down to {ce.min():.4g}; give negative log-likelihoods, which are not below 0")
    return ce


def mix(tops: Sequence[TopK], weights: Float[np.ndarray, " sources"], k: int | None = None) -> TopK:
    """Σ_j w_j P^j of one text's rows under several sources, at the target's positions and in its ids: [rows k].

    What a source does not name among its own entries is in its tail, though another may name it: an id's probability is a lower bound,
    and the tail an upper one.

    Args:
      tops: of `project`, equal in rows; k may differ.
      weights: of `avg_ce`, one a source, sum 1.
      k: entries to keep; None for as many as the sources have together.

    Raises:
      ConfigError: weights that are not one a source or do not sum to 1; unlike numbers of rows; rows that do not sum to 1.
    """
    weights = np.asarray(weights, np.float64)
    if weights.shape != (len(tops),) or not len(tops) or weights.min() < 0 or abs(weights.sum() - 1.0) > 1e-6:
        raise ConfigError(f"weights of {len(tops)} sources are {weights.tolist()}; give one a source, not negative, with sum 1")
    sizes = [len(top.ids) for top in tops]
    if len(set(sizes)) > 1:
        raise ConfigError(f"the sources have {', '.join(map(str, sizes))} rows; project all to the positions of one target text")
    parts = []
    for top, weight in zip(tops, weights.tolist(), strict=True):
        check(top)
        found = entries(top)
        parts.append(found._replace(p=found.p * weight))
    together = merged(Entries(*(np.concatenate(fields) for fields in zip(*parts, strict=True))), "sum")
    return top_k(together, sizes[0], sum(top.ids.shape[1] for top in tops) if k is None else k)
