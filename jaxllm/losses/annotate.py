"""Annotators add what other models see to `Obs`: `(frozen params by model name, obs, key) -> obs`.

They leave hidden states, not logits, and never a gradient. A loss cannot tell whether an annotator ran in
the step, in an earlier program, or from disk.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array

from jaxllm.config import ConfigError, nearest
from jaxllm.contract import STUDENT, Batch, Obs, Params

type Annotator = Callable[[dict[str, Params], Obs, Array | None], Obs]
"""`(frozen params by model name, obs, key) -> obs` with more in it."""


def teacher(apply: Callable[[Params, Batch], Obs], name: str) -> Annotator:
    """Another model's view of the batch, under its name and without gradients.

    Args:
      apply: (params, batch) -> Obs, as for the student: what it files under STUDENT goes to `name`.
      name: key of its params in `frozen`, and of its hidden states, unembedding and taps in `Obs`. Its scores s
        are filed as `name/s`.

    Raises:
      ConfigError: no such params.
    """

    def annotate(frozen: dict[str, Params], obs: Obs, key: Array | None) -> Obs:
        del key
        if name not in frozen:
            raise ConfigError(f"teacher '{name}' has no params; frozen has {', '.join(frozen) or 'none'}{nearest(name, frozen)}")
        seen = jax.lax.stop_gradient(apply(frozen[name], obs.batch))
        return obs.replace(
            hidden={**obs.hidden, name: seen.hidden[STUDENT]},
            unembeddings={**obs.unembeddings, name: seen.unembeddings[STUDENT]},
            taps={**obs.taps, **({name: seen.taps[STUDENT]} if STUDENT in seen.taps else {})},
            scores={**obs.scores, **{f"{name}/{score}": value for score, value in seen.scores.items()}},
        )

    return annotate


def chain(*annotators: Annotator) -> Annotator:
    """One annotator from several, in order; each gets a key of its own."""

    def annotate(frozen: dict[str, Params], obs: Obs, key: Array | None) -> Obs:
        for i, annotator in enumerate(annotators):
            obs = annotator(frozen, obs, None if key is None else jax.random.fold_in(key, i))
        return obs

    return annotate
