"""Continue prompts: one jitted prefill, one jitted decode step with a donated cache, static shapes.

Tokens and log-probabilities come out one step at a time; the next step is already running while the caller looks at this one.
Prompts are padded to a few lengths (`bucket`), so that a new length rarely compiles anew.

Letters: B rows, T prompt length, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.config import ConfigError
from jaxllm.contract import LM, Params
from jaxllm.models import logits as processors
from jaxllm.models.logits import Processor
from jaxllm.sharding import constrain

# ------------------------------------------------------------------------------------------- sampling


class Sampler(NamedTuple):
    """How the next token is chosen: logits are processed, then the best is taken or one is drawn."""

    processor: Processor
    greedy: bool

    def choose(self, logits: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
        """A token of each row, from processed logits and one random key per row."""
        chosen = jnp.argmax(logits, -1) if self.greedy else jax.vmap(jax.random.categorical)(keys, logits)
        return chosen.astype(jnp.int32)


def sampler(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    constraints: Sequence[Processor] = (),
) -> Sampler:
    """Processors in the order of transformers: constraints, repetition penalty, temperature, top-k, top-p, min-p; then a draw.

    Args:
      temperature: 0 takes the most probable token.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the smallest set of tokens with at least this probability.
      min_p: keep tokens with at least this share of the best one's probability.
      constraints: processors of your own, before all others.

    Raises:
      ConfigError: a value out of its range.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1 or not repetition_penalty > 0:
        raise ConfigError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}, repetition_penalty {repetition_penalty}: "
            "need temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, repetition_penalty > 0"
        )
    chosen = [*constraints, *([processors.repetition_penalty(repetition_penalty)] if repetition_penalty != 1 else [])]
    if temperature > 0:  # the others never remove the most probable token
        chosen += [processors.temperature(temperature)] if temperature != 1 else []
        chosen += [processors.top_k(top_k)] if top_k else []
        chosen += [processors.top_p(top_p)] if top_p < 1 else []
        chosen += [processors.min_p(min_p)] if min_p else []
    return Sampler(processors.chain(*chosen), greedy=temperature == 0)


# -------------------------------------------------------------------------------------------- compiled


class Step(NamedTuple):
    """One new token of every row."""

    tokens: Int[Array | np.ndarray, " B"]
    logps: Float[Array | np.ndarray, " B"]
    """Natural log-probability of each token under the model itself: before any processor, temperature included."""


class Carry(NamedTuple):
    """What one decode step hands to the next; donated."""

    positions: Int[Array, " B"]
    """Of the newest token, which is not in the cache yet."""
    step: Int[Array, ""]
    cache: Any
    state: Any
    """The processor's."""


class Past(NamedTuple):
    """What a cache holds of the prompts already, and what it lacks."""

    tokens: Int[Array | np.ndarray, "P T"]
    """The prompts from `start` on."""
    start: Int[Array | np.ndarray, " P"]
    """Tokens of each prompt that the cache holds; what it holds beyond them is forgotten."""
    cache: Any


@dataclass(frozen=True)
class Generator:
    """Compiled prefill and decode of one LM, to be reused over prompts of like shape.

    prefill(params, frozen, tokens [P T], lengths [P], keys [B], cache length, samples per prompt, Past or None) -> Step, Carry
    decode(params, frozen, tokens [B], keys [B], Carry) -> Step, Carry          B = P × samples; the carry is donated
    """

    lm: LM
    sample: Sampler
    prefill: Callable[..., tuple[Step, Carry]]
    decode: Callable[..., tuple[Step, Carry]]


