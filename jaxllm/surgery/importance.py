"""How much each head, neuron, channel and layer of a decoder does, on a small calibration text: what structured pruning goes by.

Source: arXiv:2407.14679, section 2.2, and arXiv:2408.11796, section 2.1 (Minitron). One forward pass over rows of text, no training:

    heads     [L N]   Agg ‖head n's output‖₂, before the output projection
    neurons   [L F]   Agg |input of the down projection|; as an option what goes into the activation (the gate, where there is one)
    channels  [D]     Σ over every norm of every layer of Agg |norm(x)_d|: one set of channels for all layers
    layers    [L]     block influence, 1 − E cos(X_l, X_(l+1)) of the residual streams before and after

Agg is first over the tokens of a row, then over rows; the paper's best is the mean of absolute values, then L2:

    mean   (1/n) Σ |a|        l2   √(Σ a²)        var   (1/n) Σ (a − mean a)²

Padding, and positions without a loss, do not count. Statistics of a row are float32, sums over rows float64 on the host.

Ours: influence between any two layers, so that a contiguous block can be chosen by what it does as a whole (as arXiv:2403.17887 does),
and each channel's share of what a norm divides by, from which `prune` can mend the norms of a narrower model.

Letters: B batch, T length, L layers, D width, N query heads, H head size, F feed-forward width, J norms of a layer.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxllm.config import ConfigError, ModelConfig, diff, from_dict, nearest, to_dict
from jaxllm.contract import LM, Batch, Params

type Agg = Literal["mean", "l2", "var"]
type Neurons = Literal["hidden", "preactivation"]

AGGREGATIONS = ("mean", "l2", "var")
NEURONS = ("hidden", "preactivation")
_TAPS = ("block_input", "block_output", "attention_output", "mlp_output", "attention_heads", "mlp_hidden", "mlp_norm")
_ARRAYS = ("heads", "neurons", "channels", "influence", "energy", "final_energy")


class Scores(NamedTuple):
    """Importance of every part of one model: the larger, the more it does. Measured once, good for many shapes."""

    heads: Float[np.ndarray, "L N"]
    neurons: Float[np.ndarray, "L F"]
    channels: Float[np.ndarray, " D"]
    influence: Float[np.ndarray, "L+1 L+1"]
    """1 − E cos(X_i, X_j) of the residual streams before layers i and j (L: after the last)."""
    energy: Float[np.ndarray, "J L D"]
    """E of each channel's share of the square that a norm divides by; sums to 1. J as `norm_names`."""
    final_energy: Float[np.ndarray, " D"]
    """The same of the norm after the last layer, or of its place."""
    config: ModelConfig
    num_tokens: int
    """That counted."""
    how: str
    """The aggregations, or the seed of a random choice."""
    fingerprint: str = ""
    """Of the weights, as the caller names them."""

    @property
    def layers(self) -> Float[np.ndarray, " L"]:
        """Block influence of each layer."""
        return self.influence.diagonal(1)


# ------------------------------------------------------------------------------------------ measuring


