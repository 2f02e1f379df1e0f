"""What data, models, losses and the step agree on; none of them imports another.

`Batch` is what the data gives, `Out` and `Unembedding` what a model gives, `Obs` what a loss sees,
`Mean` what a loss reports. Dimension letters are those of `models/transformer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.config import ModelConfig

type Params = dict[str, Any]
type Dot = Callable[[str, str, Array, Params], Array]
"""`dot(name, spec, x, leaves)`: the einsum `spec` of `x` with `leaves['kernel']`, in float32. Every projection goes through one."""

STUDENT = "student"
"""Name, in `Obs`, of the model that is being trained."""


@partial(jax.tree_util.register_dataclass, meta_fields=[], data_fields=[
    "tokens", "labels", "loss_mask", "segment_ids", "positions", "prefix_mask", "source", "group", "extras"])  # fmt: skip
@dataclass(frozen=True)
class Batch:
    """Rows of tokens. Position t of a row predicts `labels[t]`, which is already shifted."""

    tokens: Int[Array, "B T"]
    labels: Int[Array, "B T"]
    loss_mask: Float[Array, "B T"]
    """Weight of each prediction: 0 on padding, prompts, and the last token of each document."""
    segment_ids: Int[Array, "B T"]
    """Document number within the row, from 1; 0 is padding. Tokens attend within their document only."""
    positions: Int[Array, "B T"]
    """Position within the document."""
    prefix_mask: Bool[Array, "B T"] | None = None
    """Prefix-LM: these positions see each other both ways."""
    source: Int[Array, " B"] | None = None
    """Index of the row's source, for `partition`."""
    group: Int[Array, " B"] | None = None
    """Rows with one number must stay in one micro-batch and shard (a prompt's candidate answers)."""
    extras: dict[str, Array] = field(default_factory=dict)
    """Whatever one loss needs: leading dimension B."""

    def replace(self, **changes: Any) -> Batch:
        """A copy with some fields changed."""
        return replace(self, **changes)


class LM(NamedTuple):
    """A language model: pure functions over a plain nested dict. Built by `models/transformer.py`, wrapped by adapters and heads.

    init(key) -> params                                        vocabulary leaves at their logical size
    apply(params, tokens or embeddings, *, positions, segment_ids, prefix_mask, key, taps, …) -> Out
    unembed(params) -> Unembedding
    init_cache(batch_size, max_length) -> an empty cache for `apply(…, cache=…)`
    """

    config: ModelConfig
    init: Callable[[Array], Params]
    apply: Callable[..., Out]
    unembed: Callable[[Params], Unembedding]
    init_cache: Callable[[int, int], Any]
    has_dropout: bool = False
    """Whether `apply` draws random numbers when it is given a key."""

    @property
    def param_shapes(self) -> Params:
        """Shapes and types of what `init` makes, traced once for each `init`."""
        return jax.tree.map(lambda leaf: leaf, _shapes_of(self.init))

    def __call__(self, params: Params, batch: Batch, **options: Any) -> Out:
        """`apply` on the rows of a batch."""
        return self.apply(
            params,
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            prefix_mask=batch.prefix_mask,
            **options,
        )


@lru_cache(maxsize=32)
def _shapes_of(init: Callable[[Array], Params]) -> Params:
    return jax.eval_shape(lambda: init(jax.random.key(0)))  # a key made outside would be compiled


class Out(NamedTuple):
    """What `LM.apply` returns."""

    hidden: Float[Array, "B T D"]
    """After the final norm, ready for the unembedding."""
    taps: dict[str, Array]
    """Intermediates that were asked for by name, stacked over layers: `[L B T …]`."""
    cache: Any = None


@cache
def dot_in(dtype: str) -> Dot:
    """The default `dot`: both operands cast to `dtype`, float32 accumulation and result; the caller casts back.

    The backward pass is written out as two einsums of the same kind: cotangents are cast too, and the kernel's gradient
    leaves its accumulator in float32. JAX's own transposition would multiply float32 by bf16 and round that gradient to
    bf16, and on XLA:CPU keeps some products out of the matmul library. Reverse mode only, like every `custom_vjp`.

    Cached, so that two models of one precision share one function and a jitted step does not recompile.
    """
    return lambda name, spec, x, leaves: _einsum(dtype, _explicit(spec, x.ndim), x, leaves["kernel"])