def generator(lm: LM, sample: Sampler) -> Generator:
    """Jit `lm` for generation with `sample`.

    Raises:
      ConfigError: a bidirectional model, which has no next token.
    """
    if lm.config.mask == "bidirectional":
        raise ConfigError("model.mask is 'bidirectional': such a model has no next token to generate; use 'causal' or 'prefix'")

    def choose(params: Params, frozen: Any, hidden: Float[Array, "B D"], keys: Array, step: Array, state: Any) -> tuple[Step, Any]:
        logits = lm.unembed(params).logits(hidden)
        token = sample.choose(sample.processor.apply(frozen, state, logits), jax.vmap(jax.random.fold_in, (0, None))(keys, step))
        logp = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, -1)
        return Step(constrain(token, "."), constrain(logp, ".")), sample.processor.update(frozen, state, token)

    def prefill(
        params: Params, frozen: Any, tokens: Int[Array, "P T"], lengths: Int[Array, " P"], keys: Array, num_slots: int, num_samples: int,
        past: Past | None = None,
    ) -> tuple[Step, Carry]:  # fmt: skip
        last, cache = read_prompts(lm, params, tokens, lengths, num_slots, past)
        if num_samples > 1:
            rows = jnp.repeat(jnp.arange(tokens.shape[0]), num_samples)
            last, cache, tokens, lengths = last[rows], take_rows(cache, rows), tokens[rows], lengths[rows]
        state = sample.processor.init(frozen, tokens, lengths, lm.config.vocab_size, num_slots)
        new, state = choose(params, frozen, last, keys, jnp.int32(0), state)
        return new, Carry(lengths, jnp.int32(1), cache, state)

    def decode(params: Params, frozen: Any, tokens: Int[Array, " B"], keys: Array, carry: Carry) -> tuple[Step, Carry]:
        out = lm.apply(params, tokens[:, None], positions=carry.positions[:, None], cache=carry.cache)
        new, state = choose(params, frozen, out.hidden[:, 0], keys, carry.step, carry.state)
        return new, Carry(carry.positions + 1, carry.step + 1, out.cache, state)

    return Generator(lm, sample, jax.jit(prefill, static_argnums=(5, 6)), jax.jit(decode, donate_argnums=(4,)))


def read_prompts(
    lm: LM, params: Params, tokens: Int[Array, "P T"], lengths: Int[Array, " P"], num_slots: int, past: Past | None = None
) -> tuple[Float[Array, "P D"], Any]:
    """(hidden state of each prompt's last token, the cache after them); a prefix-LM sees its prompt both ways."""
    cache, start = lm.init_cache(tokens.shape[0], num_slots), jnp.zeros_like(lengths)
    if past is not None:
        tokens, start = jnp.asarray(past.tokens), jnp.asarray(past.start)
        cache = _grown(past.cache, cache, start)
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    real = positions < lengths[:, None]
    both_ways = {"prefix_mask": real} if lm.config.mask == "prefix" else {}
    out = lm.apply(params, tokens, positions=positions, segment_ids=real.astype(jnp.int32), cache=cache, **both_ways)
    return jnp.take_along_axis(out.hidden, (lengths - start - 1)[:, None, None], axis=1)[:, 0], lay_out(out.cache)


