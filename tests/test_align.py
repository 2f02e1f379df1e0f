"""Positions by shared bytes, teachers' rows at the target's positions, and one teacher of several.

The FuseLLM card's oracles 3, 4, 7 and 9; 1 and 2 are in tests/test_align_dtw.py, 3 for vocabularies in tests/test_align_vocab.py.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.align import fuse, spans
from jaxllm.align.project import project
from jaxllm.config import ConfigError
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.taught import TopK


class Words:
    """A tokenizer of given pieces, the longest first; bos, eos and padding before them; bytes that no piece begins with after them."""

    bos_id, eos_id, pad_id = 0, 1, 2
    chat_template = None

    def __init__(self, pieces: Sequence[str]) -> None:
        self.fingerprint = repr(pieces)
        self._bytes = [b"", b"", b"", *(piece.encode() for piece in pieces), *(bytes([byte]) for byte in range(256))]
        self.num_vocab = len(self._bytes)
        self._longest_first = sorted(range(3, self.num_vocab), key=lambda id: -len(self._bytes[id]))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        data, ids = text.encode(), list[int]()
        while data:
            ids.append(next(id for id in self._longest_first if data.startswith(self._bytes[id])))
            data = data[len(self._bytes[ids[-1]]) :]
        return ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        return self._bytes[id]

    def save(self, folder: Path) -> None: ...


FIRST = Words(["I", " love", " to", "ken", "ization", "!", " gets", "the", "th", " ", "ab", "éa"])
SECOND = Words(["I", " love", " token", "ization", "!", " get", "s", " the", "a", "bé", "é"])
WORDS = st.lists(st.sampled_from(["I", " love", " token", "ization", "!", " gets", "the ", "ab", "é", "éab", " ", "x"]), max_size=12)


@cache
def with_space_before(byte_fallback: bool = True) -> tokenizers.SentencePiece:
    """As Llama's: a space before the text, byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat gets the token", "I love tokenization", "a b"] * 30), model_writer=model, vocab_size=300,
        model_type="bpe", byte_fallback=byte_fallback, hard_vocab_limit=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    return tokenizers.SentencePiece(model.getvalue())


def aligned(target: Any, source: Any, text: str, *, ends: bool = False) -> tuple[spans.Spans, spans.Spans]:
    """Spans of `text` under both, with bos and eos around it if asked."""

    def located(tokenizer: Any) -> spans.Spans:
        ids = tokenizer.encode(text)
        return spans.locate(tokenizer, [tokenizer.bos_id, *ids, tokenizer.eos_id] if ends else ids, text)

    return located(target), located(source)


# ----------------------------------------------------------------------------------------------- spans


def test_the_cards_example_maps_groups_of_tokens():
    target, source = aligned(SECOND, FIRST, "I love tokenization!")
    assert spans.groups(target, source).sources() == [[0], [1], [2, 3], [4], [5]]
    assert spans.groups(source, target).sources() == [[0], [1], [2], [2], [3], [4]]
    assert spans.rows(target, source).source.tolist() == [0, 1, 3, 4, 5]
    assert spans.rows(source, target).source.tolist() == [0, 1, -1, 2, 3, 4]


def test_get_within_gets_has_no_row_and_s_has_the_one_of_gets():
    target, source = aligned(SECOND, FIRST, " gets")
    assert spans.groups(target, source).sources() == [[0], [0]]
    assert spans.rows(target, source).source.tolist() == [-1, 0]


def read_so_far(tokenizer: Any, ids: list[int], space_before: bool) -> list[tuple[bytes, int]]:
    """What a row has read: bytes of the text, and how many special tokens since."""
    out, data, since = [], b"", 0
    for id in ids:
        piece = tokenizer.token_bytes(id)
        had, data = data, data + piece
        begun = len(data) > space_before
        since = since + 1 if not piece else 0 if begun and data != had else since
        out.append((data[space_before:], since))
    return out


