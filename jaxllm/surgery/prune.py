"""Fewer heads, neurons, channels and layers: a dense decoder out of a larger one, by slicing.

Source: arXiv:2407.14679, sections 2.2 and 2.3, and arXiv:2408.11796, section 2 (Minitron).

    heads     query heads, by whole groups of a key/value head or equally many of each; each layer has its own choice
    neurons   of the feed-forward layer; each layer has its own choice
    channels  of the residual stream; one choice for embedding, norms, every projection and the output head
    layers    any; a contiguous block is the paper's choice

What stays keeps its order, and its numbers: head size, biases, QK-norms, learned positions go along. So do the multipliers
`logit_scale` and `attention_scale`, and `embedding_scale`, even where they were D^±½: a kept channel then holds what it held, and a logit
is the part of the old sum that is left. One exception: an `embedding_scale` of exactly D^½ (Gemma, which cannot say any other) becomes
D'^½, the table is multiplied by (D/D')^½, and the last norm divided by it where the table also makes the logits; the function is the
same. A layer takes its window and RoPE along: the pattern is the shortest that says so. `init_std` is for fresh weights, and stays.

A norm divides by the root mean square of what is left, which is larger than before where large channels were kept: everything behind
it shrinks. `mend_norms` (ours) multiplies its scale by the mean ratio of the two, √(D/D' · E[share of the square in kept channels]).

Letters: L layers, D width, N query heads, K key/value heads, G = N/K, H head size, F feed-forward width, V vocabulary, T longest context;
N' and so on are of the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxllm import tree
from jaxllm.config import ConfigError, LayerKind, ModelConfig
from jaxllm.contract import Params
from jaxllm.surgery import importance
from jaxllm.surgery.importance import Scores
from jaxllm.surgery.shapes import Shape, check_size

type Depth = Literal["block", "single"]

_DIMS: tree.Rules[str] = (
    ("embed/tokens|unembed/kernel", "V D"),
    ("embed/positions", "T D"),
    ("final_norm/(scale|bias)", "D"),
    ("layers/attention/q/kernel", "L D N H"),
    ("layers/attention/[kv]/kernel", "L D K H"),
    ("layers/attention/q/bias|layers/attention/q_norm/scale", "L N H"),
    ("layers/attention/[kv]/bias|layers/attention/k_norm/scale", "L K H"),
    ("layers/attention/o/kernel", "L N H D"),
    ("layers/mlp/(gate|up)/kernel", "L D F"),
    ("layers/mlp/(gate|up)/bias", "L F"),
    ("layers/mlp/down/kernel", "L F D"),
    ("layers/(attention/o|mlp/down)/bias", "L D"),
    ("layers/(attention|mlp)_(post_)?norm/(scale|bias)", "L D"),
)
"""Path pattern -> its dimensions."""


class Kept(NamedTuple):
    """Indices of what stays, out of the old model; None keeps all of an axis. `Kept(layers=[0, 1, 5])` is a whole request."""

    layers: Sequence[int] | Int[np.ndarray, " Y"] | None = None
    heads: Int[np.ndarray, "L Y"] | Sequence[int] | None = None
    """Query heads of each old layer (the rows of layers that go do not matter), or of every layer alike. A key/value head stays while
    one of its query heads does, and all that stay have equally many."""
    neurons: Int[np.ndarray, "L Y"] | Sequence[int] | None = None
    channels: Sequence[int] | Int[np.ndarray, " Y"] | None = None
    partners: Int[np.ndarray, "L Y"] | None = None
    """For `merge`: the pruned head whose difference each kept one takes in; itself where it takes none."""
    merge: float = 0.0
    """head ← head + merge · (head − partner): 1 as arXiv:2407.14679 prints it, −½ the mean of the two."""
    mend: dict[str, np.ndarray] | None = None
    """Path of a norm's scale -> what it is multiplied by, [L] or a number."""


# --------------------------------------------------------------------------------------------- choosing