def _grown(old: Any, empty: Any, start: Int[Array, " B"]) -> Any:
    """`old` with as many slots as `empty` has, and without what lies at `start` or later. No ring of `old` may have gone round."""

    def pad(leaf: Array, like: Array) -> Array:
        if leaf.ndim == 2:  # positions [B S]
            leaf = jnp.where(leaf < start[:, None], leaf, -1)
        return jnp.pad(
            leaf, [(0, new - had) for had, new in zip(leaf.shape, like.shape, strict=True)], constant_values=-1 if leaf.ndim == 2 else 0
        )

    leaves = [pad(leaf, like) for leaf, like in zip(jax.tree.leaves(old), jax.tree.leaves(empty), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(old), leaves)


def lay_out(cache: Any) -> Any:
    """The cache over the mesh: rows over the data axes, heads over `model`."""
    return jax.tree.map(lambda leaf: constrain(leaf, "L B K S ." if leaf.ndim == 5 else "B S"), cache)


def take_rows(cache: Any, rows: Int[Array, " B"]) -> Any:
    """The cache with row b a copy of its row rows[b]."""
    return lay_out(jax.tree.map(lambda leaf: leaf[:, rows] if leaf.ndim == 5 else leaf[rows], cache))  # [L B K S H], positions [B S]


def bucket(length: int, limit: int | None = None) -> int:
    """The next of 16, 32, 48, 64, 96, 128, 192, 256, 384, …: two lengths for each doubling, so that few are ever compiled.

    >>> [bucket(n) for n in (3, 17, 65, 100, 129, 1025)]
    [16, 32, 96, 128, 192, 1536]
    >>> bucket(100, limit=120)
    120
    """
    grain = max(16, 1 << max((length - 1).bit_length() - 2, 0))
    rounded = -(-length // grain) * grain
    return rounded if limit is None else max(min(rounded, limit), length)


# ----------------------------------------------------------------------------------------------- running


def check_lengths(lm: LM, lengths: Sequence[int], num_tokens: Sequence[int], max_length: int | None) -> int:
    """Tokens of the longest row with its continuation.

    Raises:
      ConfigError: an empty prompt, or a row longer than the context (says by how much).
    """
    context = min(max_length or lm.config.max_length, lm.config.max_length) if lm.config.position == "learned" else max_length
    for row, (length, new) in enumerate(zip(lengths, num_tokens, strict=True)):
        if length < 1:
            raise ConfigError(f"prompt {row} is empty; give at least one token, e.g. the end-of-text token")
        if context is not None and length >= context:
            raise ConfigError(
                f"prompt {row} has {length} tokens, and a context of {context} leaves at most {context - 1} for it: "
                f"{length - context + 1} too many; shorten it"
            )
        if context is not None and length + new > context:
            raise ConfigError(
                f"prompt {row} has {length} tokens and {new} new ones are asked for: {length + new - context} too many for a context of "
                f"{context}; shorten the prompt, or ask for at most {context - length}"
            )
    return max(length + new for length, new in zip(lengths, num_tokens, strict=True))


def row_keys(prompts: Sequence[Sequence[int]], num_samples: int, seed: int) -> np.ndarray:
    """A key for each row, made of the seed, its prompt and its number among the prompt's samples: of nothing beside it."""
    hashes = np.array([zlib.crc32(np.asarray(prompt, np.int32).tobytes()) for prompt in prompts for _ in range(num_samples)], np.uint32)
    sample = np.tile(np.arange(num_samples, dtype=np.uint32), len(prompts))
    fold = jax.vmap(lambda key, a, b: jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, a), b)), (None, 0, 0))
    return np.asarray(fold(jax.random.key(seed), hashes, sample))  # of the host: every process of a mesh has the same


def pad_prompts(prompts: Sequence[Sequence[int]], limit: int) -> tuple[Int[np.ndarray, "P T"], Int[np.ndarray, " P"]]:
    """Prompts as rows of one length, a bucket, with zeros behind; and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(int(lengths.max()), limit)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


class Memory:
    """The cache of one row between calls of `stream`: a chat's next turn reads only what is new."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        """Tokens that the cache holds."""
        self.cache: Any = None

    @property
    def num_slots(self) -> int:
        """Of the cache; 0 before it is filled."""
        return 0 if self.cache is None else max(positions.shape[1] for positions in self.cache.positions)

    def recall(self, lm: LM, prompt: Sequence[int], num_slots: int) -> Past | None:
        """The prompt's beginning out of the cache, as far as they agree; None where that is nothing or the cache cannot go back to it."""
        pairs = enumerate(zip(self.ids, prompt[:-1], strict=False))  # the last token is always read: its logits are wanted
        same = next((index for index, (had, now) in pairs if had != now), min(len(self.ids), len(prompt) - 1))
        rings = [kind.window for kind in lm.config.layer_pattern if kind.window]
        lost = same < len(self.ids) and any(len(self.ids) > ring for ring in rings)  # a ring that went round has overwritten the older
        if not same or lost or lm.config.mask == "prefix":
            return None
        tokens, _ = pad_prompts([prompt[same:]], num_slots - same)
        return Past(tokens, np.array([same], np.int32), self.cache)


