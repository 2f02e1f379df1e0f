"""Proxy-tuning: a large model steered by what tuning changed in a small one, at decoding time and by logits alone.

    p = softmax(s_M + α (s_M⁺ − s_M⁻))  ∝  p_M · (p_M⁺ / p_M⁻)^α

M is the base, M⁺ the expert (small, tuned), M⁻ the anti-expert (the same, untuned): three models of one vocabulary, none of them changed.
`combine` is the formula. Two ways lead to it:

    proxy_lm(base, expert, anti)        an LM of three LMs: it scores, writes, searches and teaches like any other
    proxy_processor(expert, anti)       a `Processor` before the others, for a base that somebody else runs

Both may give each small model a prompt of its own (`own_prompts`), as a chat-tuned expert needs; continuations are the same for all.
Several pairs: proxy_lm(proxy_lm(M, A⁺, A⁻), B⁺, B⁻), or two processors; differences add up. Contrastive decoding and DExperts
(arXiv:2105.03023) are other models in the three places. The difference is one of log-probabilities: the same where all three know every
token, and a meaning for tokens that some do not (`pull`).

Source: arXiv:2401.08565, section 2; the plausibility mask is that of contrastive decoding, arXiv:2210.15097, section 3.3.
Letters: B rows, P prompts, T prompt length, V vocabulary, D model width, C choices of the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.config import ConfigError, LayerKind, ModelConfig
from jaxllm.contract import LM, Dot, Out, Params, Unembedding
from jaxllm.models.generate import Generator, bucket, pad_prompts, read_prompts, take_rows
from jaxllm.models.logits import Processor
from jaxllm.sharding import constrain

type Alpha = float | Array
"""How far to steer: a number, or an array that broadcasts against logits (per row, per token)."""
type Tail = Literal["refuse", "ignore"]
"""Of two tables of different length: no, or take what they have in common; who lacks a token has nothing to say of it."""
type Missing = Literal["drop", "floor"]
"""A token outside the top k that an interface returned: it has no probability, or the k-th one's."""

# ------------------------------------------------------------------------------------------------ the formula


def combine(
    base: Float[Array, "*B V"], expert: Float[Array, "*B V"], anti: Float[Array, "*B V"], alpha: Alpha = 1.0, *, plausible: float = 0.0
) -> Float[Array, "*B V"]:
    """base + alpha · (expert − anti) in float32, up to a constant of each row; logits or log-probabilities.

    Args:
      plausible: keep tokens with at least this share of the base's best probability; 0 keeps all. For alpha > 1, where a small
        denominator raises what the base never says.

    >>> combine(jnp.array([2.0, 1, 0]), jnp.array([0.0, 3, 0]), jnp.array([1.0, 1, 0])).argmax().item()
    1
    """
    return steer(base, [(pull(expert, anti), alpha)], plausible=plausible)


