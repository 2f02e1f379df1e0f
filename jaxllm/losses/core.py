"""A loss is a value that composes: the mirror of optax's `GradientTransformation`.

A leaf reports a sum and a weight, never a mean. `weigh` gives the weights of the whole step before
the first forward pass, `update` divides by them, so the scalars and gradients of micro-batches and
hosts simply add up. What a paper trains on is one expression:

    minitron = over_vocab(kl=(1.0, forward_kl('teacher')))
    instruct = partition('source', ppo=total(pg=over_vocab(...), value=...), ptx=scale(27.8, over_vocab(ce=(1.0, next_token()))))

Names of leaves, weights and metrics are the keywords on the way down, joined by '/': `ppo/pg`. A loss of
one term calls it `loss`, and the keyword around it takes that place: `total(rank=pairwise_ranking())`
reports `rank` (and `rank/accuracy`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.config import ConfigError, nearest
from jaxllm.contract import Batch, Mean, Obs, Params
from jaxllm.losses.annotate import Annotator, chain

type Scalar = Float[Array, ""]
type State = Any
"""Any pytree of arrays; () for a loss without memory."""
type Weights = dict[str, Scalar]
type Means = dict[str, Mean]
type Coefficient = float | Callable[[Any], Any]
"""A number, or an optax schedule of `Obs.step`."""

LEAF = "loss"


class LossTransform(NamedTuple):
    """Four pure functions. The loss never owns trainable parameters: those are in the model's tree."""

    init: Callable[[Params], State]
    """State from params: adaptive coefficients, running averages."""
    weigh: Callable[[Batch], Weights]
    """Each leaf's denominator, from masks only. Sum it over all micro-batches and hosts of a step."""
    update: Callable[[Obs, State, Weights], tuple[Scalar, Means]]
    """Sum over leaves of coefficient * total / weight, and the Means themselves, without coefficients."""
    finish: Callable[[State, Means], State]
    """The next state, once per optimizer step, from the whole step's Means."""


def stateless(weigh: Callable[[Batch], Weights], update: Callable[[Obs, Weights], tuple[Scalar, Means]]) -> LossTransform:
    """A loss without memory."""
    return LossTransform(
        init=lambda params: (),
        weigh=weigh,
        update=lambda obs, state, weights: update(obs, weights),
        finish=lambda state, means: state,
    )


def mean_of(leaf: Callable[[Obs], tuple[Mean, Means]], weigh: Callable[[Batch], Scalar]) -> LossTransform:
    """A leaf from a function of `Obs`: its Mean, and any further metrics.

    Args:
      leaf: gives (Mean of the loss, metrics by name). The Mean's weight must equal `weigh` of the batch.
      weigh: the denominator, from masks only.
    """

    def update(obs: Obs, weights: Weights) -> tuple[Scalar, Means]:
        mean, metrics = leaf(obs)
        return mean.total * inverse(weights[LEAF]), constant({LEAF: mean, **metrics})

    return stateless(lambda batch: {LEAF: weigh(batch)}, update)


# -------------------------------------------------------------------------------------- combinators


def total(**losses: LossTransform) -> LossTransform:
    """The sum of named losses.

    >>> from jaxllm.losses.tokens import next_token
    >>> from jaxllm.losses.vocab import over_vocab
    >>> batch = Batch(*(jnp.ones((2, 3)) for _ in range(5)))
    >>> total(text=over_vocab(ce=(1.0, next_token())), again=over_vocab(loss=(0.5, next_token()))).weigh(batch).keys()
    dict_keys(['text/ce', 'again'])
    """

    def update(obs: Obs, state: State, weights: Weights) -> tuple[Scalar, Means]:
        scalar: Scalar = jnp.zeros((), jnp.float32)
        means: Means = {}
        for name, loss in losses.items():
            part, inner = loss.update(obs, state[name], _inside(weights, name))
            scalar += part
            means |= _outside(inner, name)
        return scalar, means

    return LossTransform(
        init=lambda params: {name: loss.init(params) for name, loss in losses.items()},
        weigh=lambda batch: {key: w for name, loss in losses.items() for key, w in _outside(loss.weigh(batch), name).items()},
        update=update,
        finish=lambda state, means: {name: loss.finish(state[name], {**means, **_inside(means, name)}) for name, loss in losses.items()},
    )


def scale(coefficient: Coefficient, loss: LossTransform) -> LossTransform:
    """`loss` times a number or a schedule of the step. Metrics stay unscaled."""

    def update(obs: Obs, state: State, weights: Weights) -> tuple[Scalar, Means]:
        scalar, means = loss.update(obs, state, weights)
        return value_of(coefficient, obs.step) * scalar, means

    return loss._replace(update=update)


def masked(loss: LossTransform, where: Callable[[Batch], Bool[Array, "B T"] | Bool[Array, " B"]]) -> LossTransform:
    """`loss` on some positions or rows only; its weights shrink with it, so it stays a mean over what is left."""

    def hide(batch: Batch) -> Batch:
        keep = where(batch)
        return batch.replace(loss_mask=batch.loss_mask * (keep if keep.ndim == 2 else keep[:, None]))

    return loss._replace(
        weigh=lambda batch: loss.weigh(hide(batch)),
        update=lambda obs, state, weights: loss.update(obs.replace(batch=hide(obs.batch)), state, weights),
    )