def prune(params: Params, config: ModelConfig, scores: Scores, shape: Shape | None = None, **options: Any) -> tuple[Params, ModelConfig]:
    """(params, config) of `shape`, made of what `scores` say matters most: `keep(params, config, choose(scores, shape, …))`.

    Args:
      scores: from `importance.measure`, or `importance.random` for the baseline; of this very config.
      shape: None changes nothing but what the options say.
      options: of `choose`.

    Raises:
      ConfigError: as `choose` and `keep`; scores of another model.
    """
    importance.check(scores, config)
    return keep(params, config, choose(scores, Shape.of(config) if shape is None else shape, **options))


def choose(
    scores: Scores,
    shape: Shape,
    *,
    layers: Sequence[int] | None = None,
    depth: Depth = "block",
    merge_heads: float = 0.0,
    mend_norms: bool = False,
) -> Kept:
    """What to keep for `shape`: the best by score, of equals the first.

    Args:
      layers: those that stay, however they were found (`importance.ablation`); None leaves it to `depth`.
      depth: 'block' removes the contiguous block that changes the residual stream least, 'single' the layers that do so one by one.
      merge_heads: see `Kept.merge`; 0 drops pruned heads altogether.
      mend_norms: scale norms for the narrower stream, by the calibration text's mean.

    Raises:
      ConfigError: a shape that is larger somewhere, or whose heads the groups do not allow.
    """
    config = scores.config
    for name, size in shape._asdict().items():
        check_size(config, name, size)
    if shape.num_heads % shape.num_kv_heads or shape.num_heads // shape.num_kv_heads > config.group_size:
        raise ConfigError(
            f"{shape.num_heads} heads in {shape.num_kv_heads} groups cannot be made of {config.num_heads} in {config.num_kv_heads}: groups "
            f"have equally many heads, {config.group_size} at most; for other numbers of heads see `shapes.possible_heads`"
        )
    if depth not in ("block", "single"):
        raise ConfigError(f"depth is {depth!r}; choose one of block, single")
    if layers is None and shape.num_layers < config.num_layers:
        layers = choose_layers(scores, shape.num_layers, depth)
    heads = partners = neurons = channels = mend = None
    if shape.num_heads < config.num_heads:
        heads, partners = choose_heads(scores.heads, config, shape.num_heads, shape.num_kv_heads)
    if shape.ff_width < config.ff_width:
        neurons = top(scores.neurons, shape.ff_width)
    if shape.width < config.width:
        channels = top(scores.channels, shape.width)
        mend = norm_ratios(scores, channels) if mend_norms else None
    return Kept(layers, heads, neurons, channels, partners if merge_heads else None, merge_heads, mend)


def top(scores: Float[np.ndarray, "*L X"], number: int) -> Int[np.ndarray, "*L Y"]:
    """Indices of the `number` largest of each row, in increasing order; of equals the first.

    >>> top(np.array([3.0, 1.0, 3.0, 2.0]), 2).tolist()
    [0, 2]
    """
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :number], axis=-1)


def choose_layers(scores: Scores, num_layers: int, depth: Depth = "block") -> tuple[int, ...]:
    """The layers that stay."""
    if depth == "single":
        return tuple(top(scores.layers, num_layers).tolist())
    size = len(scores.layers) - num_layers
    return importance.outside(len(scores.layers), int(importance.block_influence(scores, size).argmin()), size)


