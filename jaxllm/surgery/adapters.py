"""Low-rank deltas beside kernels (LoRA, rsLoRA, DoRA): functions LM -> LM, and functions on their leaves.

    y = x·W + s·(dropout(x)·A)·B             A [in R], B [R out], s = alpha / R or alpha / √R
    y = (x·W + s·(x·A)·B) · m / ‖W + s·A·B‖   with DoRA: one norm and one magnitude m per output

The leaves lie beside the kernel that they belong to, stacked over layers as it is:

    layers/attention/q/{kernel [L D N H], lora_a [L D R], lora_b [L R N H], lora_m [L N H]}
    unembed/{kernel [V D], lora_a [D R], lora_b [V R]}

They enter as a branch of `dot`, so that the backward pass never makes the kernel's own gradient. What a call needs besides goes in
as leaves too: `lora_key` [L …] for dropout, `lora_rows` [L B] for batches in which every row has its own adapter; then A and B
have a dimension of adapters, [L A …], and s is in B.

Source: arXiv:2106.09685 section 4; rsLoRA arXiv:2312.03732; DoRA arXiv:2402.09353 section 4.
Letters: L layers, D width, N heads, H head size, V vocabulary, R rank, A adapters, B rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm import tree
from jaxllm.config import ConfigError, LoraConfig
from jaxllm.contract import LM, Dot, Params

LEAVES = r"(.*/)?lora_[abm]"
"""What LoRA adds to the params."""
TRAIN_ONLY_LORA = ((LEAVES, False), (r".*", True))
"""`optim.freeze`: the base stands still."""


# --------------------------------------------------------------------------------------------- forward


def lora_dot(config: LoraConfig, inner: Dot, plain: Dot) -> Dot:
    """`inner`, and the branch where a projection has one.

    Args:
      inner: the product with the kernel.
      plain: the branch's own two products.
    """

    def dot(name: str, spec: str, x: Array, leaves: Params) -> Array:
        y = inner(name, spec, x, leaves)
        if "lora_a" not in leaves:
            return y
        a, b = leaves["lora_a"], leaves["lora_b"]
        into, out_of = _branch(spec)
        branch = _drop(x, config.dropout, leaves.get("lora_key"))
        if "lora_rows" in leaves:
            rows = leaves["lora_rows"]
            if len(rows) != len(x):
                raise ConfigError(f"adapters were selected for {len(rows)} rows (adapters.select), and the batch has {len(x)}")
            a, b, (into, out_of) = a[rows], b[rows], (_with_rows(into), _with_rows(out_of))
        branch = plain(name, into, branch.astype(x.dtype), {"kernel": a}).astype(x.dtype)
        y = y + _scale_at(config, name, leaves) * plain(name, out_of, branch, {"kernel": b})
        return y * _dora_factor(config, name, leaves) if "lora_m" in leaves else y

    return dot


def with_lora(lm: LM, config: LoraConfig) -> LM:
    """`lm`, which was built with `lora_dot`, with low-rank leaves in its params. B = 0, so that its outputs are those of `lm`.

    Raises:
      ConfigError: a pattern that matches no kernel (with the nearest paths), or a rank above a kernel's.
    """
    shapes = lm.param_shapes
    ranks = ranks_of(shapes, config)

    def init(key: Array) -> Params:
        key, own = jax.random.split(key)
        params = lm.init(key)
        return tree.merge(params, init_leaves(params, config, own))

    def apply(params: Params, inputs: Array, *, key: Array | None = None, **options: Any) -> Any:
        if key is not None and config.dropout:
            key, own = jax.random.split(key)
            sites = [path.removesuffix("/kernel") for path in ranks if path.startswith("layers/")]
            keys = jax.random.split(own, (len(sites), lm.config.num_layers))
            params = tree.merge(
                params, tree.from_items([(f"{s}/lora_key", jax.random.key_data(k)) for s, k in zip(sites, keys, strict=True)])
            )
        return lm.apply(params, inputs, key=key if lm.has_dropout else None, **options)

    return lm._replace(init=init, apply=apply, has_dropout=lm.has_dropout or config.dropout > 0)


def _branch(spec: str) -> tuple[str, str]:
    """The einsums of x·A and (x·A)·B for that of x·W.

    >>> _branch('BTNH,NHD->BTD')
    ('BTNH,NHR->BTR', 'BTR,RD->BTD')
    >>> _branch('...D,VD->...V')
    ('...D,DR->...R', '...R,VR->...V')
    """
    operands, out = spec.split("->")
    x, kernel = operands.split(",")
    contracted = "".join(letter for letter in kernel if letter not in out)
    kept, given = "".join(letter for letter in kernel if letter in out), x.removesuffix(contracted)
    second = f"R{kept}" if kernel.startswith(contracted) else f"{kept}R"
    return f"{x},{contracted}R->{given}R", f"{given}R,{second}->{out}"


def _with_rows(spec: str) -> str:
    """One matrix per row.

    >>> _with_rows('BTD,DR->BTR')
    'BTD,BDR->BTR'
    """
    return spec.replace(",", f",{spec[0]}")


def _scale_at(config: LoraConfig, name: str, leaves: Params) -> float:
    if "lora_rows" in leaves:
        return 1.0
    path = "unembed/kernel" if name == "unembed" else f"layers/{name}/kernel"
    return scale_of(config, path)


def _drop(x: Array, rate: float, key: Array | None) -> Array:
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(jax.random.wrap_key_data(key), 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def _dora_factor(config: LoraConfig, name: str, leaves: Params) -> Float[Array, "*out"]:
    """m / ‖W + s·A·B‖; no gradient through the norm, as in section 4.3."""
    whole = leaves["kernel"].astype(jnp.float32) + _scale_at(config, name, leaves) * delta(leaves["lora_a"], leaves["lora_b"])
    return leaves["lora_m"] / jax.lax.stop_gradient(_norms(whole, leaves["lora_m"].ndim))


def _norms(kernel: Float[Array, "*in *out"], num_out: int) -> Float[Array, "*out"]:
    return jnp.sqrt(jnp.square(kernel).sum(tuple(range(kernel.ndim - num_out))))


# ---------------------------------------------------------------------------------------------- leaves


def ranks_of(shapes: Params, config: LoraConfig) -> dict[str, int]:
    """Rank of each kernel that has a branch, by path.

    Args:
      shapes: params, or their shapes.

    Raises:
      ConfigError: a pattern that matches no kernel, or a rank above a kernel's.
    """
    kernels = {path: leaf for path, leaf in tree.items(shapes) if path.endswith("/kernel") and not path.startswith("prefix/")}
    tree.check_rules([(pattern, rank) for pattern, rank, _ in config.rules], tree.from_items(list(kernels.items())), "lora.rules")
    rules = [(pattern, rank) for pattern, rank, _ in config.rules]
    ranks = {path: tree.match(rules, path, 0) or 0 for path in kernels}
    for path, rank in ranks.items():
        into, out = split_shape(path, kernels[path].shape)
        full = min(int(np.prod(into)), int(np.prod(out)))
        if rank > full:
            raise ConfigError(f"lora.rules gives {path} rank {rank}, and the matrix itself has rank {full} at most; choose {full} or less")
    return {path: rank for path, rank in ranks.items() if rank}


def split_shape(path: str, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(input, output dimensions) of a kernel, without its layers.

    >>> split_shape('layers/attention/o/kernel', (12, 4, 16, 64))
    ((4, 16), (64,))
    """
    if path == "unembed/kernel":
        return (shape[1],), (shape[0],)
    own = tuple(shape[1:])
    num_in = 2 if path.endswith("/o/kernel") else 1
    return own[:num_in], own[num_in:]