def pull(expert: Float[Array, "*B V"], anti: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """log p⁺ − log p⁻: −∞ where the expert alone forbids a token, +∞ where the anti-expert alone does, 0 where both do."""
    expert, anti = _log_probs(expert), _log_probs(anti)
    neither = jnp.isneginf(expert) & jnp.isneginf(anti)
    return jnp.where(neither, 0.0, expert - jnp.where(neither, 0.0, anti))


def steer(
    base: Float[Array, "*B V"], pulls: Sequence[tuple[Float[Array, "*B V"], Alpha]], *, plausible: float = 0.0
) -> Float[Array, "*B V"]:
    """base + Σ alpha · pull. −∞ of the base stays, alpha · pull = −∞ forbids, and +∞, a quotient by nothing, says nothing."""
    base = base.astype(jnp.float32)
    out = base
    for one, alpha in pulls:
        endless = jnp.isinf(one)
        out = out + alpha * jnp.where(endless, 0.0, one)
        out = jnp.where(endless & (alpha * jnp.sign(one) < 0), -jnp.inf, out)
    if plausible:
        out = jnp.where(base < base.max(-1, keepdims=True) + math.log(plausible), -jnp.inf, out)
    return out


def _log_probs(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """log softmax; a row that is −∞ throughout stays so."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, -1, keepdims=True)
    return logits - jnp.where(jnp.isneginf(log_z), 0.0, log_z)


def check_steering(alpha: Any, plausible: float) -> None:
    """Raise ConfigError for an alpha that is not finite or a share that is none."""
    if isinstance(alpha, int | float) and not math.isfinite(alpha):
        raise ConfigError(f"alpha is {alpha}; it must be finite: 0 is the base model, 1 the paper's choice")
    if not 0 <= plausible <= 1:
        raise ConfigError(f"plausible is {plausible}; it is a share of the base's best probability, from 0 (no mask) to 1")


# ------------------------------------------------------------------------------- a base that is known by its top k


def from_top_k(ids: Int[Array, "*B C"], logps: Float[Array, "*B C"], num_vocab: int, missing: Missing = "drop") -> Float[Array, "*B V"]:
    """Log-probabilities over the vocabulary of a base that tells its C best only: `combine`'s first argument.

    >>> from_top_k(jnp.array([2, 0]), jnp.array([-0.5, -1.5]), 4, "floor").tolist()
    [-1.5, -1.5, -0.5, -1.5]
    """
    floor = logps.min(-1, keepdims=True) if missing == "floor" else jnp.full((*logps.shape[:-1], 1), -jnp.inf)
    rest = jnp.broadcast_to(floor, (*logps.shape[:-1], num_vocab)).astype(jnp.float32)
    return jnp.put_along_axis(rest, ids, logps.astype(jnp.float32), axis=-1, inplace=False)


# ------------------------------------------------------------------------------------------- prompts of their own


@partial(jax.tree_util.register_dataclass, data_fields=["tokens", "lengths"], meta_fields=["num_extra"])
@dataclass(frozen=True)
class Prompts:
    """What one small model reads in place of the base's prompts, right-padded."""

    tokens: Int[Array | np.ndarray, "P T"]
    lengths: Int[Array | np.ndarray, " P"]
    num_extra: int
    """Slots that its cache needs beyond the base's."""


def own_prompts(prompts: Sequence[Sequence[int]], of_base: Sequence[Sequence[int]], max_length: int | None = None) -> Prompts:
    """One prompt for each of the base's. Padding and cache slots come in few sizes (`bucket`), so that few are ever compiled.

    Args:
      max_length: of a row; the limit of learned positions.

    Raises:
      ConfigError: an empty prompt, or not one for each.
    """
    if len(prompts) != len(of_base) or not all(prompts):
        raise ConfigError(f"{len(prompts)} prompts for {len(of_base)} of the base; give one with a token at least for each")
    tokens, lengths = pad_prompts(prompts, max_length or bucket(max(map(len, prompts))))
    longer = max(len(own) - len(base) for own, base in zip(prompts, of_base, strict=True))
    return Prompts(tokens, lengths, bucket(longer) if longer > 0 else 0)


def with_prompts(generate: Generator, prompts: Mapping[tuple[int, ...], Sequence[int]], max_length: int | None = None) -> Generator:
    """`generate`, made of a `proxy_lm`, whose expert reads prompts[row] where the base reads `row`.

    For callers that know nothing of proxies; others put `own_prompts` into params['prompts'] themselves. Beam search does not come by here.
    """

    def prefill(params: Params, frozen: Any, tokens: np.ndarray, lengths: np.ndarray, *rest: Any) -> Any:
        rows = [tuple(row[:length].tolist()) for row, length in zip(np.asarray(tokens), np.asarray(lengths), strict=True)]
        own = {"expert": own_prompts([prompts[row] for row in rows], rows, max_length)}
        return generate.prefill({**params, "prompts": own}, frozen, tokens, lengths, *rest)

    return replace(generate, prefill=prefill)


# ------------------------------------------------------------------------------------------------ LM, LM, LM -> LM


class Trio(NamedTuple):
    """What makes a proxy: the arguments of `proxy_lm`."""

    base: LM
    expert: LM
    anti: LM
    alpha: float = 1.0
    plausible: float = 0.0
    vocab_tail: Tail = "refuse"

    @property
    def small(self) -> dict[str, LM]:
        """Those that steer."""
        return {"expert": self.expert, "anti": self.anti}

    @property
    def models(self) -> dict[str, LM]:
        """All three."""
        return {"base": self.base, **self.small}


@partial(jax.tree_util.register_dataclass, data_fields=["parts", "shifts"], meta_fields=["num_slots"])
@dataclass(frozen=True)
class Caches:
    """A cache of three: base, expert, anti-expert."""

    parts: tuple[Any, Any, Any]
    shifts: tuple[Int[Array, "B 1"], Int[Array, "B 1"]]
    """How much further expert and anti-expert are than the base: tokens that only their prompts have."""
    num_slots: int

    @property
    def positions(self) -> tuple[Int[Array, "B _"], ...]:
        """Position held by each slot, of all caches."""
        return tuple(positions for part in self.parts for positions in part.positions)


def proxy_lm(base: LM, expert: LM, anti: LM, alpha: float = 1.0, plausible: float = 0.0, vocab_tail: Tail = "refuse") -> LM:
    """The LM whose next-token distribution is softmax(base + alpha · (expert − anti)).

    Params are {'base': …, 'expert': …, 'anti': …}; hidden states lie side by side, [B T D + D⁺ + D⁻], and the unembedding applies
    three heads, each with its own scale and cap, before it combines. With a cache, params['prompts'] may hold {'expert': Prompts}
    (or 'anti'): the first call reads those instead, one for each row, and only its last hidden state then means anything.

    Raises:
      ConfigError: vocabularies of different size, unless vocab_tail is 'ignore'; masks of different kinds; alpha is not finite.
    """
    check_steering(alpha, plausible)
    trio = Trio(base, expert, anti, alpha, plausible, vocab_tail)
    config, dot = joint_config(trio), _three_heads(trio)

    def init(key: Array) -> Params:
        keys = jax.random.split(key, 3)
        return {name: lm.init(own) for own, (name, lm) in zip(keys, trio.models.items(), strict=True)}

    def init_cache(batch_size: int, max_length: int) -> Caches:
        here = jnp.zeros((batch_size, 1), jnp.int32)
        parts = (lm.init_cache(batch_size, max_length) for lm in trio.models.values())
        return Caches(tuple(parts), (here, here), max_length)  # type: ignore[arg-type]

    def unembed(params: Params) -> Unembedding:
        heads = {name: lm.unembed(params[name]) for name, lm in trio.models.items()}
        rest = {name: leaf for name, leaf in heads["base"].leaves.items() if name != "kernel"}
        leaves = {**heads, "base": replace(heads["base"], leaves=rest), "kernel": heads["base"].leaves["kernel"]}
        return Unembedding(leaves, num_vocab=config.vocab_size, dot=dot)

    return LM(config, init, partial(_apply, trio), unembed, init_cache, any(lm.has_dropout for lm in trio.models.values()))


def _apply(
    trio: Trio,
    params: Params,
    inputs: Array,
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: Caches | None = None,
    taps: Sequence[str] = (),
    **options: Any,
) -> Out:
    """`LM.apply` of a proxy; taps are the base's."""
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise ConfigError("a proxy of three models reads token ids; embeddings of one model are none of another")
    rows = {"segment_ids": segment_ids, **options}
    first = trio.base.apply(params["base"], inputs, positions=positions, cache=cache and cache.parts[0], taps=taps, **rows)
    hidden, parts, shifts = [first.hidden], [first.cache], []
    own = params.get("prompts", {}) if cache is not None and cache.parts[0].empty else {}
    for i, (name, lm) in enumerate(trio.small.items()):
        if cache is None:
            out = lm.apply(params[name], inputs, positions=positions, **rows)
        elif name in own:
            out, shift = _read_own(lm, params[name], own[name], inputs, segment_ids, cache.num_slots)
            shifts.append(shift)
        else:
            assert positions is not None, "apply: a cache needs positions"
            shifts.append(cache.shifts[i])
            out = lm.apply(params[name], inputs, positions=positions + cache.shifts[i], cache=cache.parts[1 + i], **rows)
        hidden.append(out.hidden)
        parts.append(out.cache)
    joined = jnp.concatenate([constrain(one, "B T .") for one in hidden], -1)
    return Out(joined, first.taps, cache and Caches(tuple(parts), tuple(shifts), cache.num_slots))  # type: ignore[arg-type]


def _three_heads(trio: Trio) -> Dot:
    """The heads' logits combined, in the width of the base's table."""
    ends = np.cumsum([lm.config.width for lm in trio.models.values()])[:-1].tolist()

    def dot(name: str, spec: str, x: Array, leaves: Params) -> Array:
        own = leaves["base"]
        heads = (replace(own, leaves={**own.leaves, "kernel": leaves["kernel"]}), leaves["expert"], leaves["anti"])
        base, *others = (head.logits(part) for head, part in zip(heads, jnp.split(x, ends, -1), strict=True))
        away = pull(*(_fit(one, own.num_vocab, -jnp.inf) for one in others))
        return steer(base, [(_fit(away, base.shape[-1], 0.0), trio.alpha)], plausible=trio.plausible)

    return dot


def _read_own(
    lm: LM, params: Params, own: Prompts, inputs: Int[Array, "P T"], segment_ids: Int[Array, "P T"] | None, num_slots: int
) -> tuple[Out, Int[Array, "P 1"]]:
    """(the state after its own prompt at every position, and the cache; how much longer that prompt is)."""
    if len(own.tokens) != len(inputs):
        raise ConfigError(f"{len(own.tokens)} prompts of its own for a batch of {len(inputs)}; give one for each of the base's")
    tokens, lengths = jnp.asarray(own.tokens), jnp.asarray(own.lengths)
    last, cache = read_prompts(lm, params, tokens, lengths, max(num_slots + own.num_extra, tokens.shape[1]))
    read = jnp.full(len(inputs), inputs.shape[1]) if segment_ids is None else jnp.sum(segment_ids > 0, 1)
    hidden = jnp.broadcast_to(last[:, None], (*inputs.shape, last.shape[-1]))
    return Out(hidden, {}, cache), (lengths - read).astype(jnp.int32)[:, None]


def _fit(x: Float[Array, "*B V"], size: int, fill: float) -> Array:
    """`x` cut or filled up to `size` tokens."""
    x = x[..., :size]
    short = size - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)], constant_values=fill) if short else x