def choose_heads(
    scores: Float[np.ndarray, "L N"], config: ModelConfig, num_heads: int, num_kv_heads: int
) -> tuple[Int[np.ndarray, "L Y"], Int[np.ndarray, "L Y"]]:
    """(the heads that stay, their partners): the N'/K' best of each group, of the K' groups in which those sum to most.

    Partners, with the heads of a group (of the layer, where each head has keys of its own) from the best to the worst as 1 … n, of which
    k stay: head i's is 2k − i + 1, for i from 2k − n + 1 to k. Source: arXiv:2407.14679, section 2.2, whose range starts one too early.
    """
    N, G, own = config.num_heads, config.group_size, num_heads // num_kv_heads
    chosen, partners = np.empty((2, len(scores), num_heads), np.int64)
    for layer, row in enumerate(scores):
        best = np.argsort(-row.reshape(-1, G), axis=1, kind="stable") + np.arange(0, N, G)[:, None]  # K G
        groups = top(row[best[:, :own]].sum(1), num_kv_heads)
        ranked = [best[group] for group in groups] if G > 1 else [np.argsort(-row, kind="stable")]
        pairs: dict[int, int] = {}
        for order in ranked:
            k = own if G > 1 else num_heads
            pairs |= {int(order[i]): int(order[2 * k - 1 - i]) if 2 * k - 1 - i < len(order) else int(order[i]) for i in range(k)}
        chosen[layer] = sorted(pairs)
        partners[layer] = [pairs[head] for head in chosen[layer].tolist()]
    return chosen, partners


def norm_ratios(scores: Scores, channels: np.ndarray) -> dict[str, np.ndarray]:
    """Path of each norm's scale -> root mean square of the kept channels / of all, on average over tokens: [L], and one number."""
    ratio = lambda energy: np.sqrt(energy[..., channels].sum(-1) * energy.shape[-1] / len(channels))
    names = importance.norm_names(scores.config)
    of_layers = {f"layers/{name}/scale": ratio(energy) for name, energy in zip(names, scores.energy, strict=True)}
    return of_layers | {"final_norm/scale": ratio(scores.final_energy)}


# ---------------------------------------------------------------------------------------------- slicing


def keep(params: Params, config: ModelConfig, kept: Kept) -> tuple[Params, ModelConfig]:
    """(params, config) of what is kept. Leaves that do not change are the ones given, not copies.

    Args:
      params: of a plain decoder of `config`, JAX's arrays (on a mesh, or traced) or NumPy's.
      kept: explicit indices, in any order, or what `choose` says.

    Raises:
      ConfigError: an index that is not there or comes twice, groups of unlike sizes, heads of a model with ALiBi, leaves that are not a
        plain decoder's (adapters, a prefix, cross-attention) or not of `config`.
    """
    check(params, config)
    plan = Plan.of(config, kept)
    return tree.map_with_path(lambda path, leaf: plan.apply(path, leaf), params), plan.config


def check(params: Params, config: ModelConfig) -> None:
    """Refuse leaves that cannot be pruned; reads shapes only."""
    sizes = {
        "L": config.num_layers, "D": config.width, "N": config.num_heads, "K": config.num_kv_heads, "H": config.head_size,
        "F": config.ff_width, "T": config.max_length,
    }  # fmt: skip
    for path, leaf in tree.items(params):
        dims = dims_of(path, config)
        want = [sizes.get(letter, size) for letter, size in zip(dims, leaf.shape, strict=False)]
        if want != list(leaf.shape) or len(dims) != len(leaf.shape):
            raise ConfigError(f"{path} has shape {tuple(leaf.shape)}, and {' '.join(dims)} of the config are {want}; give its own params")


def dims_of(path: str, config: ModelConfig) -> list[str]:
    """Letters of a leaf's dimensions.

    >>> dims_of('layers/mlp/up/kernel', ModelConfig())
    ['L', 'D', 'F']
    """
    if config.qk_norm == "head" and path in ("layers/attention/q_norm/scale", "layers/attention/k_norm/scale"):
        return ["L", "H"]
    dims = tree.match(_DIMS, path)
    if dims is None:
        raise ConfigError(f"{path} is no leaf of a plain decoder; fold adapters and prefixes into their base, or train them after pruning")
    return dims.split()