def scale_of(config: LoraConfig, path: str) -> float:
    """s of the kernel at `path`.

    >>> rules = ((r'.*', 4, 16.0),)
    >>> scale_of(LoraConfig(rules), 'unembed/kernel'), scale_of(LoraConfig(rules, 'sqrt_rank'), 'unembed/kernel')
    (4.0, 8.0)
    """
    rank, alpha = tree.match([(pattern, (rank, alpha)) for pattern, rank, alpha in config.rules], path, (0, 0.0)) or (0, 0.0)
    return alpha / (rank if config.scale == "rank" else rank**0.5)


def init_leaves(params: Params, config: LoraConfig, key: Array) -> Params:
    """Fresh leaves for the kernels in `params`: A at random, B zero, m the kernel's norms."""
    pairs: list[tuple[str, Array]] = []
    for i, (path, rank) in enumerate(ranks_of(params, config).items()):
        kernel, site = tree.get(params, path), path.removesuffix("/kernel")
        into, out = split_shape(path, kernel.shape)
        layers = kernel.shape[:1] if path.startswith("layers/") else ()
        shape, own = (*layers, *into, rank), jax.random.fold_in(key, i)
        if config.init == "gaussian":
            a = jax.random.normal(own, shape) / rank
        else:
            a = jax.random.uniform(own, shape, minval=-1.0, maxval=1.0) / float(np.prod(into)) ** 0.5
        b = jnp.zeros((*layers, rank, *out) if layers else (*out, rank))
        pairs += [(f"{site}/lora_a", a), (f"{site}/lora_b", b)]
        if config.dora:
            if not layers:
                raise ConfigError(
                    "lora.dora is for the layers' kernels; a rule with rank 0 leaves the head out: ('unembed/kernel', 0, 1.0)"
                )
            pairs.append((f"{site}/lora_m", jax.vmap(partial(_norms, num_out=len(out)))(kernel.astype(jnp.float32))))
    return tree.from_items(sorted(pairs))