@given(WORDS, st.booleans())
@settings(deadline=None, max_examples=80)
def test_a_row_is_the_one_that_has_read_the_same(parts: list[str], ends: bool):
    text = "".join(parts)
    spaced = with_space_before()
    for (a, b), one in product([(FIRST, SECOND), (SECOND, spaced), (spaced, FIRST), (tokenizers.ByteTokenizer(), spaced)], (0, 1)):
        target, source = (a, b) if one else (b, a)
        ids = [[t.bos_id, *t.encode(text), t.eos_id] if ends else t.encode(text) for t in (target, source)]
        ours, theirs = (read_so_far(t, i, t is spaced) for t, i in zip((target, source), ids, strict=True))
        alike = [[j for j, row in enumerate(theirs) if row == mine] for mine in ours]
        expected = [([-1] * len(ours) + found)[-1 - ours[i + 1 :].count(ours[i])] for i, found in enumerate(alike)]
        rows = spans.rows(*(spans.locate(t, i, text) for t, i in zip((target, source), ids, strict=True)))
        assert rows.source.tolist() == expected
        assert rows.accepted.tolist() == [j >= 0 for j in expected]


@given(WORDS, st.booleans())
@settings(deadline=None, max_examples=60)
def test_every_byte_is_in_one_group_on_either_side(parts: list[str], ends: bool):
    text = "".join(parts)
    for target, source in ((FIRST, SECOND), (SECOND, with_space_before()), (tokenizers.ByteTokenizer(), FIRST)):
        sides = aligned(target, source, text, ends=ends)
        found = spans.groups(*sides)
        cuts = [side.bounds[edges] for side, edges in zip(sides, found, strict=True)]
        assert cuts[0].tolist() == cuts[1].tolist()  # groups cover the same bytes
        assert cuts[0][0] == 0 and cuts[0][-1] == len(text.encode())
        assert [edges[-1] for edges in found] == [len(side.kinds) for side in sides]  # and all tokens
        inside = [set(side.bounds.tolist()) for side in sides]
        assert set(cuts[0].tolist()) == inside[0] & inside[1]  # and could not be smaller


@given(WORDS, st.booleans())
@settings(deadline=None, max_examples=30)
def test_oracle_3_identical_tokenizers_align_one_to_one(parts: list[str], ends: bool):
    text = "".join(parts)
    for tokenizer in (FIRST, with_space_before(), tokenizers.ByteTokenizer()):
        sides = aligned(tokenizer, tokenizer, text, ends=ends)
        accepted, source = spans.rows(*sides)
        assert accepted.all() and source.tolist() == list(range(len(sides[0].kinds)))


def test_byte_fallback_is_bytes_and_a_space_before_the_text_is_none():
    spaced = with_space_before()
    ids = spaced.encode("é the")
    assert b"".join(map(spaced.token_bytes, ids)) == " é the".encode()
    assert spans.locate(spaced, ids, "é the").bounds.tolist() == [0, 0, 1, 2, 6]
    assert spans.locate(spaced, spaced.encode(" a"), " a").bounds[-1] == 2


def test_the_row_that_has_read_a_space_of_sentencepieces_own_is_the_one_before_the_text():
    spaced = with_space_before()
    ids = spaced.encode("xyz")
    assert spaced.token_bytes(ids[0]) == b" " and len(ids) == 4
    theirs = spans.locate(spaced, [spaced.bos_id, *ids], "xyz")
    ours = spans.locate(FIRST, [FIRST.bos_id, *FIRST.encode("xyz")], "xyz")
    assert spans.rows(ours, theirs).source.tolist() == [1, 2, 3, 4]
    assert spans.rows(theirs, ours).source.tolist() == [-1, 0, 1, 2, 3]  # before its own space the other has no row


def test_special_tokens_go_by_role_and_others_have_no_partner():
    text = "I love"
    eos = spans.locate(FIRST, [0, *FIRST.encode(text), 1, 2], text)
    byte = tokenizers.ByteTokenizer()
    assert spans.rows(eos, spans.locate(byte, [256, *byte.encode(text), 257, 258], text)).source.tolist() == [0, 1, 6, 7, 8]
    assert spans.rows(eos, spans.locate(byte, byte.encode(text), text)).source.tolist() == [-1, 0, 5, -1, -1]
    marker = Words([""])  # id 3 spells nothing and has no role
    chat = spans.locate(marker, [3, *marker.encode("I l"), 3, *marker.encode("ove")], text)
    assert spans.rows(chat, eos).source.tolist() == [-1, 1, -1, -1, -1, -1, -1, 2]
    assert spans.rows(chat, chat).source.tolist() == [-1, 1, 2, 3, -1, 5, 6, 7]


