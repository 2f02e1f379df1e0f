"""Fewer key/value heads for a trained model: multi-head to grouped-query or multi-query attention.

Source: arXiv:2305.13245, section 2.1 (uptraining); MQA arXiv:1911.02150. Query head n reads key/value head n // G, so new head k is
made of the r = K / K' old heads from k·r on:

    mean    W'[k] = (1/r) Σ_i W[k·r + i]        projection is linear: this is the mean of the keys (values) themselves
    first   W'[k] = W[k·r]
    random  fresh, as the model's own initialisation draws

In these three, query and output projections stay. Biases and QK-norm scales that differ from head to head are pooled likewise; a
QK-norm scale that all heads share stays. The mean of r unlike heads is about √r shorter than they are, so that attention is flatter
before uptraining; nothing is rescaled.

    svd     ours: one head with a linear map to each old one, nearest on the inputs x of a calibration text

A head's values may be multiplied by any matrix and its rows of the output projection by the inverse, and nothing changes; a mean
depends on that choice, and is poor where heads of a group are written in unlike bases. So we ask for V' [D H] and maps A_i [H H] that
minimise Σ_i Σ_(n reads i) E|x (V_i − V' A_i) O_n|², which a truncated SVD solves, and put A_i O_n in the place of O_n. Likewise keys,
E|(x Q_n)·(x' K_i − x' K' A_i)|², with A_i put into the queries. Rotary positions leave a key fewer freedoms: in a rotated plane, A_i is
one complex number. A QK-norm leaves none: its keys are means. SmolLM2-135M from 3 heads to 1, wikitext2 loss at once: before 3.26, svd
5.28, mean 9.90, random 11.74, first 13.57 (`python -m tools.bench.kv_heads`; docs/surgery.md).

Letters: B batch, T length, S key length, L layers, D width, N query heads, K key/value heads, G = N/K, H head size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm import tree
from jaxllm.config import ConfigError, ModelConfig
from jaxllm.contract import LM, Batch, Params

type How = Literal["mean", "first", "random", "svd"]

_RIDGE = 1e-4  # of the mean square of an input

_KV = r"layers/(attention|cross_attention)/([kv]/(kernel|bias)|k_norm/scale)"
_OF_KV = re.compile(rf"(^|/){_KV}(/|$)")  # in an optimizer's state, where more may stand before and after


def kv_heads(
    params: Params,
    config: ModelConfig,
    num_kv_heads: int,
    how: How = "mean",
    *,
    key: Array | None = None,
    moments: Float[np.ndarray, "L E E"] | None = None,
    reach: int = 1024,
) -> tuple[Params, ModelConfig]:
    """(params, config) with `num_kv_heads` key/value heads, each made of a contiguous group of the old ones.

    Leaves that do not change are the ones given, not copies. An encoder beside the decoder (leaves not under `layers/`) stays;
    cross-attention is converted with self-attention.

    Args:
      params: of a decoder of `config`, JAX's arrays (on a mesh or not) or NumPy's.
      key: for 'random'.
      moments: for 'svd', from `input_moments`. It is computed on the host in float64, a layer at a time.
      reach: for 'svd' with rotary positions: planes that turn by less than a radian over this many tokens count as standing still.
        0 keeps to what is exact at any distance.

    Raises:
      ConfigError: as `check`; 'random' without a key, 'svd' without moments or with cross-attention.
    """
    check(params, config, num_kv_heads)
    new_config = replace(config, num_kv_heads=num_kv_heads)
    if new_config == config:
        return params, config
    if how == "svd":
        return _by_svd(params, config, num_kv_heads, moments, reach), new_config
    if how == "random" and key is None:
        raise ConfigError("how='random' draws new heads: give a key, jax.random.key(seed)")

    def resize(path: str, leaf: Any) -> Any:
        if not has_kv_heads(path, config):
            return leaf
        if how != "random":
            return pool(leaf, num_kv_heads, how)
        assert key is not None
        layers = [fresh(path, (*leaf.shape[1:-2], num_kv_heads, leaf.shape[-1]), config, key, layer) for layer in range(leaf.shape[0])]
        return jnp.stack(layers).astype(leaf.dtype)

    return tree.map_with_path(resize, params), new_config


def check(params: Params, config: ModelConfig, num_kv_heads: int) -> None:
    """Refuse what cannot be converted; reads shapes only.

    Raises:
      ConfigError: more heads than there are, a number that does not divide theirs, adapters that are not merged, quantised
        heads, params of another config.
    """
    have = config.num_kv_heads
    divisors = ", ".join(str(n) for n in range(1, have + 1) if have % n == 0)
    if num_kv_heads > have:
        raise ConfigError(
            f"num_kv_heads is {num_kv_heads} and the model has {have}; heads can be merged, not split: choose one of {divisors}"
        )
    if num_kv_heads < 1 or have % num_kv_heads:
        raise ConfigError(f"num_kv_heads is {num_kv_heads}, which does not divide the model's {have}; choose one of {divisors}")
    for path, leaf in tree.items(params):
        if "lora_" in path:
            raise ConfigError(f"{path} is a low-rank delta of the heads that are there now; merge the adapter into its base first")
        if path.startswith("prefix/"):
            raise ConfigError(
                f"{path} belongs to a prefix made for the heads that are there now; convert the base, and train a prefix for it"
            )
        if not has_kv_heads(path, config):
            continue
        if len(leaf.shape) < 3 or leaf.shape[-2] != have or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ConfigError(
                f"{path} holds {leaf.dtype} numbers of shape {tuple(leaf.shape)}; expected are floating point numbers, layers first, "
                f"and {have} heads as the last dimension but one"
            )
    if "layers/attention/k/kernel" not in tree.paths(params):
        raise ConfigError("there is no layers/attention/k/kernel among the params; give those of a decoder, layers stacked")


def has_kv_heads(path: str, config: ModelConfig) -> bool:
    """Whether the leaf at `path` has key/value heads, which are its last but one dimension.

    >>> has_kv_heads('layers/attention/k/kernel', ModelConfig()), has_kv_heads('layers/attention/q/kernel', ModelConfig())
    (True, False)
    """
    return re.fullmatch(_KV, path) is not None and (config.qk_norm == "full" or "k_norm" not in path)


def pool(heads: Any, num_kv_heads: int, how: Literal["mean", "first"]) -> Any:
    """The mean (in float32, cast back), or the first, of each contiguous group of heads: [… K H] -> [… num_kv_heads H].

    Args:
      heads: NumPy's array or JAX's; the result is of the same library.

    >>> pool(np.arange(4.0).reshape(4, 1), 2, 'mean').tolist()
    [[0.5], [2.5]]
    """
    *lead, num_heads, size = heads.shape
    groups = heads.reshape(*lead, num_kv_heads, num_heads // num_kv_heads, size)
    return groups[..., 0, :] if how == "first" else groups.astype(np.float32).mean(-2).astype(heads.dtype)


def fresh(path: str, shape: tuple[int, ...], config: ModelConfig, key: Array, layer: int) -> Float[Array, ...]:
    """One layer's leaf as the model's initialisation draws it: N(0, init_std or fan_in^-½) for a kernel, zero biases, unit scales.

    Args:
      shape: of one layer: [D K H] or [K H].
    """
    if path.endswith("/scale"):
        return jnp.full(shape, 0.0 if config.norm_plus_one else 1.0)
    if path.endswith("/bias"):
        return jnp.zeros(shape)
    std = shape[0] ** -0.5 if config.init == "fan_in" else config.init_std
    leaf_key = jax.random.fold_in(key, int.from_bytes(path.encode(), "big") % (2**31 - 1))
    return std * jax.random.normal(jax.random.fold_in(leaf_key, layer), shape)


# ------------------------------------------------------------------------------------------ svd


def input_moments(lm: LM, params: Params, batches: Iterable[Batch]) -> Float[np.ndarray, "L E E"]:
    """E[z zᵀ] of each layer's attention input with a one behind it, z = (x, 1), over the tokens that are not padding; E = D + 1.

    Args:
      batches: of calibration text, together several times D tokens.
    """

    @jax.jit
    def sums(params: Params, batch: Batch) -> tuple[Array, Array]:
        x = lm(params, batch, taps=("attention_norm",)).taps["attention_norm"].astype(jnp.float32)
        real = (batch.segment_ids > 0).astype(jnp.float32)[None, :, :, None]
        z = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1) * real
        return jnp.einsum("LBTD,LBTE->LDE", z, z, precision="highest"), real.sum()

    total, count = np.zeros(()), 0.0
    for batch in batches:
        part, num_tokens = sums(params, batch)
        total, count = total + np.asarray(part, np.float64), count + float(num_tokens)
    if not count:
        raise ConfigError("no token to take moments of: give at least one batch of calibration text")
    return total / count


def _by_svd(params: Params, config: ModelConfig, num_kv_heads: int, moments: np.ndarray | None, reach: int) -> Params:
    if moments is None:
        raise ConfigError("how='svd' weighs what heads do to real text: give moments, from input_moments(lm, params, batches)")
    if config.cross_attention:
        raise ConfigError("how='svd' has no moments of the memory that cross-attention reads; use how='mean'")
    attention = params["layers"]["attention"]
    layers = []
    for layer in range(config.num_layers):
        one = jax.tree.map(lambda leaf, at=layer: np.asarray(leaf[at], np.float64), attention)
        layers.append(_merge_layer(one, config, layer, num_kv_heads, moments[layer], reach))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    like = lambda new, old: jnp.asarray(new, old.dtype) if isinstance(old, jax.Array) else new.astype(old.dtype)
    merged = tree.map_with_path(lambda path, old: like(tree.get(stacked, path), old), attention)
    return {**params, "layers": {**params["layers"], "attention": merged}}


def _merge_layer(leaves: Params, config: ModelConfig, layer: int, num_kv_heads: int, moments: np.ndarray, reach: int) -> Params:
    """One layer's attention in float64. Kernels carry their bias as a last row here, as inputs carry a one."""
    width, size, num_new = config.width, config.head_size, num_kv_heads
    ridge = _RIDGE * np.trace(moments) / len(moments)  # inputs that the text did not show count a little
    metric = moments + ridge * np.eye(len(moments))
    q, k, v = (_with_bias_row(leaves[name]) for name in "qkv")
    o = leaves["o"]["kernel"]
    old = (num_new, config.num_kv_heads // num_new)  # K' groups of r
    queries = q.reshape(width + 1, *old, config.group_size, size)  # E K' r G H
    outputs = o.reshape(*old, config.group_size, size, width)
    keys, values = (x.reshape(width + 1, *old, size) for x in (k, v))
    new_k, new_v = np.empty((2, width + 1, num_new, size))
    merge_keys = config.qk_norm == "none"
    for group in range(num_new):
        weights = np.einsum("rghd,rgid->rhi", outputs[group], outputs[group])
        new_v[:, group], maps = _merge(values[:, group], metric, weights)
        outputs[group] = np.einsum("rhi,rgid->rghd", maps, outputs[group])
        if merge_keys:
            new_k[:, group], queries[:, group] = _merge_keys(keys[:, group], queries[:, group], metric, *_planes(config, layer, reach))
        else:
            new_k[:, group] = keys[:, group].mean(1)
    out = dict(leaves)
    for name, rows in (("q", q), ("k", new_k), ("v", new_v)):  # queries and outputs are views of q and o
        out[name] = {"kernel": rows[:-1]} | ({"bias": rows[-1]} if "bias" in leaves[name] else {})
    out["o"] = {**leaves["o"], "kernel": o}
    if config.qk_norm == "full":
        out["k_norm"] = {"scale": pool(leaves["k_norm"]["scale"], num_new, "mean")}
    return out


def _with_bias_row(leaves: Params) -> np.ndarray:
    kernel = leaves["kernel"]
    return np.concatenate([kernel, leaves.get("bias", np.zeros(kernel.shape[1:]))[None]])


def _planes(config: ModelConfig, layer: int, reach: int) -> tuple[list[list[int]], list[int]]:
    """(pairs of dimensions that rotate, dimensions that do not, or so slowly that it does not matter within `reach`)."""
    rope = config.kind(layer).rope or config.rope
    num_planes = round(config.head_size * rope.fraction) // 2 if config.position == "rope" else 0
    # Every kind of scaling makes a plane slower than this, or leaves it.
    turning = [i for i in range(num_planes) if reach == 0 or rope.base ** (-i / num_planes) * reach >= 1]
    pairs = [[i, i + num_planes] for i in turning]
    return pairs, sorted(set(range(config.head_size)) - {dim for pair in pairs for dim in pair})


def _merge_keys(
    keys: np.ndarray, queries: np.ndarray, metric: np.ndarray, pairs: list[list[int]], still: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(shared key [E H], queries that go with it [E r G H]) of old keys [E r H]."""
    energy = np.einsum("ergh,ef,frgi->rhi", queries, metric, queries, optimize=True)
    new_keys, new_queries = np.empty((len(keys), keys.shape[-1])), np.empty_like(queries)
    for pair in pairs:
        both = energy[:, pair, pair].sum(-1)[:, None, None]  # r 1 1
        shared, maps = _merge(_complex(keys[..., pair]), metric, both)
        turned = _complex(queries[..., pair]) * maps.conj()[None]  # Re(ū·w) = Re(conj(u·m̄)·s) where w = s·m
        new_keys[:, pair], new_queries[..., pair] = _real(shared), _real(turned)
    if still:
        new_keys[:, still], maps = _merge(keys[..., still], metric, energy[:, still][:, :, still])
        new_queries[..., still] = np.einsum("rhi,ergi->ergh", maps, queries[..., still])
    return new_keys, new_queries


def _complex(pairs: np.ndarray) -> np.ndarray:
    """[… 2] -> [… 1]."""
    return pairs[..., :1] + 1j * pairs[..., 1:]


def _real(numbers: np.ndarray) -> np.ndarray:
    """[… 1] -> [… 2]."""
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def _merge(heads: np.ndarray, metric: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The S [E h] and A_i [h h] that minimise Σ_i tr (X_i − S A_i)ᴴ metric (X_i − S A_i) weights_i.

    With C the metric, that is the best approximation of rank h of C^½ [X_1 √W_1, X_2 √W_2, …]. S has unit variance over C times
    the mean square of the old heads', so that it is as long as they are.

    Args:
      heads: X [E r h], real or complex.
      weights: W [r h h], positive semidefinite.
    """
    flat = heads.reshape(len(heads), -1)
    (num_heads, size), num_columns = heads.shape[1:], flat.shape[1]
    gram = flat.conj().T @ metric @ flat
    roots = np.zeros((num_columns, num_columns))
    for i, weight in enumerate(weights):
        scale, basis = np.linalg.eigh(weight)
        roots[i * size : (i + 1) * size, i * size : (i + 1) * size] = basis * np.sqrt(np.maximum(scale, 0.0)) @ basis.T
    squares, vectors = np.linalg.eigh(roots @ gram @ roots)  # in increasing order
    squares, vectors = squares[-size:], vectors[:, -size:]
    used = squares > 1e-12 * max(squares[-1], 1e-300)
    mix = roots @ vectors * np.where(used, 1.0 / np.sqrt(np.where(used, squares, 1.0)), 0.0)  # mixᴴ gram mix = 1
    length = np.sqrt(np.trace(gram).real / num_columns)
    maps = (mix.conj().T @ gram).reshape(size, num_heads, size).transpose(1, 0, 2)
    return flat @ mix * length, maps / length


# ---------------------------------------------------------------------------------------- optimizer


def opt_state(state: Any, template: Any, how: Literal["mean", "reset"] = "mean") -> Any:
    """An optimizer's state of the model before, in the shapes of the model after; step counts stay, and so does the schedule's place.

    mean    moments of fewer heads are the mean over each contiguous group
    reset   they are zero: Adam's first update is then (1 − b1) / √(1 − b2) learning rates long, not one, as its count goes on

    Moments that the old state has not in a shape to be grouped (Adafactor factors large matrices only) are zero either way.

    Args:
      template: state or shapes of the new model's optimizer: `jax.eval_shape(optimizer.init, new_params)`.

    Raises:
      ConfigError: the states differ in leaves that have no key/value heads: they are of different optimizers.
    """
    old = dict(_leaves(state))
    surplus = [path for path in old if path not in dict(_leaves(template)) and not _OF_KV.search(path)]

    def resize(path: str, new: Any) -> Any:
        if not _OF_KV.search(path):
            if path not in old or old[path].shape != new.shape:
                surplus.append(path)
                return new
            return old[path]
        if path in old and old[path].shape == new.shape:
            return old[path]
        pooled = _grouped_mean(old[path], new) if path in old and how == "mean" else None
        return jnp.zeros(new.shape, new.dtype) if pooled is None else pooled

    leaves = [resize(path, leaf) for path, leaf in _leaves(template)]
    if surplus:
        raise ConfigError(
            f"the optimizer's state is not of the same optimizer as the new one: {surplus[0]} differs; keep the optim settings"
        )
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _leaves(state: Any) -> list[tuple[str, Any]]:
    return [("/".join(_name(key) for key in keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(state)]


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _grouped_mean(old: Any, new: Any) -> Any:
    """`old` in the shape of `new`, means over contiguous groups along the one dimension that is shorter; None where there is no such."""
    differ = [axis for axis, sizes in enumerate(zip(old.shape, new.shape, strict=False)) if sizes[0] != sizes[1]]
    if len(old.shape) != len(new.shape) or len(differ) != 1 or old.shape[differ[0]] % new.shape[differ[0]]:
        return None
    (axis,) = differ
    groups = old.reshape(*old.shape[:axis], new.shape[axis], -1, *old.shape[axis + 1 :])
    return groups.astype(jnp.float32).mean(axis + 1).astype(new.dtype)


# ------------------------------------------------------------------------------------------ traffic


def cache_bytes(config: ModelConfig, batch_size: int, length: int, itemsize: int = 2) -> int:
    """2 · K · H · Σ_layers min(window, length) · B · itemsize: the keys and values of `length` tokens.

    Source: arXiv:2305.13245, section 2.2.

    >>> cache_bytes(ModelConfig(num_layers=80, num_heads=64, num_kv_heads=64, head_size=128), 1, 4096) / 2**30
    10.0
    """
    slots = sum(min(config.kind(layer).window or length, length) for layer in range(config.num_layers))
    return 2 * config.num_kv_heads * config.head_size * slots * batch_size * itemsize


def decode_seconds(weight_bytes: float, cache_bytes: float, bytes_per_second: float) -> float:
    """(weight bytes + cache bytes) / bandwidth: the least time of one decoding step, which reads each of them once."""
    return (weight_bytes + cache_bytes) / bytes_per_second
