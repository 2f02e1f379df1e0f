"""Beam search: the device scores the continuations of W rows of each prompt, the host keeps the books.

Letters: P prompts, W beams of each, B = P · W rows, C candidates, T prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.config import ConfigError
from jaxllm.contract import Params
from jaxllm.models.generate import Generator, bucket, check_lengths, pad_prompts, read_prompts, take_rows
from jaxllm.sharding import constrain


class Beam(NamedTuple):
    """One text that the search found."""

    ids: list[int]
    """Without the stop token."""
    logp: float
    """Sum of the tokens' log-probabilities as the processors left them, the stop token's included."""
    score: float
    """logp / ((offset + n) / (offset + 1)) ** length_penalty, n tokens, the stop token included."""
    finish: str
    """'stop' or 'length'."""


class Candidates(NamedTuple):
    """The best continuations of each prompt by one token, best first."""

    logps: Float[Array, "P C"]
    beams: Int[Array, "P C"]
    """Which of the prompt's beams each continues."""
    tokens: Int[Array, "P C"]


def beam_search(
    generate: Generator,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int | Sequence[int],
    num_beams: int,
    stop_ids: Sequence[int] = (),
    ends: Callable[[Sequence[int]], bool] = lambda ids: False,
    length_penalty: float = 1.0,
    offset: int = 0,
    max_length: int | None = None,
    frozen: Any = None,
) -> list[list[Beam]]:
    """Up to `num_beams` finished continuations of each prompt, best score first; a prompt's are its own, whatever is in the batch.

    As in transformers, with early_stopping='never': a text is finished by a stop token among the best `num_beams` candidates, or by
    its length; processors see log-probabilities; a prompt's search ends when no running beam can overtake the finished ones.

    Args:
      num_tokens: new tokens of each prompt, or of all.
      length_penalty, offset: n tokens' log-probability is divided by ((offset + n) / (offset + 1)) ** length_penalty. An offset of 0
        is transformers' n ** length_penalty; 5 is Google's translation system's and T5's, which GPT-3 took over with 0.6
        (arXiv:1609.08144, equation 14; arXiv:2005.14165, section 2.4).
      ends: whether a continuation with these ids is finished by its last token, which stays: where stop strings hang.

    Raises:
      ConfigError: fewer than one beam, an empty prompt, or one longer than the context (says by how much).
    """
    if num_beams < 1:
        raise ConfigError(f"num_beams is {num_beams}; it must be at least 1")
    if not prompts:
        return []
    each = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else list(num_tokens)
    lm = generate.lm
    needed = check_lengths(lm, [len(prompt) for prompt in prompts], each, max_length)
    limit = lm.config.max_length if lm.config.position == "learned" else max_length
    padded, lengths = pad_prompts(prompts, limit or bucket(needed))
    num_candidates = min(max(2, 1 + len(stop_ids)) * num_beams, num_beams * lm.config.vocab_size)
    begin, go_on = _compiled(generate, num_beams, num_candidates)

    def norm(length: int) -> float:
        return ((offset + length) / (offset + 1)) ** length_penalty

    books = [_Books(new, num_beams, frozenset(stop_ids), ends, norm) for new in each]
    found, carry = begin(params, frozen, padded, lengths, bucket(max(needed, padded.shape[1]), limit))
    while True:
        logps, beams, tokens = (np.asarray(column).tolist() for column in found)
        rows = [own.take(logps[p], beams[p], tokens[p]) for p, own in enumerate(books)]
        if all(own.done for own in books):
            return [own.finished for own in books]
        flat = [(logp, p * num_beams + beam, token) for p, own_rows in enumerate(rows) for logp, beam, token in own_rows]
        columns = (np.array(column, kind) for column, kind in zip(zip(*flat, strict=True), (np.float32, np.int32, np.int32), strict=True))
        found, carry = go_on(params, frozen, *columns, carry)