def joint_config(trio: Trio) -> ModelConfig:
    """What the three are together, for those who ask an LM's config how it may be used.

    The width is the sum, the context the shortest; windows are everybody's, and so is ALiBi: where one needs it, all are treated so.

    Raises:
      ConfigError: they do not go together.
    """
    own, configs = trio.base.config, {name: lm.config for name, lm in trio.small.items()}
    for name, config in configs.items():
        check_vocab_size(name, config.vocab_size, own.vocab_size, trio.vocab_tail)
        if config.mask != own.mask:
            raise ConfigError(f"the base's mask is '{own.mask}' and the {name}'s '{config.mask}'; all three must read alike")
    everyone = [own, *configs.values()]
    kinds = {config.position for config in everyone}
    if {"alibi", "learned"} <= kinds:
        raise ConfigError("one model has learned positions and another ALiBi; no rule for rows serves both: take models of one kind")
    position = next((kind for kind in ("alibi", "learned") if kind in kinds), own.position)
    windows = {kind.window for config in configs.values() for kind in config.layer_pattern} - {kind.window for kind in own.layer_pattern}
    pattern = (*own.layer_pattern, *(LayerKind(window=window) for window in sorted(windows - {None})))  # type: ignore[type-var]
    return replace(
        own, width=sum(config.width for config in everyone), max_length=min(config.max_length for config in everyone),
        position=position, layer_pattern=pattern,
    )  # fmt: skip


