"""Params are a plain nested dict; this is everything that is done to one by path.

A path is the keys joined by '/': `layers/attention/q/kernel`. Everything selective in the project
(freezing, learning rates, decay, sharding, renames) is an ordered list `[(path regex, value)]`; the
first pattern that matches the whole path wins.

The schema of a decoder, with the dimension letters of `models/transformer.py`:

    embed/tokens [V D]   embed/positions [T D]   final_norm/{scale, bias} [D]
    unembed/kernel [V D]                                           (absent when embeddings are tied)
    layers/attention/{q, k, v}/{kernel [L D N|K H], bias [L N|K H]}
    layers/attention/o/{kernel [L N H D], bias [L D]}
    layers/attention/{q_norm, k_norm}/scale [L H] or [L N|K H]
    layers/mlp/{gate, up}/{kernel [L D F], bias [L F]}   layers/mlp/down/{kernel [L F D], bias [L D]}
    layers/{attention_norm, mlp_norm, attention_post_norm, mlp_post_norm}/{scale, bias} [L D]
    layers/cross_attention/… and layers/cross_attention_{norm, post_norm}/… like those of attention
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.config import ConfigError, nearest

type Tree = dict[str, Any]
type Rules[T] = Sequence[tuple[str, T]]


def items(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) pairs in key order. Anything that is not a dict is a leaf.

    >>> list(items({'a': {'b': 1, 'c': 2}}))
    [('a/b', 1), ('a/c', 2)]
    """
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from items(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def paths(tree: Tree) -> list[str]:
    """Every leaf's path."""
    return [path for path, _ in items(tree)]


def from_items(pairs: Iterator[tuple[str, Any]] | Sequence[tuple[str, Any]]) -> Tree:
    """The inverse of `items`.

    >>> from_items([('a/b', 1), ('a/c', 2)])
    {'a': {'b': 1, 'c': 2}}
    """
    tree: Tree = {}
    for path, leaf in pairs:
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def get(tree: Tree, path: str) -> Any:
    """The leaf or subtree at `path`.

    Raises:
      KeyError: no such path; the message names the nearest one.
    """
    node: Any = tree
    for key in path.split("/"):
        if not isinstance(node, dict) or key not in node:
            raise KeyError(f"no leaf '{path}'{nearest(path, paths(tree))}")
        node = node[key]
    return node


def map_with_path(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`f(path, leaf, *leaves of rest)` on every leaf, the structure kept."""
    others = [dict(items(t)) for t in rest]
    return from_items([(path, f(path, leaf, *(o[path] for o in others))) for path, leaf in items(tree)])


def match[T](rules: Rules[T], path: str, default: T | None = None) -> T | None:
    """The value of the first rule whose pattern matches the whole path, else `default`.

    >>> match([(r'.*/bias', 0), (r'.*', 1)], 'layers/mlp/up/bias')
    0
    """
    return next((value for pattern, value in rules if re.fullmatch(pattern, path)), default)


def check_rules(rules: Rules[Any], tree: Tree, what: str) -> None:
    """Refuse a user's pattern that matches no leaf: it is a typo, and would silently do nothing.

    Raises:
      ConfigError: names the pattern and the nearest paths.
    """
    leaves = paths(tree)
    for pattern, _ in rules:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{what} pattern '{pattern}' is not a regular expression: {error}") from None
        if not any(compiled.fullmatch(path) for path in leaves):
            tied = " (the embeddings are tied: the one leaf is embed/tokens)" if "unembed" in pattern else ""
            raise ConfigError(f"{what} pattern '{pattern}' matches no parameter{tied}{nearest(pattern, leaves)}")


def partition(tree: Tree, keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Split by path into (leaves to keep, the rest); a branch that loses all its leaves is absent.

    >>> partition({'a': 1, 'b': {'c': 2}}, lambda path: path == 'a')
    ({'a': 1}, {'b': {'c': 2}})
    """
    pairs = list(items(tree))
    return from_items([p for p in pairs if keep(p[0])]), from_items([p for p in pairs if not keep(p[0])])


def merge(*trees: Tree) -> Tree:
    """The union of trees with disjoint leaves: the inverse of `partition`.

    Key order is sorted, so that merging does not depend on who held what.
    """
    pairs = [pair for tree in trees for pair in items(tree)]
    assert len({path for path, _ in pairs}) == len(pairs), "merge: a leaf is in more than one tree"
    return from_items(sorted(pairs, key=lambda pair: pair[0]))


def structure_diff(expected: Tree, given: Tree) -> list[str]:
    """One line for each leaf that is missing, surplus or of another shape; empty when they agree."""
    want, have = dict(items(expected)), dict(items(given))
    lines = [f"missing {path} {tuple(np.shape(leaf))}{nearest(path, have)}" for path, leaf in want.items() if path not in have]
    lines += [f"surplus {path} {tuple(np.shape(leaf))}" for path, leaf in have.items() if path not in want]
    lines += [
        f"{path} has shape {tuple(np.shape(have[path]))}, expected {tuple(np.shape(leaf))}"
        for path, leaf in want.items()
        if path in have and np.shape(leaf) != np.shape(have[path])
    ]
    return lines


def count(tree: Tree) -> int:
    """Number of parameters; works on shapes from `jax.eval_shape` too."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    """Bytes of all leaves of any pytree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def summary(tree: Tree) -> str:
    """A table of path, shape, type and parameter count, with the total last."""
    rows = [(path, "×".join(map(str, leaf.shape)), str(leaf.dtype), f"{int(np.prod(leaf.shape)):,}") for path, leaf in items(tree)]
    rows.append(("total", "", "", f"{count(tree):,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"{path:<{widths[0]}}  {shape:>{widths[1]}}  {dtype:<{widths[2]}}  {number:>{widths[3]}}" for path, shape, dtype, number in rows
    )