class _Books:
    """The running and the finished texts of one prompt."""

    def __init__(
        self, num_tokens: int, num_beams: int, stop_ids: frozenset[int], ends: Callable[[Sequence[int]], bool], norm: Callable[[int], float]
    ) -> None:  # fmt: skip
        self._num_tokens, self._num_beams, self._stop_ids, self._ends, self._norm = num_tokens, num_beams, stop_ids, ends, norm
        self._running: list[list[int]] = [[]] * num_beams
        self._length = 0
        self.finished: list[Beam] = []
        """Best score first."""
        self.done = num_tokens < 1

    def take(self, logps: list[float], beams: list[int], tokens: list[int]) -> list[tuple[float, int, int]]:
        """Sort one step's candidates into finished and running texts; (log-probability, beam, token) of the `num_beams` that run on.

        Where fewer do, and once the search is done, rows of log-probability −∞ fill the shape: nothing comes of them.
        """
        self._length += 1
        following: list[tuple[float, int, int]] = []
        for rank, (logp, parent, token) in enumerate(zip(logps, beams, tokens, strict=True)):
            if self.done or logp == -np.inf:
                break
            stopped, ids = token in self._stop_ids, [*self._running[parent], token]
            ended = stopped or self._ends(ids)
            if not ended and self._length < self._num_tokens:
                following.append((logp, parent, token))
            elif rank < self._num_beams:
                score = logp / self._norm(self._length)
                self.finished.append(Beam(ids[:-1] if stopped else ids, logp, score, "stop" if ended else "length"))
        following = following[: self._num_beams]
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: self._num_beams]
        full = len(self.finished) == self._num_beams
        self.done = not following or (full and self._best_case(following[0][0]) <= self.finished[-1].score)
        following += [(-np.inf, 0, 0)] * (self._num_beams - len(following))
        self._running = [[*self._running[parent], token] for _, parent, token in following]
        return following

    def _best_case(self, logp: float) -> float:
        """The highest score that a beam of this log-probability can still reach: no further token has one above 0."""
        return max(logp / self._norm(self._length + 1), logp / self._norm(self._num_tokens))


@lru_cache(maxsize=8)
def _compiled(generate: Generator, num_beams: int, num_candidates: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(prefill and first candidates, one decode step and the next candidates) for W = num_beams rows of each prompt."""
    lm, processor = generate.lm, generate.sample.processor

    def candidates(params: Params, frozen: Any, hidden: Float[Array, "B D"], logps: Float[Array, " B"], state: Any) -> Candidates:
        own = processor.apply(frozen, state, jax.nn.log_softmax(lm.unembed(params).logits(hidden), -1))
        total = jnp.where(jnp.isneginf(logps)[:, None], -jnp.inf, logps[:, None] + own)
        best, index = jax.lax.top_k(total.reshape(-1, num_beams * total.shape[1]), num_candidates)
        beams, tokens = jnp.divmod(index, total.shape[1])
        return Candidates(constrain(best, ". ."), constrain(beams, ". ."), constrain(tokens, ". ."))

    def begin(params: Params, frozen: Any, tokens: Int[Array, "P T"], lengths: Int[Array, " P"], num_slots: int) -> tuple[Candidates, Any]:
        last, cache = read_prompts(lm, params, tokens, lengths, num_slots)
        rows = jnp.repeat(jnp.arange(len(tokens)), num_beams)
        state = processor.init(frozen, tokens[rows], lengths[rows], lm.config.vocab_size, num_slots)
        only_first = jnp.where(jnp.arange(len(rows)) % num_beams == 0, 0.0, -jnp.inf)
        return candidates(params, frozen, last[rows], only_first, state), (lengths[rows], take_rows(cache, rows), state)

    def go_on(
        params: Params, frozen: Any, logps: Float[Array, " B"], parents: Int[Array, " B"], tokens: Int[Array, " B"], carry: Any
    ) -> tuple[Candidates, Any]:
        positions, cache, state = carry  # a row's parent is of its own prompt, whose rows have one position
        state = processor.update(frozen, processor.take(state, parents), tokens)
        out = lm.apply(params, tokens[:, None], positions=positions[:, None], cache=take_rows(cache, parents))
        return candidates(params, frozen, out.hidden[:, 0], logps, state), (positions + 1, out.cache, state)

    return jax.jit(begin, static_argnums=4), jax.jit(go_on, donate_argnums=5)