def delta(a: Float[Array, "*in R"], b: Float[Array, " R *out"]) -> Float[Array, "*in *out"]:
    """A·B in float32, whatever the dimensions of input and output."""
    return jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), axes=1, precision=jax.lax.Precision.HIGHEST)


# ----------------------------------------------------------------------------------------------- merge


def merge(params: Params, config: LoraConfig) -> Params:
    """Params without branches: each kernel with its own folded in, in the kernel's number format; float32 arithmetic.

    Raises:
      ConfigError: no low-rank leaves, as after an earlier merge; or rows of several adapters.
    """
    return _fold(params, config, lambda kernel, change: kernel + change)


def unmerge(merged: Params, adapter: Params, config: LoraConfig) -> Params:
    """The base again, with its branches: `merge` undone.

    In float32 the base comes back within half a unit in the last place of |W| + |s·A·B|. To the last bit where the base was
    bfloat16 and was merged into float32: round the result to bfloat16.

    Args:
      merged: what `merge` returned.
      adapter: the low-rank leaves.

    Raises:
      ConfigError: `merged` has branches still; a DoRA adapter, whose merge has no inverse that keeps precision.
    """
    if config.dora:
        raise ConfigError("a DoRA merge rescales the kernel and is not undone; keep the base's own weights")
    if list(_sites(merged)):
        raise ConfigError("unmerge: these params have low-rank branches beside their kernels, so they are not merged")
    base = _fold(tree.merge(merged, adapter), config, lambda kernel, change: kernel - change)
    return tree.merge(base, adapter)


def _fold(params: Params, config: LoraConfig, combine: Callable[[Array, Array], Array]) -> Params:
    leaves = dict(tree.items(params))
    sites = list(_sites(params))
    if not sites:
        raise ConfigError("merge: the params have no low-rank branches; they are merged already, or never had any")
    if any(path.endswith("lora_rows") for path in leaves):
        raise ConfigError("merge: every row has an adapter of its own here; merge one adapter's params")
    for site in sites:
        kernel, a, b = leaves[f"{site}/kernel"], leaves.pop(f"{site}/lora_a"), leaves.pop(f"{site}/lora_b")
        m, s = leaves.pop(f"{site}/lora_m", None), scale_of(config, f"{site}/kernel")

        def one(kernel: Array, a: Array, b: Array, m: Array | None, s: float = s) -> Array:
            whole = combine(kernel.astype(jnp.float32), s * delta(a, b))
            return (whole if m is None else whole * (m / _norms(whole, m.ndim))).astype(kernel.dtype)

        if site == "unembed":
            leaves[f"{site}/kernel"] = combine(kernel.astype(jnp.float32), s * delta(a, b.T).T).astype(kernel.dtype)
        else:
            leaves[f"{site}/kernel"] = jax.vmap(one, in_axes=(0, 0, 0, None if m is None else 0))(kernel, a, b, m)
    return tree.from_items(sorted(leaves.items()))


