"""FuseLLM's dynamic programme against one written from its definition. The card's oracles 1 and 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.align import dtw, spans, vocab
from jaxllm.config import ConfigError
from jaxllm.data import tokenizer as tokenizers
from tests.test_align import FIRST, SECOND, with_space_before
from tests.test_align_vocab import edits

TOKENS = st.lists(st.sampled_from(["I", "love", "to", "ken", "token", "ization", "!", "gets", "get", "s", ""]), min_size=1, max_size=9)


def by_definition(source: Sequence[str], target: Sequence[str]) -> tuple[int, list[list[int]]]:
    """Cost and, for each target token, its source tokens: the whole table in float64, traced back from its end."""
    table = np.full((len(source) + 1, len(target) + 1), np.inf)
    table[0, 0] = 0
    for i, a in enumerate(source, 1):
        for j, b in enumerate(target, 1):
            table[i, j] = edits(a, b) + min(table[i - 1, j - 1], table[i - 1, j], table[i, j - 1])
    i, j = len(source), len(target)
    found: list[list[int]] = [[] for _ in target]
    table[0, 0] = np.inf
    while (i, j) != (0, 0):
        found[j - 1].insert(0, i - 1)
        if (i, j) == (1, 1):
            break
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]  # diagonal, up, left: the first of the least
        i, j = min(steps, key=lambda step: table[step])
    return int(table[-1, -1]), found


@pytest.mark.parametrize("a, b, distance", [("get", "gets", 1), ("utility", "util", 3), ("color", "colour", 1)])
def test_oracle_1_edit_distances(a: str, b: str, distance: int):
    assert dtw.warp([a], [b]).cost == dtw.warp([b], [a]).cost == distance


def test_oracle_2_one_token_over_two():
    path = dtw.warp(list(map(dtw.bare, ["Ġgets"])), list(map(dtw.bare, ["▁get", "s"])))
    assert (path.cost, path.sources()) == (4, [[0], [0]])


def test_oracle_2_a_wrong_split_by_ties():
    source, target = ["I", "Ġlove", "Ġto", "ken", "ization", "!"], ["▁I", "▁love", "▁token", "ization", "!"]
    path = dtw.warp(list(map(dtw.bare, source)), list(map(dtw.bare, target)))
    assert (path.cost, path.sources()) == (5, [[0], [1, 2], [3], [4], [5]])


@given(TOKENS, TOKENS)
@settings(deadline=None, max_examples=150)
def test_path_and_cost_are_those_of_the_definition(source: list[str], target: list[str]):
    path = dtw.warp(source, target)
    assert (path.cost, path.sources()) == by_definition(source, target)
    assert path.cost == sum(edits(source[j], target[i]) for j, i in zip(path.source.tolist(), path.target.tolist(), strict=True))


@given(TOKENS)
@settings(deadline=None, max_examples=30)
def test_equal_lists_are_paired_one_to_one_for_nothing(tokens: list[str]):
    path = dtw.warp(tokens, tokens)
    assert path.cost == 0 and path.source.tolist() == path.target.tolist() == list(range(len(tokens)))


@pytest.mark.parametrize("source, target", [([], ["a"]), (["a"], []), ([], [])])
def test_an_empty_list_has_an_empty_path(source: list[str], target: list[str]):
    path = dtw.warp(source, target)
    assert (path.cost, path.sources()) == (0, []) and not dtw.accept(path, np.zeros(0, bool), len(target)).accepted.any()


# ------------------------------------------------------------------------------------------ acceptance


def rows_of(target: Any, source: Any, text: str, how: Any, **options: Any) -> list[int]:
    options |= {"vocab": vocab.vocab_map(source, target)} if how == "soft" else {}
    return dtw.rows(target, target.encode(text), source, source.encode(text), how, **options).source.tolist()


def test_hard_takes_equal_strings_and_soft_what_the_map_pairs_too():
    text = "I love tokenization!"  # paired [[0], [1], [2, 3], …] or [[0], [1, 2], [3], …] by ties: see oracle 2
    assert rows_of(SECOND, FIRST, text, "hard") == [0, -1, -1, 4, 5]
    assert rows_of(SECOND, FIRST, text, "soft")[0] == 0
    ids = vocab.vocab_map(FIRST, SECOND)
    gets = FIRST.encode(" gets")[0]
    assert SECOND.token_bytes(int(ids[gets])) == b" get"  # one edit
    assert rows_of(SECOND, FIRST, " gets", "hard") == [-1, -1]
    assert rows_of(SECOND, FIRST, " gets", "soft") == [0, -1]


def test_strict_rejects_a_source_token_that_serves_two_as_shared_bytes_do():
    assert rows_of(SECOND, FIRST, "I gets", "soft") == [0, 1, -1]  # the row that the released code would take
    assert rows_of(SECOND, FIRST, "I gets", "soft", strict=True) == [0, -1, -1]
    by_bytes = spans.rows(*(spans.locate(t, t.encode("I gets"), "I gets") for t in (SECOND, FIRST)))
    assert by_bytes.source.tolist() == [0, -1, 1]


def test_markers_and_spaces_do_not_count_and_broken_characters_do():
    spaced = with_space_before()
    assert dtw.spellings(spaced, spaced.encode("the the")) == dtw.spellings(spaced, spaced.encode(" the the"))[-2:]
    byte = tokenizers.ByteTokenizer()
    assert dtw.spellings(byte, byte.encode("é x")) == ["\udcc3", "\udca9", "", "x"]
    assert dtw.warp(dtw.spellings(byte, byte.encode("é")), ["é"]).cost == 2


@pytest.mark.parametrize("how, options, message", [
    ("sft", {}, "did you mean 'soft'"), ("soft", {}, r"give vocab, from vocab_map"),
])  # fmt: skip
def test_what_is_missing_or_misspelt_is_named(how: Any, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        dtw.rows(SECOND, [3], FIRST, [3], how, **options)


@pytest.mark.parametrize("module, call", [
    ("numba", lambda: dtw.warp(["a"], ["b"])), ("rapidfuzz.process", lambda: dtw.warp(["a"], ["b"])),
    ("rapidfuzz.process", lambda: vocab.least_edits(["ab"], ["bc"])),
    ("rapidfuzz.distance", lambda: spans.locate(tokenizers.ByteTokenizer(), [97], "b", changed="skip")),
])  # fmt: skip
def test_without_its_package_a_function_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, module: str, call: Any):
    dtw._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs the package {module.partition('.')[0]}.*pip install \.\[align\]"):
        call()


def test_the_default_needs_neither_package():
    import subprocess

    code = (
        "import sys; sys.modules['numba'] = sys.modules['rapidfuzz'] = None\n"
        "from jaxllm.align import dtw, fuse, project, spans, vocab\n"
        "from jaxllm.data.tokenizer import ByteTokenizer as B\n"
        "s = spans.locate(B(), [104, 105], 'hi')\n"
        "assert spans.rows(s, s).source.tolist() == [0, 1] and vocab.vocab_map(B(), B(), 'exact')[7] == 7\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
