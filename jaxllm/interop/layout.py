"""Their tensors against our leaves: layouts with inverses, the shapes of our leaves, rows of both.

A `Layout` turns one of their tensors into one or more of our leaves (of one layer) and back, without
touching a bit. Letters: L layers, D width, N query heads, K key/value heads, H head size, F feed-forward
width, V vocabulary, T longest context.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxllm import tree
from jaxllm.config import ConfigError, ModelConfig, nearest
from jaxllm.tree import Tree

type Shape = tuple[int, ...]


class Layout(NamedTuple):
    """One tensor of theirs as our leaves, both ways."""

    to_ours: Callable[[np.ndarray, Sequence[Shape]], list[np.ndarray]]
    """(their tensor, our leaves' shapes) -> our leaves."""
    to_theirs: Callable[[Sequence[np.ndarray]], np.ndarray]
    """Our leaves -> their tensor."""


def _single(to_ours: Callable[[np.ndarray, Shape], np.ndarray], to_theirs: Callable[[np.ndarray], np.ndarray]) -> Layout:
    return Layout(lambda x, shapes: [to_ours(x, shapes[0])], lambda leaves: to_theirs(leaves[0]))


SAME = _single(lambda x, shape: x, lambda y: y)
"""Tables, norms, biases: no change."""
LINEAR = _single(lambda x, shape: x.T, lambda y: y.T)
"""`nn.Linear` [out, in] <-> [in, out]."""
LINEAR_TO_HEADS = _single(lambda x, shape: x.T.reshape(shape), lambda y: y.reshape(y.shape[0], -1).T)
"""`nn.Linear` [N·H, D] <-> [D N H]."""
LINEAR_FROM_HEADS = _single(lambda x, shape: x.T.reshape(shape), lambda y: y.reshape(-1, y.shape[-1]).T)
"""`nn.Linear` [D, N·H] <-> [N H D]."""
CONV_TO_HEADS = _single(lambda x, shape: x.reshape(shape), lambda y: y.reshape(y.shape[0], -1))
"""GPT's `Conv1D`, which keeps kernels as [in, out]: [D, N·H] <-> [D N H]."""
CONV_FROM_HEADS = _single(lambda x, shape: x.reshape(shape), lambda y: y.reshape(-1, y.shape[-1]))
"""`Conv1D` [N·H, D] <-> [N H D]."""
FLAT = _single(lambda x, shape: x.reshape(shape), lambda y: y.reshape(-1))
"""Biases and norms over heads: [N·H] <-> [N H]."""


def fused(part: Layout, axis: int) -> Layout:
    """Several leaves, each in the layout `part`, one after the other along their tensor's `axis`."""

    def to_ours(x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        ends = np.cumsum([theirs_shape(part, [shape])[axis] for shape in shapes])
        parts = np.split(x, ends[:-1], axis)
        return [part.to_ours(p, [shape])[0] for p, shape in zip(parts, shapes, strict=True)]

    return Layout(to_ours, lambda leaves: np.concatenate([part.to_theirs([leaf]) for leaf in leaves], axis))


def interleaved(part: Layout) -> Layout:
    """q, k and v fused head by head along their first axis, as in GPT-NeoX: [N 3 H, …]."""

    def to_ours(x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        heads, size = shapes[0][-2:]
        parts = x.reshape(heads, len(shapes), size, *x.shape[1:])
        return [part.to_ours(parts[:, i].reshape(heads * size, *x.shape[1:]), [shape])[0] for i, shape in enumerate(shapes)]

    def to_theirs(leaves: Sequence[np.ndarray]) -> np.ndarray:
        parts = [part.to_theirs([leaf]) for leaf in leaves]
        heads = leaves[0].shape[-2]
        stacked = np.stack([p.reshape(heads, -1, *p.shape[1:]) for p in parts], 1)
        return stacked.reshape(-1, *parts[0].shape[1:])

    return Layout(to_ours, to_theirs)


def theirs_shape(layout: Layout, shapes: Sequence[Shape]) -> Shape:
    """Shape of their tensor whose leaves have `shapes`; nothing of that size is allocated unless it is fused.

    >>> theirs_shape(LINEAR_TO_HEADS, [(48, 6, 16)])
    (96, 48)
    """
    return layout.to_theirs([np.broadcast_to(np.int8(0), shape) for shape in shapes]).shape


def leaf_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Path -> shape of every leaf of `config`'s params, the schema of `jaxllm/tree.py` in numbers (without cross-attention).

    >>> leaf_shapes(ModelConfig())['layers/attention/q/kernel']
    (2, 64, 4, 16)
    """
    c = config
    V, D, F, H = c.vocab_size, c.width, c.ff_width, c.head_size
    heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
    layer: dict[str, Shape] = {}
    for name, n in heads.items():
        layer[f"attention/{name}/kernel"] = (D, n, H)
        if c.qkv_bias:
            layer[f"attention/{name}/bias"] = (n, H)
        if c.qk_norm != "none" and name != "v":
            layer[f"attention/{name}_norm/scale"] = (H,) if c.qk_norm == "head" else (n, H)
    layer["attention/o/kernel"] = (c.num_heads, H, D)
    if c.attention_out_bias:
        layer["attention/o/bias"] = (D,)
    for name in ("gate", "up") if c.gated else ("up",):
        layer[f"mlp/{name}/kernel"] = (D, F)
        if c.mlp_bias:
            layer[f"mlp/{name}/bias"] = (F,)
    layer["mlp/down/kernel"] = (F, D)
    if c.mlp_bias:
        layer["mlp/down/bias"] = (D,)
    norms = []
    one_norm = c.block == "parallel" and c.parallel_norms == 1
    if c.norm_placement in ("before", "both"):
        norms += ["attention_norm"] if one_norm else ["attention_norm", "mlp_norm"]
    if c.norm_placement != "before":
        summed = c.block == "parallel" and c.norm_placement == "after_residual"
        norms += ["attention_post_norm"] if summed else ["attention_post_norm", "mlp_post_norm"]
    for name in norms:
        layer[f"{name}/scale"] = (D,)
        if c.norm_bias:
            layer[f"{name}/bias"] = (D,)
    shapes: dict[str, Shape] = {"embed/tokens": (V, D)}
    if c.position == "learned":
        shapes["embed/positions"] = (c.max_length, D)
    shapes |= {f"layers/{path}": (c.num_layers, *shape) for path, shape in layer.items()}
    if c.final_norm:
        shapes["final_norm/scale"] = (D,)
        if c.norm_bias:
            shapes["final_norm/bias"] = (D,)
    if not c.tied_embeddings:
        shapes["unembed/kernel"] = (V, D)
    return shapes


# ------------------------------------------------------------------------------------------ rows


class Row(NamedTuple):
    """One of their tensors, or one for each layer, where `{}` in the name is the layer number and our leaves are stacked."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout

    def names(self, num_layers: int) -> list[str]:
        """Their names, in layer order."""
        return [self.theirs.format(i) for i in range(num_layers)] if "{}" in self.theirs else [self.theirs]


BUFFERS = re.compile(r".*\.(attn|attention)\.(bias|masked_bias)|.*\.rotary_emb\.inv_freq")
"""Masks and frequencies that older checkpoints hold; they follow from the config."""


def applicable(rows: Sequence[Row], shapes: Mapping[str, Shape]) -> list[tuple[Row, list[Shape]]]:
    """Rows whose leaves exist, with the shapes of those leaves for one layer; every leaf must be in a row.

    Raises:
      ConfigError: a leaf of ours that the family has no tensor for.
    """
    present = [(row, [shapes[path][1 if "{}" in row.theirs else 0 :] for path in row.ours]) for row in rows if row.ours[0] in shapes]
    homeless = set(shapes) - {path for row, _ in present for path in row.ours}
    if homeless:
        raise ConfigError(f"this family has no tensor for our {', '.join(sorted(homeless))}")
    return present


def read_rows(rows: Sequence[Row], config: ModelConfig, tensors: Mapping[str, np.ndarray], prefix: str) -> Tree:
    """Their tensors as our tree; layers are stacked. Each of theirs must be used.

    Raises:
      ConfigError: up to ten lines of what is missing, surplus or of another shape.
    """
    bare = not any(name.startswith(prefix) for name in tensors)
    own_head = {row.theirs for row in rows if not row.theirs.startswith(prefix)}
    kept = {name: array for name, array in tensors.items() if not BUFFERS.fullmatch(name)}
    named = {prefix + name if bare and name not in own_head else name: array for name, array in kept.items()}
    if config.tied_embeddings:
        named = _drop_tied_head(rows, named)
    wanted = [(name, row, parts) for row, parts in applicable(rows, leaf_shapes(config)) for name in row.names(config.num_layers)]
    expected = {name: theirs_shape(row.layout, parts) for name, row, parts in wanted}
    surplus = [name for name in named if name not in expected]
    problems = [f"missing {name} {shape}{nearest(name, surplus)}" for name, shape in expected.items() if name not in named]
    problems += [f"surplus {name} {named[name].shape}{nearest(name, expected)}" for name in surplus]
    problems += [f"{name} has shape {named[name].shape}, expected {shape}"
                 for name, shape in expected.items() if name in named and named[name].shape != shape]  # fmt: skip
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ConfigError("the tensors do not fit the config: " + "; ".join(problems[:10] + more))
    layers: dict[str, list[np.ndarray]] = {}
    for name, row, parts in wanted:
        for path, leaf in zip(row.ours, row.layout.to_ours(named[name], parts), strict=True):
            layers.setdefault(path, []).append(leaf)
    leaves = {path: np.stack(parts) if path.startswith("layers/") else np.ascontiguousarray(parts[0]) for path, parts in layers.items()}
    return tree.from_items(list(leaves.items()))


def _drop_tied_head(rows: Sequence[Row], named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the head's tensor, which must equal the embedding's."""
    head, table = (next(row.theirs for row in rows if row.ours == (path,)) for path in ("unembed/kernel", "embed/tokens"))
    if head in named and table in named and not np.array_equal(named[head], named[table]):
        raise ConfigError(f"the config ties the embeddings, and '{head}' is not '{table}'; set tie_word_embeddings to false")
    return {name: array for name, array in named.items() if name != head}


def write_rows(rows: Sequence[Row], config: ModelConfig, params: Tree) -> dict[str, np.ndarray]:
    """Our tree as their tensors: the inverse of `read_rows`. Padded vocabulary rows are cut off.

    Raises:
      ConfigError: up to ten leaves that are missing, surplus or of another shape.
    """
    shapes, leaves = leaf_shapes(config), {path: np.asarray(leaf) for path, leaf in tree.items(params)}
    for path in ("embed/tokens", "unembed/kernel"):
        if path in leaves:
            leaves[path] = leaves[path][: config.vocab_size]
    expected = tree.from_items([(path, np.broadcast_to(np.int8(0), shape)) for path, shape in shapes.items()])
    problems = tree.structure_diff(expected, tree.from_items(list(leaves.items())))
    if problems:
        raise ConfigError("the params do not fit the config: " + "; ".join(problems[:10]))
    tensors = {}
    for row, _ in applicable(rows, shapes):
        for i, name in enumerate(row.names(config.num_layers)):
            own = [leaves[path][i] if "{}" in row.theirs else leaves[path] for path in row.ours]
            tensors[name] = np.ascontiguousarray(row.layout.to_theirs(own))
    return tensors
