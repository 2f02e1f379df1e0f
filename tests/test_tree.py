"""Trees by path: what is taken apart goes together again, first match wins, a pattern without a leaf is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import tree
from jaxllm.config import ConfigError

KEYS = st.sampled_from(["a", "b", "kernel", "q"])
LEAVES = st.integers()
TREES = st.dictionaries(
    KEYS, st.recursive(LEAVES, lambda node: st.dictionaries(KEYS, node, min_size=1, max_size=3), max_leaves=8), max_size=4
)

SHAPES: dict[str, Any] = {
    "embed": {"tokens": np.zeros((7, 4), np.float32)},
    "layers": {"attention": {"q": {"kernel": np.zeros((2, 4, 2, 2), np.float32), "bias": np.zeros((2, 2, 2), np.float32)}}},
    "final_norm": {"scale": np.zeros(4, np.float32)},
}


@settings(max_examples=30, deadline=None)
@given(value=TREES)
def test_items_and_back(value: tree.Tree):
    assert tree.from_items(tree.items(value)) == value
    assert tree.paths(value) == [path for path, _ in tree.items(value)]
    assert all(tree.get(value, path) == leaf for path, leaf in tree.items(value))


@settings(max_examples=30, deadline=None)
@given(value=TREES, kept=st.sets(st.integers(0, 20)))
def test_merge_puts_a_partition_together(value: tree.Tree, kept: set[int]):
    chosen = {path for i, path in enumerate(tree.paths(value)) if i in kept}
    ours, rest = tree.partition(value, chosen.__contains__)
    assert set(tree.paths(ours)) == chosen
    assert set(tree.paths(ours)) | set(tree.paths(rest)) == set(tree.paths(value))
    merged = tree.merge(ours, rest)
    assert merged == value
    assert list(tree.items(merged)) == list(tree.items(tree.merge(rest, ours)))  # who held what leaves no trace


def test_merge_refuses_a_leaf_in_both():
    with pytest.raises(AssertionError, match="more than one"):
        tree.merge({"a": {"b": 1}}, {"a": {"b": 2}})


@settings(max_examples=30, deadline=None)
@given(value=TREES)
def test_map_keeps_the_structure(value: tree.Tree):
    assert tree.map_with_path(lambda path, leaf: leaf, value) == value
    assert dict(tree.items(tree.map_with_path(lambda path, a, b: (path, a + b), value, value))) == {
        path: (path, 2 * leaf) for path, leaf in tree.items(value)
    }


def test_first_match_wins_over_the_whole_path():
    rules = [("layers/.*/bias", 1), (".*/bias", 2), ("embed", 3)]
    assert tree.match(rules, "layers/mlp/up/bias") == 1
    assert tree.match(rules, "final_norm/bias") == 2
    assert tree.match(rules, "embed/tokens") is None  # not a prefix
    assert tree.match(rules, "embed/tokens", 9) == 9
    assert tree.match([("a", 0)], "a", 5) == 0  # a false value is a value


def test_a_pattern_without_a_leaf_is_refused():
    tree.check_rules([(r".*/kernel", 1), (r"embed/tokens", 2)], SHAPES, "optim.freeze")
    with pytest.raises(
        ConfigError, match=re.escape("optim.freeze pattern 'embed/token' matches no parameter; did you mean 'embed/tokens'?")
    ):
        tree.check_rules([("embed/token", 1)], SHAPES, "optim.freeze")
    with pytest.raises(ConfigError, match=r"optim.freeze pattern '\(' is not a regular expression"):
        tree.check_rules([("(", 1)], SHAPES, "optim.freeze")
    with pytest.raises(ConfigError, match=r"the embeddings are tied: the one leaf is embed/tokens"):
        tree.check_rules([("unembed/kernel", 1)], SHAPES, "mesh.rules")


def test_get_names_the_nearest_path():
    with pytest.raises(KeyError, match="did you mean 'embed/tokens'"):
        tree.get(SHAPES, "embed/token")
    with pytest.raises(KeyError):
        tree.get(SHAPES, "embed/tokens/further")
    assert tree.get(SHAPES, "layers/attention/q") is SHAPES["layers"]["attention"]["q"]


def test_what_differs_between_two_trees_is_named():
    assert tree.structure_diff(SHAPES, SHAPES) == []
    other = {**SHAPES, "embed": {"token": np.zeros((7, 4))}, "final_norm": {"scale": np.zeros(5)}}
    assert tree.structure_diff(SHAPES, other) == [
        "missing embed/tokens (7, 4); did you mean 'embed/token'?",
        "surplus embed/token (7, 4)",
        "final_norm/scale has shape (5,), expected (4,)",
    ]


def test_counts():
    assert tree.count(SHAPES) == 7 * 4 + 2 * 4 * 2 * 2 + 2 * 2 * 2 + 4
    assert tree.num_bytes({"a": np.zeros((3, 2), np.float16), "b": np.zeros(5, np.int8)}) == 17


def test_summary_has_a_line_for_each_leaf_and_the_total():
    lines = tree.summary(SHAPES).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["embed/tokens", "7×4", "float32", "28"]
    assert lines[-1].split() == ["total", "72"]