def stream(
    generate: Generator,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int | Sequence[int],
    num_samples: int = 1,
    seed: int = 0,
    max_length: int | None = None,
    frozen: Any = None,
    memory: Memory | None = None,
) -> abc.Generator[Step, None, None]:
    """The next token of every row, as many times as the row that may have the most; rows are prompt 0's samples, prompt 1's, …

    Args:
      num_tokens: new tokens of each prompt, or of all; what a row yields after its own is meaningless.
      max_length: the context, prompt and continuation; None means any, but for learned positions.
      frozen: what the processors need besides (other models' params).
      memory: of one row: what it holds of the prompt is not computed again, and it holds prompt and continuation afterwards.

    Raises:
      ConfigError: an empty prompt, or a row longer than the context (says by how much).
    """
    if not prompts:
        return
    assert memory is None or (len(prompts) == 1 and num_samples == 1), "a memory is of one row"
    each = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else list(num_tokens)
    lm = generate.lm
    needed = check_lengths(lm, [len(prompt) for prompt in prompts], each, max_length)
    limit = lm.config.max_length if lm.config.position == "learned" else max_length
    tokens, lengths = pad_prompts(prompts, limit or bucket(needed))
    slots, keys = bucket(max(needed, tokens.shape[1]), limit), row_keys(prompts, num_samples, seed)
    past = None
    if memory is not None:
        slots = max(slots, memory.num_slots)
        past = memory.recall(lm, prompts[0], slots)
    new, carry = generate.prefill(params, frozen, tokens, lengths, keys, slots, num_samples, past)
    held = list(prompts[0])
    try:
        for step in range(max(each)):
            ready = new
            if step + 1 < max(each):  # dispatched before this step is read: the device does not wait for the host
                new, carry = generate.decode(params, frozen, new.tokens, keys, carry)
                held.append(int(ready.tokens[0]))
            yield Step(np.asarray(ready.tokens), np.asarray(ready.logps))
    finally:
        if memory is not None:
            memory.ids, memory.cache = held, carry.cache


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt."""

    prompt: int
    """Index of the prompt."""
    sample: int
    """Number among the prompt's samples."""
    ids: list[int] = field(default_factory=list)
    """Without the stop token."""
    logps: list[float] = field(default_factory=list)
    """Log-probability of each id under the model itself, before any processor."""
    finish: str = "length"
    """'stop' (a stop token, or what `watch` said) or 'length'."""


def completions(
    generate: Generator,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int | Sequence[int],
    stop_ids: Sequence[int] = (),
    num_samples: int = 1,
    seed: int = 0,
    max_length: int | None = None,
    frozen: Any = None,
    memory: Memory | None = None,
    watch: Callable[[int, int], bool] = lambda row, token: False,
) -> list[Completion]:
    """Every sample of every prompt, prompt by prompt.

    Args:
      watch: told (row, token) for each new token but stop tokens; True ends the row after this token. Stop strings and streaming
        to a terminal hang here. Row = prompt index · num_samples + sample.
    """
    each = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else list(num_tokens)
    done = [Completion(prompt, sample) for prompt in range(len(prompts)) for sample in range(num_samples)]
    open_rows = {row for row, one in enumerate(done) if each[one.prompt] > 0}
    steps = stream(
        generate, params, prompts, num_tokens=each, num_samples=num_samples, seed=seed, max_length=max_length, frozen=frozen, memory=memory
    )  # fmt: skip
    for new in steps:
        for row in sorted(open_rows):
            one, token = done[row], int(new.tokens[row])
            stopped = token in stop_ids
            if not stopped:
                one.ids.append(token)
                one.logps.append(float(new.logps[row]))
                stopped = watch(row, token)
            if stopped:
                done[row] = replace(one, finish="stop")
            if stopped or len(one.ids) >= each[one.prompt]:
                open_rows.remove(row)
        if not open_rows:
            steps.close()  # now, not when it is collected: a memory is filled as the stream ends
    return done


def complete(
    generate: Generator, params: Params, prompts: Sequence[Sequence[int]], *, num_tokens: int, stop_ids: Sequence[int] = (), seed: int = 0
) -> list[list[int]]:
    """The continuation of each prompt, without the stop token that ended it."""
    return [one.ids for one in completions(generate, params, prompts, num_tokens=num_tokens, stop_ids=stop_ids, seed=seed)]