def measure(
    lm: LM,
    params: Params,
    batches: Iterable[Batch],
    *,
    over_tokens: Agg = "mean",
    over_rows: Agg = "l2",
    neurons: Neurons = "hidden",
    fingerprint: str = "",
) -> Scores:
    """Scores of a decoder from one forward pass over calibration rows.

    Memory: intermediates of all layers at once, B·T·L·(4D + 2F + N·H) numbers; batches of one row will do.

    Args:
      lm, params: a decoder and its plain params (adapters folded in), layers stacked.
      batches: rows of any length; the paper has 1024 of them. Each row is one sample, packed or not.
      over_tokens, over_rows: the two aggregations.
      neurons: 'hidden' scores what the down projection reads; 'preactivation' what goes into the activation, as the paper has it.

    Raises:
      ConfigError: an unknown aggregation, an encoder-decoder, no token that counts, a variance over fewer than two rows.
    """
    choices = {"over_tokens": (over_tokens, AGGREGATIONS), "over_rows": (over_rows, AGGREGATIONS), "neurons": (neurons, NEURONS)}
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(allowed)}{nearest(str(value), allowed)}")
    config = lm.config
    if config.cross_attention:
        raise ConfigError("importance is measured on a decoder alone; this one attends to a memory that calibration rows do not have")

    rows: dict[str, _Moments] = {name: _Moments() for name in ("heads", "neurons", "channels")}
    total: dict[str, Any] = dict.fromkeys(("influence", "energy", "final_energy"), 0.0)
    num_tokens = 0
    for batch in batches:
        of_rows, sums, lengths = jax.tree.map(np.asarray, _statistics(lm, over_tokens, neurons, params, batch))
        for name, moments in rows.items():
            moments.add(of_rows[name][lengths > 0].astype(np.float64))
        for name in total:
            total[name] = total[name] + sums[name].astype(np.float64)
        num_tokens += int(lengths.sum())
    if not num_tokens:
        raise ConfigError("no token to score by: give at least one batch of calibration text")
    done = {name: moments.aggregated(over_rows) for name, moments in rows.items()}
    return Scores(
        done["heads"], done["neurons"], done["channels"].sum(0), total["influence"] / num_tokens,
        total["energy"] / (num_tokens * config.width), total["final_energy"] / (num_tokens * config.width),
        config, num_tokens, described(over_tokens, over_rows, neurons), fingerprint,
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1, 2))
def _statistics(
    lm: LM, over_tokens: Agg, neurons: Neurons, params: Params, batch: Batch
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """(name -> one statistic of each row [B …], name -> sum over tokens, tokens of each row)."""
    config = lm.config
    taps = {name: tap.astype(jnp.float32) for name, tap in lm(params, batch, taps=_TAPS).taps.items()}
    real = (batch.segment_ids > 0) & (batch.loss_mask > 0)
    normed = normalised(config, params["layers"], taps)
    activations = {
        "heads": jnp.linalg.norm(taps["attention_heads"], axis=-1),
        "neurons": taps["mlp_hidden"] if neurons == "hidden" else _preactivation(config, params, taps["mlp_norm"]),
        "channels": jnp.concatenate([output for _, output in normed.values()]),
    }
    stream = jnp.concatenate([taps["block_input"], taps["block_output"][-1:]])
    sums = {
        "influence": _influence(stream, real),
        "energy": _over_real(jnp.square(jnp.stack([unit for unit, _ in normed.values()])), real),
        "final_energy": _over_real(jnp.square(_unit(config, stream[-1:])), real)[0],
    }
    return {name: aggregate(x, real, over_tokens) for name, x in activations.items()}, sums, real.sum(1)


def described(over_tokens: Agg, over_rows: Agg, neurons: Neurons) -> str:
    """How scores were aggregated, in words."""
    return f"{over_tokens} over tokens, {over_rows} over rows, neurons: {neurons}"


def random(config: ModelConfig, seed: int) -> Scores:
    """Scores out of a hat: the baseline that a choice by importance must beat. No norm is mended by them."""
    rng = np.random.default_rng(seed)
    L, D = config.num_layers, config.width
    heads, neurons, channels = (rng.uniform(size=shape) for shape in ((L, config.num_heads), (L, config.ff_width), (D,)))
    influence = rng.uniform(size=(L + 1, L + 1))
    even = np.full((len(norm_names(config)), L, D), 1 / D)
    return Scores(heads, neurons, channels, influence, even, np.full(D, 1 / D), config, 0, f"random, seed {seed}")


def aggregate(x: Float[Array, "L B T X"], real: Bool[Array, "B T"], how: Agg) -> Float[Array, "B L X"]:
    """One statistic of each row over the tokens that count; 0 for a row of padding.

    >>> x = jnp.array([[1.0, -3.0], [2.0, 2.0]])[None, :, :, None]
    >>> aggregate(x, jnp.ones((2, 2), bool), 'mean').ravel().tolist()
    [2.0, 2.0]
    """
    weight = real[None, :, :, None].astype(jnp.float32)
    count = jnp.maximum(weight.sum(2), 1.0)
    if how == "mean":
        out = (jnp.abs(x) * weight).sum(2) / count
    elif how == "l2":
        out = jnp.sqrt((jnp.square(x) * weight).sum(2))
    else:
        mean = ((x * weight).sum(2) / count)[:, :, None]
        out = (jnp.square(x - mean) * weight).sum(2) / count
    return out.swapaxes(0, 1)


class _Moments:
    """Count, mean and sum of squared differences from it, over rows that come in parts. Source: Chan, Golub, LeVeque 1979."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, np.zeros(()), np.zeros(())

    def add(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        mean, total = rows.mean(0), self.count + len(rows)
        apart = mean - self.mean
        self.squares = self.squares + np.square(rows - mean).sum(0) + np.square(apart) * (self.count * len(rows) / total)
        self.mean, self.count = self.mean + apart * (len(rows) / total), total

    def aggregated(self, how: Agg) -> np.ndarray:
        """Of statistics that are never negative."""
        if how == "var" and self.count < 2:
            raise ConfigError(f"over_rows='var' is a variance over rows, and there is {self.count}; give two rows at least")
        squares = np.sqrt(self.squares + self.count * np.square(self.mean))
        return {"mean": self.mean, "l2": squares, "var": self.squares / self.count}[how]


def _over_real(x: Float[Array, "*J B T D"], real: Bool[Array, "B T"]) -> Float[Array, "*J D"]:
    return jnp.where(real[..., None], x, 0.0).sum((-3, -2))


def _influence(stream: Float[Array, "M B T D"], real: Bool[Array, "B T"]) -> Float[Array, "M M"]:
    """Σ over tokens of 1 − cos(X_i, X_j) = ½‖X_i/‖X_i‖ − X_j/‖X_j‖‖²: a form that is exactly 0 where nothing changes."""
    length = jnp.linalg.norm(stream, axis=-1, keepdims=True)
    unit = jnp.where(real[..., None], stream / jnp.where(length > 0, length, 1.0), 0.0)
    return jax.lax.map(lambda one: 0.5 * jnp.square(unit - one).sum((1, 2, 3)), unit)


def _preactivation(config: ModelConfig, params: Params, x: Float[Array, "L B T D"]) -> Float[Array, "L B T F"]:
    leaves = params["layers"]["mlp"]["gate" if config.gated else "up"]
    out = jnp.einsum("LBTD,LDF->LBTF", x, leaves["kernel"].astype(jnp.float32), precision="highest")
    return out + leaves["bias"][:, None, None].astype(jnp.float32) if config.mlp_bias else out


# ---------------------------------------------------------------------------------------------- norms


def norm_names(config: ModelConfig) -> tuple[str, ...]:
    """The norms over the width that a layer has, in the order in which they run.

    >>> norm_names(ModelConfig()), norm_names(ModelConfig(block='parallel'))
    (('attention_norm', 'mlp_norm'), ('attention_norm',))
    """
    parallel, placement = config.block == "parallel", config.norm_placement
    branches = ("attention", "mlp")
    first = branches[:1] if parallel and config.parallel_norms == 1 else branches
    last = branches[:1] if parallel and placement == "after_residual" else branches
    before = [f"{name}_norm" for name in first] if placement in ("before", "both") else []
    after = [f"{name}_post_norm" for name in last] if placement != "before" else []
    if parallel:
        return (*before, *after)
    return tuple(name for branch in branches for name in (*before, *after) if name.startswith(branch))


def normalised(config: ModelConfig, layers: Params, taps: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Norm's name -> (its input normalised, its output with scale and bias), [L B T D] each."""
    x, attention, mlp = taps["block_input"], taps["attention_output"], taps["mlp_output"]
    out: dict[str, tuple[Array, Array]] = {}

    def norm(name: str, value: Array) -> Array:
        unit = _unit(config, value)
        scale = layers[name]["scale"].astype(jnp.float32)[:, None, None]
        y = unit * (1.0 + scale if config.norm_plus_one else scale)
        out[name] = unit, y + layers[name]["bias"].astype(jnp.float32)[:, None, None] if config.norm_bias else y
        return out[name][1]

    if config.norm_placement in ("before", "both"):
        norm("attention_norm", x)
    if config.norm_placement == "after_residual":
        middle = x + attention + mlp if config.block == "parallel" else x + attention
        middle = norm("attention_post_norm", middle)
    else:
        branch = norm("attention_post_norm", attention) if config.norm_placement != "before" else attention
        middle = x if config.block == "parallel" else x + branch
    if "mlp_norm" in norm_names(config):
        norm("mlp_norm", middle)
    if "mlp_post_norm" in norm_names(config):
        norm("mlp_post_norm", middle + mlp if config.norm_placement == "after_residual" else mlp)
    return {name: out[name] for name in norm_names(config)}


def _unit(config: ModelConfig, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    x = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_eps)


# -------------------------------------------------------------------------------------------- ablation


def ablation(loss: Callable[[tuple[int, ...]], float], num_layers: int, size: int = 1) -> Float[np.ndarray, " starts"]:
    """Loss without layers [start, start + size), for each start: how the paper chooses depth (with Winogrande for the loss).

    Args:
      loss: of the model made of the layers that it is given: `lambda layers: nll(*prune.keep(params, config, Kept(layers=layers)))`.

    Raises:
      ConfigError: a block that leaves no layer.
    """
    return np.array([loss(outside(num_layers, start, size)) for start in _starts(num_layers, size)])


def outside(num_layers: int, start: int, size: int) -> tuple[int, ...]:
    """The layers before and after a block.

    >>> outside(5, 1, 3)
    (0, 4)
    """
    return (*range(start), *range(start + size, num_layers))


def block_influence(scores: Scores, size: int) -> Float[np.ndarray, " starts"]:
    """1 − E cos(X_start, X_(start + size)) for each contiguous block of `size` layers; size 1 gives `scores.layers`."""
    return scores.influence.diagonal(size)[_starts(len(scores.layers), size)]


def _starts(num_layers: int, size: int) -> range:
    if not 1 <= size < num_layers:
        raise ConfigError(f"a block of {size} out of {num_layers} layers cannot be removed; remove 1 to {num_layers - 1}")
    return range(num_layers - size + 1)


# ----------------------------------------------------------------------------------------------- files


def save(path: str | os.PathLike[str], scores: Scores) -> None:
    """Write one .npz file, whole or not at all."""
    about = {"config": to_dict(scores.config), "num_tokens": scores.num_tokens, "how": scores.how, "fingerprint": scores.fingerprint}
    data = io.BytesIO()
    np.savez_compressed(data, about=np.array(json.dumps(about)), **{name: getattr(scores, name) for name in _ARRAYS})
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.getvalue())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], fingerprint: str | None = None) -> Scores:
    """Scores that `save` wrote.

    Args:
      fingerprint: of the weights that they must belong to.

    Raises:
      ConfigError: no such file, not one of scores, or scores of other weights.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            about = json.loads(str(data["about"]))
            arrays = {name: data[name] for name in _ARRAYS}
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; scores are measured on a text and saved there") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} holds no importance scores ({type(error).__name__}); name another file, or remove it") from None
    if fingerprint is not None and about["fingerprint"] != fingerprint:
        raise ConfigError(
            f"{path} holds scores of other weights (fingerprint {about['fingerprint'] or 'unknown'}, these have {fingerprint}); "
            "name another file, or remove it to measure again"
        )
    return Scores(**arrays, **about | {"config": from_dict(ModelConfig, about["config"])})


def check(scores: Scores, config: ModelConfig) -> None:
    """Refuse scores of another model.

    Raises:
      ConfigError: names the first setting that differs, or the array with a number that is not finite.
    """
    differ = diff(to_dict(scores.config), to_dict(config))
    for name, (theirs, ours) in differ.items():
        raise ConfigError(f"the scores are of another model: its {name} is {theirs}, and this one's {ours}; measure this one's")
    for name in _ARRAYS:
        if not np.isfinite(getattr(scores, name)).all():
            raise ConfigError(f"the scores' {name} are not finite; look for what the model makes of the calibration text")