class Plan(NamedTuple):
    """`Kept`, checked and filled in: what happens to each leaf."""

    old: ModelConfig
    config: ModelConfig
    """Of the result."""
    indices: dict[str, np.ndarray]
    """Letter -> increasing indices, [L' X] for N, K and F. A letter whose axis stays as it is is absent."""
    partners: np.ndarray | None
    merge: float
    factors: dict[str, np.ndarray]
    """Path -> what the leaf is multiplied by, [L'] or a number."""

    @classmethod
    def of(cls, config: ModelConfig, kept: Kept) -> Plan:
        """The plan of a request.

        Raises:
          ConfigError: as `keep`.
        """
        L, num_heads, ff_width = config.num_layers, config.num_heads, config.ff_width
        layers = _indices("layers", kept.layers, L)
        heads, order = _sorted_rows("heads", kept.heads, layers, L, num_heads)
        neurons, _ = _sorted_rows("neurons", kept.neurons, layers, L, ff_width)
        channels = _indices("channels", kept.channels, config.width)
        groups = _groups(heads, config)
        if heads.shape[1] < num_heads and config.position == "alibi":
            raise ConfigError("ALiBi's slopes follow from the number of heads, so that none can go; prune neurons, channels or layers")
        partners = None
        if kept.partners is not None and kept.merge and order is not None:
            partners = np.take_along_axis(kept.partners[layers], order, 1)
        new = replace(
            config, num_layers=len(layers), width=len(channels), num_heads=heads.shape[1], num_kv_heads=groups.shape[1],
            ff_width=neurons.shape[1], layer_pattern=_pattern(config, layers),
        )  # fmt: skip
        new, factors = _rescaled(config, new)
        for path, ratio in (kept.mend or {}).items():
            factors[path] = factors.get(path, np.ones(())) * (np.asarray(ratio)[layers] if np.ndim(ratio) else np.asarray(ratio))
        stays = {"L": layers, "D": channels, "N": heads, "K": groups, "F": neurons}
        whole = {"L": L, "D": config.width, "N": num_heads, "K": config.num_kv_heads, "F": ff_width}
        indices = {letter: rows for letter, rows in stays.items() if rows.shape[-1] < whole[letter]}
        return cls(config, new, indices, partners, kept.merge, factors)

    def changes(self, path: str) -> bool:
        """Whether the leaf there becomes another one."""
        return path in self.factors or not self.indices.keys().isdisjoint(dims_of(path, self.old))

    def apply(self, path: str, leaf: Any, layer: int | None = None) -> Any:
        """The new leaf of an old one; the very leaf where nothing changes.

        Args:
          layer: of the result; the leaf then holds its old layer alone, [1 …], and so does the new one.
        """
        dims = dims_of(path, self.old)
        rows = slice(None) if layer is None else slice(layer, layer + 1)
        if layer is None and "L" in self.indices and dims[0] == "L":
            leaf = _take(leaf, self.indices["L"], 0)
        old = leaf
        for axis, letter in enumerate(dims):
            if letter in self.indices and letter != "L":
                index = self.indices[letter]
                leaf = _take(leaf, index if index.ndim == 1 else index[rows], axis)
        if self.partners is not None and path.startswith("layers/attention/") and (dims[-2] == "N" or self._own_keys(dims)):
            leaf = self._merged(leaf, old, dims, rows)
        if path in self.factors:
            factor = self.factors[path]
            leaf = _multiplied(leaf, factor[rows] if factor.ndim else factor, plus_one=self.old.norm_plus_one and path.endswith("/scale"))
        return leaf

    def _own_keys(self, dims: list[str]) -> bool:
        """Whether a leaf holds keys or values that no other head reads."""
        return dims[-2] == "K" and self.old.group_size == 1

    def _merged(self, leaf: Any, old: Any, dims: list[str], rows: slice) -> Any:
        """head + merge · (head − partner) of a projection into heads."""
        assert self.partners is not None
        other = _take(old, self.partners[rows], len(dims) - 2)
        if "D" in dims and "D" in self.indices:
            other = _take(other, self.indices["D"], dims.index("D"))
        mine, theirs = leaf.astype(np.float32), other.astype(np.float32)
        return (mine + self.merge * (mine - theirs)).astype(leaf.dtype)