def check_vocab_size(name: str, size: int, of_base: int, tail: Tail) -> None:
    """Raise ConfigError for tables of different length, unless their tails are to be ignored."""
    if size != of_base and tail != "ignore":
        raise ConfigError(
            f"the {name} has {size} vocabulary entries and the base {of_base}; proxy-tuning adds logits token by token. If they agree up "
            "to padding or unused tokens at the end, say so: vocab_tail 'ignore' (--vocab_tail ignore)"
        )


# -------------------------------------------------------------------------------------------------- as a processor


class _Small(NamedTuple):
    """What the processor keeps after `step` tokens, for the next one: of expert and anti-expert, where two."""

    pull: Float[Array, "B V"]
    step: Int[Array, ""]
    positions: tuple[Int[Array, " B"], Int[Array, " B"]]
    caches: tuple[Any, Any]


def proxy_processor(
    expert: LM, anti: LM, alpha: float | Callable[[Int[Array, ""]], Array] = 1.0, plausible: float = 0.0, vocab_tail: Tail = "refuse"
) -> Processor:
    """base logits -> log softmax(base + alpha · (expert − anti)), each model with its cache.

    `frozen` is {'expert': params, 'anti': params}, and may hold 'prompts': {'expert': Prompts, …}, one for each prompt of the base; rows
    are their samples or beams. Put it first (`sampler(constraints=[this, …])`): temperature and top-p then see the proxy. The
    log-probabilities that a generator reports are still the base's; those of `proxy_lm` are the proxy's.

    Args:
      alpha: a number, or a function of the number of tokens written so far: a schedule.
    """
    check_steering(alpha, plausible)
    models = {"expert": expert, "anti": anti}

    def pull_of(frozen: Any, hidden: Sequence[Array], num_vocab: int) -> Float[Array, "B V"]:
        logits = (lm.unembed(frozen[name]).logits(h) for (name, lm), h in zip(models.items(), hidden, strict=True))
        return pull(*(_fit(one, num_vocab, -jnp.inf) for one in logits))

    def init(frozen: Any, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], num_vocab: int, max_length: int) -> _Small:
        for name, lm in models.items():
            check_vocab_size(name, lm.config.vocab_size, num_vocab, vocab_tail)
        hidden, positions, caches = [], [], []
        for name, lm in models.items():
            own = frozen.get("prompts", {}).get(name) or Prompts(tokens, lengths, 0)
            if len(tokens) % len(own.tokens):
                raise ConfigError(f"{len(own.tokens)} prompts of the {name}'s own for {len(tokens)} rows; give one for each prompt")
            theirs, ends = jnp.asarray(own.tokens), jnp.asarray(own.lengths)
            last, cache = read_prompts(lm, frozen[name], theirs, ends, max(max_length + own.num_extra, theirs.shape[1]))
            rows = jnp.repeat(jnp.arange(len(theirs)), len(tokens) // len(theirs))
            hidden.append(last[rows])
            positions.append(ends[rows])
            caches.append(take_rows(cache, rows) if len(rows) > len(theirs) else cache)
        away = pull_of(frozen, hidden, num_vocab)
        return _Small(away, jnp.int32(0), (positions[0], positions[1]), (caches[0], caches[1]))

    def apply(frozen: Any, state: _Small, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        how_far = alpha(state.step) if callable(alpha) else alpha
        return _log_probs(steer(logits, [(_fit(state.pull, logits.shape[-1], 0.0), how_far)], plausible=plausible))

    def update(frozen: Any, state: _Small, tokens: Int[Array, " B"]) -> _Small:
        hidden, caches = [], []
        for (name, lm), positions, cache in zip(models.items(), state.positions, state.caches, strict=True):
            out = lm.apply(frozen[name], tokens[:, None], positions=positions[:, None], cache=cache)
            hidden.append(out.hidden[:, 0])
            caches.append(out.cache)
        away = pull_of(frozen, hidden, state.pull.shape[-1])
        return _Small(away, state.step + 1, (state.positions[0] + 1, state.positions[1] + 1), (caches[0], caches[1]))

    def take(state: _Small, rows: Int[Array, " B"]) -> _Small:
        first, second = (take_rows(cache, rows) for cache in state.caches)
        return _Small(state.pull[rows], state.step, (state.positions[0][rows], state.positions[1][rows]), (first, second))

    return Processor(init, apply, update, take)