def _sites(params: Params) -> Iterator[str]:
    """Paths of the projections that have a branch."""
    return (path.removesuffix("/lora_a") for path, _ in tree.items(params) if path.endswith("/lora_a"))


# ---------------------------------------------------------------------------------------- many at once


def stack(adapters: Sequence[tuple[Params, LoraConfig]], base: Params) -> Params:
    """Adapters of one base as leaves with a dimension of adapters, for `select`: number i is adapters[i], the last one does nothing.

    Ranks and targets may differ: what an adapter lacks is zero. The scales are in B.

    Args:
      adapters: (low-rank leaves, their config) of each.
      base: the base's params, or their shapes.

    Raises:
      ConfigError: an adapter of another base (shapes that do not fit), or one with DoRA, which rescales the base's own product.
    """
    kernels = dict(tree.items(base))
    held = [dict(tree.items(tree.partition(leaves, lambda path: bool(re.fullmatch(LEAVES, path)))[0])) for leaves, _ in adapters]
    for i, own in enumerate(held):
        if any(path.endswith("lora_m") for path in own):
            raise ConfigError(
                f"adapter {i} is a DoRA adapter, which rescales the base's product; merge it, or serve it in a batch of its own"
            )
        for path, leaf in own.items():
            kernel = kernels.get(re.sub(r"lora_[ab]$", "kernel", path))
            if kernel is None or not _fits(path, leaf.shape, kernel.shape):
                has = "no such kernel" if kernel is None else f"{tuple(kernel.shape)}"
                raise ConfigError(f"adapter {i} has {path} {tuple(leaf.shape)}, and the base has {has}: it was made for another base")
    sites = sorted({path.rpartition("/")[0] for own in held for path in own})
    if any(site == "unembed" for site in sites):
        raise ConfigError("an adapter on the output head cannot be mixed within a batch; merge it, or leave the head out of lora.rules")
    pairs = []
    for site in sites:
        ranks = [own[f"{site}/lora_a"].shape[-1] if f"{site}/lora_a" in own else 0 for own in held]
        parts = [
            _padded(own, site, max(ranks), config, kernels[f"{site}/kernel"].shape) for own, (_, config) in zip(held, adapters, strict=True)
        ]
        nothing = jax.tree.map(jnp.zeros_like, parts[0])
        pairs += [(f"{site}/lora_{x}", jnp.stack([*(part[i] for part in parts), nothing[i]], axis=1)) for i, x in enumerate("ab")]
    return tree.from_items(sorted(pairs))


def select(params: Params, rows: Int[Array, " B"]) -> Params:
    """`params` with the stacked adapters of `stack`, such that row i of a batch uses adapter rows[i]; −1 uses none."""
    num_layers = next(leaf.shape[0] for path, leaf in tree.items(params) if path.startswith("layers/"))
    each = jnp.broadcast_to(jnp.asarray(rows, jnp.int32), (num_layers, len(rows)))
    kept = tree.partition(params, lambda path: not path.endswith("/lora_rows"))[0]
    return tree.merge(kept, tree.from_items([(f"{site}/lora_rows", each) for site in _sites(params)]))


def _fits(path: str, leaf: Sequence[int], kernel: Sequence[int]) -> bool:
    into, out = split_shape(re.sub(r"lora_[ab]$", "kernel", path), kernel)
    if path == "unembed/lora_b":
        return tuple(leaf[:-1]) == out
    if path.endswith("lora_a"):
        return tuple(leaf[-1 - len(into) : -1]) == into
    return tuple(leaf[-len(out) :]) == out


def _padded(own: dict[str, Array], site: str, rank: int, config: LoraConfig, kernel: Sequence[int]) -> tuple[Array, Array]:
    """(A, s·B) with zeros up to `rank`."""
    into, out = split_shape(f"{site}/kernel", kernel)
    if f"{site}/lora_a" not in own:
        return jnp.zeros((kernel[0], *into, rank)), jnp.zeros((kernel[0], rank, *out))
    a, b = own[f"{site}/lora_a"], scale_of(config, f"{site}/kernel") * own[f"{site}/lora_b"]
    more = rank - a.shape[-1]
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)]), jnp.pad(b, [(0, 0), (0, more)] + [(0, 0)] * (b.ndim - 2))