def partition(by: str, /, **branches: LossTransform | tuple[int | Sequence[int], LossTransform]) -> LossTransform:
    """One loss for each kind of row: the sum of the branches' own means. A branch without rows contributes 0.

    Args:
      by: 'source' (`Batch.source`), or the name of an integer array [B] in `Batch.extras`.
      branches: the i-th keyword gets the rows whose number is i. To choose the numbers, give
        `name=(3, loss)` or `name=((3, 4), loss)`, and then for every branch.

    Each branch that goes over the vocabulary is a pass of its own over all rows: for a few branches that is
    cheaper than gathering rows, which would make shapes depend on data.

    Raises:
      ConfigError: numbers given for some branches only; a batch without that field.
    """
    given = [isinstance(branch, tuple) and not isinstance(branch, LossTransform) for branch in branches.values()]
    if any(given) and not all(given):
        plain = next(name for name, has in zip(branches, given, strict=True) if not has)
        raise ConfigError(f"partition('{by}'): branch '{plain}' has no row numbers and others have; write {plain}=(number, loss)")

    def rows(numbers: Sequence[int]) -> Callable[[Batch], Bool[Array, " B"]]:
        def where(batch: Batch) -> Bool[Array, " B"]:
            kinds = need(batch.extras | ({} if batch.source is None else {"source": batch.source}), by, "Batch")
            return jnp.isin(kinds, jnp.array(numbers))

        return where

    def branch(index: int, value: Any) -> LossTransform:
        if isinstance(value, LossTransform):
            return masked(value, rows([index]))
        numbers, loss = value
        return masked(loss, rows([numbers] if isinstance(numbers, int) else list(numbers)))

    return total(**{name: branch(i, value) for i, (name, value) in enumerate(branches.items())})


def adaptive(coefficient: Callable[[Means], Any], loss: LossTransform, initial: float = 1.0) -> LossTransform:
    """`loss` times a number computed from the Means of the step before.

    Args:
      coefficient: from Means by name. Names are looked up as in nested scopes: those inside `loss`, then its
        neighbours under the same `total`, and so on outwards. Where it is not finite the old one is kept.
      initial: the coefficient of the first step.

    Minitron's alpha = L_logits / L_is (arXiv:2407.14679, section 3):

        total(logits=over_vocab(loss=(1.0, forward_kl('teacher'))),
              states=adaptive(lambda m: m['logits'].value / m['states'].value, cosine(...)))
    """

    def update(obs: Obs, state: State, weights: Weights) -> tuple[Scalar, Means]:
        scalar, means = loss.update(obs, state["loss"], weights)
        return jax.lax.stop_gradient(state["coefficient"]) * scalar, means

    def finish(state: State, means: Means) -> State:
        new = jnp.asarray(coefficient(means), jnp.float32)
        kept = jnp.where(jnp.isfinite(new), new, state["coefficient"])
        return {"coefficient": kept, "loss": loss.finish(state["loss"], means)}

    return LossTransform(
        init=lambda params: {"coefficient": jnp.float32(initial), "loss": loss.init(params)},
        weigh=loss.weigh,
        update=update,
        finish=finish,
    )


def as_loss_fn(
    apply: Callable[[Params, Batch], Obs], loss: LossTransform, annotators: Sequence[Annotator] = ()
) -> Callable[..., tuple[Scalar, tuple[Means, State]]]:
    """The loss as a function for `jax.value_and_grad(..., has_aux=True)` and any optax optimizer.

    Args:
      apply: the student: (params, batch) -> Obs with `hidden[STUDENT]` and `unembeddings[STUDENT]`.
      annotators: applied to that Obs in order, teachers for example.

    Returns:
      `f(params, frozen, batch, state, *, step=0, key=None) -> (scalar, (metrics, state))` for a whole batch in one piece.
      `frozen` holds the annotators' params by model name; `step` is what schedules see.
    """

    def loss_fn(
        params: Params, frozen: dict[str, Params], batch: Batch, state: State, *, step: Any = 0, key: Array | None = None
    ) -> tuple[Scalar, tuple[Means, State]]:
        obs = apply(params, batch).replace(step=jnp.asarray(step))
        obs = chain(*annotators)(frozen, obs, key)
        scalar, means = loss.update(obs, state, loss.weigh(batch))
        return scalar, (means, loss.finish(state, means))

    return loss_fn


# ------------------------------------------------------------------------------------------ helpers


def value_of(coefficient: Coefficient, step: Any) -> Any:
    """A coefficient at a step."""
    return coefficient(step) if callable(coefficient) else coefficient


def inverse(weight: Scalar) -> Scalar:
    """1 / weight, and 0 for a leaf that has nothing to weigh."""
    return jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0).astype(jnp.float32)


def constant(means: Means) -> Means:
    """Metrics carry no gradient."""
    return jax.lax.stop_gradient(means)


def need[Value](table: dict[str, Value], name: str, where: str, fix: str = "") -> Value:
    """`table[name]`, or a ConfigError that says what is there."""
    if name not in table:
        raise ConfigError(f"a loss needs '{name}' in {where}, which has {', '.join(table) or 'nothing'}{nearest(name, table)}{fix}")
    return table[name]


def _outside[Value](values: dict[str, Value], name: str) -> dict[str, Value]:
    return {name if key == LEAF else f"{name}/{key}": value for key, value in values.items()}


def _inside[Value](values: dict[str, Value], name: str) -> dict[str, Value]:
    """The inverse of `_outside`: the names below `name`, as seen from there."""
    below = {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
    return below | ({LEAF: values[name]} if name in values else {})