def test_tokens_that_spell_another_text_are_refused_or_skipped():
    ids = FIRST.encode("I love the")
    with pytest.raises(ConfigError, match=r"differ from byte 2 on, 'I love the' for the text's 'I Love the'.*changed='skip'"):
        spans.locate(FIRST, ids, "I Love the")
    assert spans.locate(FIRST, ids, "I Love the", changed="skip").bounds.tolist() == [0, 1, 6, 7, 10]
    with pytest.raises(ConfigError, match="differ from byte 6 on, 'I love' for the text's 'I love the'"):
        spans.locate(FIRST, FIRST.encode("I love"), "I love the")
    cut = spans.locate(FIRST, FIRST.encode("I love"), "I love the", changed="skip")
    whole = spans.locate(SECOND, SECOND.encode("I love the"), "I love the")
    assert spans.rows(whole, cut).source.tolist() == [0, 1, -1]
    assert spans.groups(whole, cut).target.tolist() == [0, 1, 2, 3] and spans.groups(whole, cut).source.tolist() == [0, 1, 2, 2]
    byte = tokenizers.ByteTokenizer()
    assert spans.locate(byte, byte.encode("aXYb"), "azzzb", changed="skip").bounds.tolist() == [0, 1, -1, 4, 5]
    unknown = with_space_before(byte_fallback=False)
    assert b"".join(map(unknown.token_bytes, unknown.encode("a\u4e00b"))) == b" ab"
    located = spans.locate(unknown, unknown.encode("a\u4e00b"), "a\u4e00b", changed="skip")
    assert located.bounds.tolist()[-3:] == [1, 4, 5] and located.kinds.tolist()[-2:] == [2, 0]
    assert spans.rows(spans.locate(byte, byte.encode("a\u4e00b"), "a\u4e00b"), located).accepted.tolist() == [
        True,
        False,
        False,
        False,
        True,
    ]
    with pytest.raises(ConfigError, match="did you mean 'skip'"):
        spans.locate(byte, [97], "a", changed="skp")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="0 to 258"):
        spans.locate(byte, [259], "a")


# --------------------------------------------------------------------------------------------- project


def a_teacher(rng: np.random.Generator, rows: int, vocab: int, k: int) -> tuple[TopK, np.ndarray]:
    """Top k of random distributions, and those with what is not in the top k left out, float64."""
    p = rng.dirichlet(np.full(vocab, 0.3), rows)
    ids = np.argsort(-p, axis=1)[:, :k]
    kept = np.take_along_axis(p, ids, axis=1)
    dense = np.zeros_like(p)
    np.put_along_axis(dense, ids, kept, axis=1)
    return TopK(ids.astype(np.int32), np.log(kept).astype(np.float32), (1.0 - kept.sum(1)).astype(np.float32)), dense


def dense_of(top: TopK, vocab: int) -> np.ndarray:
    out = np.zeros((len(top.ids), vocab))
    for row, (ids, logp) in enumerate(zip(top.ids, top.logp, strict=True)):
        for id, value in zip(ids.tolist(), logp.astype(np.float64), strict=True):
            assert value == -np.inf or out[row, id] == 0.0, "an id twice"
            out[row, id] += np.exp(value)
    return out