def _explicit(spec: str, num_dims: int) -> str:
    """An einsum without '...': the dimensions it stands for get letters of their own.

    >>> _explicit('...D,VD->...V', 3)
    'abD,VD->abV'
    """
    missing = num_dims - len(spec.split(",")[0].replace("...", ""))
    return spec.replace("...", "abcdefgh"[:missing])


def _products(dtype: str) -> Callable[[str, Array, Array], Array]:
    # A TPU multiplies float32 operands in one bf16 pass, and a GPU in TF32, unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    return lambda spec, a, b: jnp.einsum(spec, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(dtype: str, spec: str, x: Array, kernel: Array) -> Array:
    return _products(dtype)(spec, x, kernel)


def _einsum_forward(dtype: str, spec: str, x: Array, kernel: Array) -> tuple[Array, Any]:
    # Not a call of `_einsum`: a remat policy that keeps products must see a dot here, not a custom_vjp.
    return _products(dtype)(spec, x, kernel), (x.astype(dtype), kernel, jnp.zeros((0,), x.dtype))


def _einsum_backward(dtype: str, spec: str, saved: Any, g: Array) -> tuple[Array, Array]:
    (x, kernel, like), product = saved, _products(dtype)
    operands, out = spec.split("->")
    a, b = operands.split(",")
    return product(f"{out},{b}->{a}", g, kernel).astype(like.dtype), product(f"{a},{out}->{b}", x, g).astype(kernel.dtype)


_einsum.defvjp(_einsum_forward, _einsum_backward)

FLOAT32 = dot_in("float32")


@partial(jax.tree_util.register_dataclass, data_fields=["leaves"], meta_fields=["scale", "soft_cap", "num_vocab", "dot"])
@dataclass(frozen=True)
class Unembedding:
    """The output head: hidden states to logits. Only `losses/vocab.py` and `generate` apply it."""

    leaves: Params
    """`kernel` [V D], V padded to the mesh, and whatever the head's `dot` needs besides."""
    scale: float = 1.0
    soft_cap: float | None = None
    num_vocab: int = 0
    """Logical vocabulary: logits from here on are -inf."""
    dot: Dot = FLOAT32

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 logits; padded vocabulary entries are -inf.

        logits = cap(scale · hidden · kernelᵀ), cap(x) = soft_cap · tanh(x / soft_cap)
        """
        out = self.dot("unembed", "...D,VD->...V", hidden, self.leaves) * self.scale
        if self.soft_cap is not None:
            out = self.soft_cap * jnp.tanh(out / self.soft_cap)
        padded = out.shape[-1]
        if padded != self.num_vocab:
            out = jnp.where(jnp.arange(padded) < self.num_vocab, out, -jnp.inf)
        return out


@partial(jax.tree_util.register_dataclass, meta_fields=[], data_fields=["batch", "step", "hidden", "unembeddings", "taps", "scores"])
@dataclass(frozen=True)
class Obs:
    """Everything a loss may look at: the only contract between models and losses.

    hidden[name]        [B T D]  final hidden states of the student and of each annotating model
    unembeddings[name]  the matching `Unembedding`
    taps[name][tap]     intermediates, [L B T …]
    scores[name]        [B] or [B T] numbers from heads and annotators (rewards, values, advantages)
    """

    batch: Batch
    step: Int[Array, ""]
    hidden: dict[str, Array] = field(default_factory=dict)
    unembeddings: dict[str, Unembedding] = field(default_factory=dict)
    taps: dict[str, dict[str, Array]] = field(default_factory=dict)
    scores: dict[str, Array] = field(default_factory=dict)

    def replace(self, **changes: Any) -> Obs:
        """A copy with some fields changed."""
        return replace(self, **changes)


class Mean(NamedTuple):
    """A weighted mean kept as its two sums, because a mean of means is wrong under packing, masks and accumulation."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @property
    def value(self) -> Float[Array, ""]:
        """total / weight, and 0 where nothing was weighed."""
        return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1.0), 0.0)

    def __add__(self, other: Mean) -> Mean:  # type: ignore[override]
        return Mean(self.total + other.total, self.weight + other.weight)