def _indices(name: str, given: Any, size: int) -> np.ndarray:
    """One axis's indices, sorted."""
    if given is None:
        return np.arange(size)
    index = np.asarray(given)
    if index.ndim != 1 or not index.size or index.dtype.kind not in "iu":
        raise ConfigError(f"{name} to keep are a list of at least one whole number, and {given!r} was given")
    if index.min() < 0 or index.max() >= size:
        raise ConfigError(f"{name} to keep include {index[(index < 0) | (index >= size)][0]}; the model has 0 to {size - 1}")
    if len(np.unique(index)) < len(index):
        raise ConfigError(f"{name} to keep name one twice, and nothing can be kept twice: {sorted(index.tolist())}")
    return np.sort(index)


def _sorted_rows(name: str, given: Any, layers: np.ndarray, num_layers: int, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(indices of each kept layer [L' X], the order that sorts what was given; None where nothing was)."""
    if given is None:
        return np.broadcast_to(np.arange(size), (len(layers), size)), None
    rows = np.asarray(given)
    rows = np.broadcast_to(rows, (num_layers, len(rows))) if rows.ndim == 1 else rows
    if rows.ndim != 2 or len(rows) != num_layers:
        raise ConfigError(f"{name} to keep are one list, or one for each of the {num_layers} layers, and their shape is {rows.shape}")
    index = np.stack([_indices(f"{name} of layer {layer}", rows[layer], size) for layer in layers])
    return index, np.argsort(rows[layers], axis=1)


def _groups(heads: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Key/value heads that the query heads of each layer read [L' K'].

    Raises:
      ConfigError: unlike groups.
    """
    counts = np.stack([np.bincount(row // config.group_size, minlength=config.num_kv_heads) for row in heads])
    number = {int((row > 0).sum()) for row in counts}
    each = {int(count) for count in counts.ravel() if count}
    if len(number) > 1 or len(each) > 1:
        raise ConfigError(
            f"heads to keep leave {', '.join(map(str, sorted(each)))} in a group, and {', '.join(map(str, sorted(number)))} groups in a "
            f"layer; keep equally many of each group of {config.group_size}, and equally many groups in each layer"
        )
    return np.stack([np.flatnonzero(row) for row in counts])


def _pattern(config: ModelConfig, layers: np.ndarray) -> tuple[LayerKind, ...]:
    """The shortest pattern in which every kept layer is of the kind that it was."""
    if len(layers) == config.num_layers:
        return config.layer_pattern
    kinds = [config.kind(int(layer)) for layer in layers]
    period = next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))
    return tuple(kinds[:period])


def _rescaled(old: ModelConfig, new: ModelConfig) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """An embedding scale of D^½ written for the new width, and what that takes of the params."""
    if new.width == old.width or not math.isclose(old.embedding_scale, old.width**0.5, rel_tol=1e-9):
        return new, {}
    factor = math.sqrt(old.width / new.width)
    new = replace(new, embedding_scale=new.width**0.5)
    factors = {"embed/tokens": np.array(factor)}
    if old.tied_embeddings and old.final_norm:
        factors |= {f"final_norm/{name}": np.array(1 / factor) for name in ("scale", "bias")}
    elif old.tied_embeddings:
        new = replace(new, logit_scale=new.logit_scale / factor)
    return new, factors


def _take(leaf: Any, index: np.ndarray, axis: int) -> Any:
    """Entries along one axis; an index of two dimensions has a row for each entry of axis 0."""
    if isinstance(leaf, np.ndarray):
        if index.ndim == 1:
            return np.take(leaf, index, axis)
        return np.stack([np.take(one, row, axis - 1) for one, row in zip(leaf, index, strict=True)])
    if index.ndim == 1:
        return jnp.take(leaf, index, axis)
    return jax.vmap(lambda one, row: jnp.take(one, row, axis - 1))(leaf, jnp.asarray(index))


def _multiplied(leaf: Any, factor: np.ndarray, *, plus_one: bool) -> Any:
    """In float32, cast back; `plus_one`: of 1 + leaf."""
    one = 1.0 if plus_one else 0.0
    factor = factor.astype(np.float32).reshape(factor.shape + (1,) * (len(leaf.shape) - factor.ndim))
    return ((leaf.astype(np.float32) + one) * factor - one).astype(leaf.dtype)