@given(st.data(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_rows_are_those_of_a_dense_matrix_product(data: st.DataObject, seed: int):
    rng, draw = np.random.default_rng(seed), data.draw
    num_source, num_target, k, keep = (draw(st.integers(1, 7)) for _ in range(4))
    top, dense = a_teacher(rng, num_source, 9, k)
    vocab = rng.integers(-1, 6, 9).astype(np.int32)
    index = rng.integers(-1, num_source, num_target).astype(np.int32)
    rows, ids = spans.Rows(index >= 0, index), rng.integers(0, 6, num_target)
    highest, renormalise, empty = (draw(st.booleans()) for _ in range(3))
    out = project(
        top, rows, vocab, ids, k=keep, collisions="highest" if highest else "sum", unmapped="renormalise" if renormalise else "tail",
        rejected="empty" if empty else "one_hot",
    )  # fmt: skip
    assert [x.dtype for x in out] == [np.int32, np.float32, np.float32] and out.ids.shape == (num_target, keep)
    found = dense_of(out, 6)
    for i in range(num_target):
        expected = np.zeros(6)
        for id in range(9) if index[i] >= 0 else ():
            if vocab[id] >= 0:
                mass = dense[index[i], id]
                expected[vocab[id]] = max(expected[vocab[id]], mass) if highest else expected[vocab[id]] + mass
        expected[np.argsort(-expected, kind="stable")[keep:]] = 0.0
        if renormalise and expected.sum() > 0:
            expected /= expected.sum()
        elif (renormalise or index[i] < 0) and not empty and i + 1 < num_target:
            expected = np.eye(6)[ids[i + 1]]
        np.testing.assert_allclose(found[i], expected, atol=1e-6)
        np.testing.assert_allclose(out.tail[i], 1.0 - expected.sum(), atol=1e-6)
    assert np.array_equal(out.logp, -np.sort(-out.logp, axis=1))


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from(["sum", "highest"]), st.sampled_from(["tail", "renormalise"]))
@settings(deadline=None, max_examples=60)
def test_oracle_4_rows_sum_to_one_with_at_most_k_entries(seed: int, k: int, collisions: Any, unmapped: Any):
    rng = np.random.default_rng(seed)
    top, _ = a_teacher(rng, 5, 30, 6)
    rows = spans.Rows(np.array([True, False, True, True]), np.array([0, -1, 2, 4], np.int32))
    out = project(top, rows, rng.integers(-1, 12, 30), [1, 2, 3, 4], k=k, collisions=collisions, unmapped=unmapped)
    np.testing.assert_allclose(np.exp(out.logp.astype(np.float64)).sum(1) + out.tail, 1.0, atol=1e-5)
    assert out.logp.shape == (4, k) and (unmapped == "tail" or np.all(out.tail[:3] == 0))


@pytest.mark.parametrize("collisions", ["sum", "highest"])
def test_oracle_3_an_identity_gives_the_source_renormalised(collisions: Any):
    top, dense = a_teacher(np.random.default_rng(4), 6, 40, 10)
    rows, same = spans.Rows(np.ones(6, bool), np.arange(6, dtype=np.int32)), np.arange(40)
    out = project(top, rows, same, np.arange(6), collisions=collisions, unmapped="renormalise")
    assert out.ids.tolist() == top.ids.tolist() and not out.tail.any()
    logits = top.logp.astype(np.float64)  # the released code: a softmax over what was stored
    np.testing.assert_allclose(out.logp, logits - np.log(np.exp(logits).sum(1, keepdims=True)), rtol=3e-7, atol=3e-7)
    out = project(top, rows, same, np.arange(6), collisions=collisions)
    assert out.ids.tolist() == top.ids.tolist()
    np.testing.assert_allclose(out.logp, top.logp, rtol=3e-7, atol=3e-7)
    np.testing.assert_allclose(out.tail, 1.0 - dense.sum(1), atol=3e-7)


@pytest.mark.parametrize("unmapped", ["tail", "renormalise"])
def test_oracle_9_a_rejected_row_is_one_hot_at_the_next_token(unmapped: Any):
    top, _ = a_teacher(np.random.default_rng(5), 2, 8, 3)
    rows, ids = spans.Rows(np.zeros(3, bool), np.full(3, -1, np.int32)), [5, 6, 7]
    out = project(top, rows, np.arange(8), ids, unmapped=unmapped)
    assert out.ids[:2, 0].tolist() == [6, 7] and out.logp[:2, 0].tolist() == [0.0, 0.0] and out.tail.tolist() == [0.0, 0.0, 1.0]
    assert np.all(np.isneginf(out.logp[:2, 1:])) and np.all(np.isneginf(out.logp[2]))
    out = project(top, rows, np.arange(8), ids, unmapped=unmapped, rejected="empty")
    assert out.tail.tolist() == [1.0, 1.0, 1.0] and np.all(np.isneginf(out.logp))


def test_what_is_no_distribution_or_of_another_text_is_refused():
    top, _ = a_teacher(np.random.default_rng(6), 2, 8, 3)
    rows = spans.Rows(np.ones(2, bool), np.arange(2, dtype=np.int32))
    with pytest.raises(ConfigError, match=r"row 0 sums to .*not logits"):
        project(top._replace(logp=top.logp + 3), rows, np.arange(8), [0, 1])
    with pytest.raises(ConfigError, match="row 1 sums to nan"):
        project(top._replace(tail=np.array([top.tail[0], np.nan])), rows, np.arange(8), [0, 1])
    with pytest.raises(ConfigError, match="must be"):
        project(top._replace(tail=top.tail[:1]), rows, np.arange(8), [0, 1])
    with pytest.raises(ConfigError, match="2 target tokens and target_ids has 3"):
        project(top, rows, np.arange(8), [0, 1, 2])
    with pytest.raises(ConfigError, match="source row 2 and source has 2"):
        project(top, rows._replace(source=np.array([0, 2])), np.arange(8), [0, 1])
    with pytest.raises(ConfigError, match=r"vocab maps 0 to 0"):
        project(top, rows, np.arange(1), [0, 1])
    with pytest.raises(ConfigError, match="did you mean 'highest'"):
        project(top, rows, np.arange(8), [0, 1], collisions="higest")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="k is 0"):
        project(top, rows, np.arange(8), [0, 1], k=0)


