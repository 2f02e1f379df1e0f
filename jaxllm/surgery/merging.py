"""One model from several of one shape and tokenizer, without training: a weighted mean, TIES, and DARE before either.

    linear  θ = Σ_i w_i θ_i,  Σ_i w_i = 1
    ties    θ = θ_0 + λ τ,    τ the disjoint mean of the task vectors τ_i = θ_i − θ_0, trimmed
    dare    θ_i' = θ_0 + m ∘ τ_i / (1 − p),   m of each parameter 0 with probability p, else 1

TIES (arXiv:2306.01708, section 4), in three steps: *trim* each τ_i to the share of its entries, over all parameters together, that are
largest in size; *elect* for each parameter the sign of Σ_i τ_i, which is the sign with more weight behind it; take the *mean* of those
τ_i that are not 0 and have that sign. The paper keeps 0.2 of the entries and finds λ on held-out text, 1 where there is none.
DARE (arXiv:2311.03099, section 3) leaves each parameter's expectation as it is; p 0.9 costs models of a few billion parameters nothing,
and p 0.99 the largest ones little. It goes before another merge: `linear([dare(base, m, 0.9, rng) for m in models])`.

Models that were trained from one start can be merged; those of unlike starts cannot. That their tokens mean the same is for the caller
to know. All is float32 on the host, a leaf at a time, but for the threshold of `ties`, which sees one model's task vector whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxllm import tree
from jaxllm.config import ConfigError
from jaxllm.contract import Params


def linear(models: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """Σ_i w_i θ_i, in the first model's types.

    Args:
      weights: one a model, sum 1; None for equal ones.

    Raises:
      ConfigError: as of `check`; weights that are not one a model, or do not sum to 1.
    """
    check(models)
    given = [1.0 / len(models)] * len(models) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(models) or not all(map(math.isfinite, given)) or abs(sum(given) - 1.0) > 1e-6:
        raise ConfigError(f"weights of {len(models)} models are {given}; give one a model, with sum 1")

    def mean(path: str, first: np.ndarray, *others: np.ndarray) -> np.ndarray:
        total = sum(weight * _float32(leaf) for weight, leaf in zip(given, (first, *others), strict=True))
        return np.asarray(total).astype(first.dtype)

    return tree.map_with_path(mean, *models)


def ties(base: Params, models: Sequence[Params], density: float = 0.2, scale: float = 1.0) -> Params:
    """θ_0 + λ τ with τ trimmed, of the elected sign, and averaged over the models that agree; in the base's types.

    Args:
      base: θ_0, where all models began.
      density: share of each task vector's entries that are kept, the largest in size; entries equal to the last are kept too.
      scale: λ.

    Raises:
      ConfigError: as of `check`; a density that is not in (0, 1], a scale that is not finite.
    """
    check([base, *models])
    if not 0.0 < density <= 1.0 or not math.isfinite(scale):
        raise ConfigError(f"density is {density} and scale {scale}; the first is a share in (0, 1], the second a finite factor")
    least = np.array([_threshold(base, model, density) for model in models], np.float32)

    def merged(path: str, start: np.ndarray, *leaves: np.ndarray) -> np.ndarray:
        before = _float32(start)
        tasks = np.stack([_float32(leaf) - before for leaf in leaves])
        trimmed = np.where(np.abs(tasks) >= least.reshape(-1, *[1] * before.ndim), tasks, np.float32(0))
        elected = np.sign(trimmed.sum(axis=0))
        agree = (np.sign(trimmed) == elected) & (trimmed != 0)
        mean = np.where(agree, trimmed, 0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
        return (before + np.float32(scale) * mean).astype(start.dtype)

    return tree.map_with_path(merged, base, *models)


def _threshold(base: Params, model: Params, density: float) -> float:
    """Size of the smallest entry of a task vector that is kept."""
    theirs = dict(tree.items(model))
    sizes = np.concatenate([np.abs(_float32(theirs[path]) - _float32(leaf)).ravel() for path, leaf in tree.items(base)])
    dropped = len(sizes) - max(1, round(density * len(sizes)))
    return float(np.partition(sizes, dropped)[dropped])


def dare(base: Params, model: Params, drop: float, rng: np.random.Generator) -> Params:
    """θ_0 + m ∘ (θ − θ_0) / (1 − p), with m drawn anew for each parameter; in the model's types.

    Args:
      drop: p.

    Raises:
      ConfigError: as of `check`; a p that is not in [0, 1).
    """
    check([base, model])
    if not 0.0 <= drop < 1.0:
        raise ConfigError(f"drop is {drop}; it is the share of entries that are dropped, in [0, 1)")

    def thinned(path: str, start: np.ndarray, leaf: np.ndarray) -> np.ndarray:
        before = _float32(start)
        keep = rng.random(before.shape, np.float32) >= drop
        return (before + np.where(keep, (_float32(leaf) - before) / np.float32(1.0 - drop), 0)).astype(leaf.dtype)

    return tree.map_with_path(thinned, base, model)


def check(models: Sequence[Params]) -> None:
    """Refuse models that are not of one shape.

    Raises:
      ConfigError: none at all, or what is missing, surplus or of another shape in the first that differs.
    """
    if not models:
        raise ConfigError("there is no model to merge; give one at least")
    for number, model in enumerate(models[1:], 1):
        if lines := tree.structure_diff(models[0], model):
            more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
            raise ConfigError(f"model {number} (counted from 0) has another shape than model 0: {'; '.join(lines[:3])}{more}")


def _float32(leaf: np.ndarray) -> np.ndarray:
    return np.asarray(leaf).astype(np.float32, copy=False)