# ------------------------------------------------------------------------------------------------ fuse


def test_oracle_7_one_source_is_chosen_ties_go_first_and_equal_sources_weigh_the_same():
    assert fuse.min_ce(np.array([3.0])) == 0 and fuse.avg_ce(np.array([3.0])).tolist() == [1.0]
    top, _ = a_teacher(np.random.default_rng(8), 4, 20, 5)
    alone = fuse.mix([top], np.array([1.0]))
    assert alone.ids.tolist() == top.ids.tolist()
    np.testing.assert_allclose(alone.logp, top.logp, rtol=3e-7, atol=3e-7)
    np.testing.assert_allclose(alone.tail, top.tail, atol=3e-7)
    assert fuse.min_ce(np.array([[2.0, 3.0, 1.0], [2.0, 2.5, 1.0], [2.1, 2.5, 1.0]])).tolist() == [0, 1, 0]
    near = np.array([2.0, np.nextafter(2.0, 1.0)])  # which bfloat16 takes for a tie
    assert fuse.min_ce(near) == 1
    np.testing.assert_allclose(fuse.avg_ce(np.full((4, 2), 2.5)), 0.25, rtol=1e-15)
    np.testing.assert_allclose(fuse.avg_ce(np.array([2.0, 2.5, 3.0])), [0.3489, 0.3308, 0.3203], atol=1e-4)


def test_longer_tokens_cost_more_a_token_and_the_same_a_byte():
    nll, num_tokens = np.array([[30.0], [31.0]]), np.array([[10], [20]])
    per_token = fuse.cross_entropy(nll, num_tokens=num_tokens)
    per_byte = fuse.cross_entropy(nll, num_bytes=np.array([40]), per="byte")
    np.testing.assert_allclose(per_token, [[3.0], [1.55]])
    np.testing.assert_allclose(per_byte, [[0.75], [0.775]])
    assert fuse.min_ce(per_token).tolist() == [1] and fuse.min_ce(per_byte).tolist() == [0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_a_mix_is_the_weighted_sum_of_dense_rows(seed: int, sources: int, keep: int):
    rng = np.random.default_rng(seed)
    made = [a_teacher(rng, 3, 12, k) for k in rng.integers(1, 6, sources).tolist()]
    weights = fuse.avg_ce(rng.uniform(0, 4, sources))
    out = fuse.mix([top for top, _ in made], weights, keep)
    dense = sum(weight * p for weight, (_, p) in zip(weights, made, strict=True))
    expected = np.where(np.argsort(np.argsort(-dense, axis=1, kind="stable"), axis=1) < keep, dense, 0.0)
    np.testing.assert_allclose(dense_of(out, 12), expected, atol=1e-6)
    np.testing.assert_allclose(out.tail, 1.0 - expected.sum(1), atol=1e-6)


def test_sources_that_cannot_be_weighed_are_refused():
    for ce, message in ((np.array([1.0, np.nan]), r"\(1,\) is nan"), (np.zeros((0, 2)), "one source"), (np.array([-2.0]), "below 0")):
        with pytest.raises(ConfigError, match=message):
            fuse.avg_ce(ce)
    with pytest.raises(ConfigError, match="give num_bytes"):
        fuse.cross_entropy(np.ones(2), num_tokens=np.ones(2, int), per="byte")
    with pytest.raises(ConfigError, match="num_tokens holds 0"):
        fuse.cross_entropy(np.ones(2), num_tokens=np.zeros(2, int))
    top, _ = a_teacher(np.random.default_rng(9), 2, 8, 3)
    with pytest.raises(ConfigError, match="sum 1"):
        fuse.mix([top, top], np.array([1.0, 1.0]))
    with pytest.raises(ConfigError, match="2, 1 rows"):
        fuse.mix([top, TopK(*(field[:1] for field in top))], np.array([0.5, 0.5]))
