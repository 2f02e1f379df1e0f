"""Vocabulary maps between tokenizers, and every pair of six real ones. The FuseLLM card's oracle 3 for vocabularies."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.align import dtw, spans, vocab
from jaxllm.align.project import project
from jaxllm.config import ConfigError
from jaxllm.data import tokenizer as tokenizers
from jaxllm.interop.gguf_file import open_gguf
from jaxllm.interop.gguf_tokenizer import definition
from tests.test_align import FIRST, SECOND, Words, a_teacher, with_space_before

DATA = os.environ.get("JAXLLM_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="JAXLLM_DATA is not set: no folder of real vocabularies")
REAL = ("gpt-2", "mpt", "falcon", "bert-bge", "qwen2", "phi-3")


def spelled(target: Any, ids: np.ndarray) -> list[bytes | None]:
    return [target.token_bytes(int(id)) if id >= 0 else None for id in ids]


@cache
def edits(a: str, b: str) -> int:
    """Levenshtein distance, from its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


@pytest.mark.parametrize("mode", ["exact", "min_edit"])
def test_oracle_3_an_identical_tokenizer_maps_each_id_to_itself(mode: Any):
    for tokenizer in (FIRST, with_space_before(), tokenizers.ByteTokenizer()):
        assert vocab.vocab_map(tokenizer, tokenizer, mode).tolist() == list(range(tokenizer.num_vocab))


def test_equal_bytes_are_found_whatever_the_marker():
    source, target = Words([" the", "the", " a", "gone"]), with_space_before()
    out = vocab.vocab_map(source, target, "exact")
    ids = out[3:7].tolist()
    assert target.token_bytes(ids[0]) == b" the" and target._processor.id_to_piece(ids[0]) == "\u2581the"
    assert spelled(target, np.array(ids)) == [b" the", b"the" if ids[1] >= 0 else None, b" a", None]
    assert np.all(out[7:] >= 0)  # every byte


def test_byte_tokens_go_to_byte_tokens_and_pieces_to_pieces():
    spaced, byte = with_space_before(), tokenizers.ByteTokenizer()
    piece, fallback = (spaced._processor.piece_to_id(name) for name in ("e", "<0x65>"))
    assert {spaced.token_bytes(piece), spaced.token_bytes(fallback)} == {b"e"} and fallback < piece
    ours = vocab.vocab_map(spaced, byte, "exact")
    assert ours[piece] == ours[fallback] == 101 and ours[spaced._processor.piece_to_id("<0xC3>")] == 0xC3
    theirs = vocab.vocab_map(byte, spaced, "exact")
    assert theirs[101] == piece and theirs[0xC3] == spaced._processor.piece_to_id("<0xC3>")
    other = tokenizers.train_sentencepiece(["the cat gets the token " * 30], 290)
    both = vocab.vocab_map(spaced, other, "exact")
    assert both[piece] == other._processor.piece_to_id("e") and both[fallback] == other._processor.piece_to_id("<0x65>")


def test_special_tokens_go_by_role_and_never_by_distance():
    spaced, byte = with_space_before(), tokenizers.ByteTokenizer()
    assert spaced.pad_id is None
    for mode in ("exact", "min_edit"):
        out = vocab.vocab_map(byte, spaced, mode)  # type: ignore[arg-type]
        assert [out[256], out[257], out[258]] == [spaced.bos_id, spaced.eos_id, -1]
    one = Words(["</s>", "</", "s>", "<|im_end|>", "im_end"])
    two = Words(["</p>", "<|end|>", "im_endx"])
    out = vocab.vocab_map(one, two)[:8]
    assert out[[0, 1, 2]].tolist() == [0, 1, 2] and out[[3, 6]].tolist() == [-1, -1]
    assert spelled(two, out[[4, 7]]) == [b"</p>", b"im_endx"]


class Shared(Words):
    bos_id, eos_id, pad_id = 0, 0, 0


def test_a_token_with_several_roles_is_the_end_of_text():
    assert vocab.vocab_map(Shared(["a"]), Words(["b"]), "exact")[:3].tolist() == [1, -1, -1]


def test_nothing_beyond_ascii_is_mapped_by_distance():
    source, target = Words(["é", " naïve", "colour"]), Words([" naive", "color", "naïv", "colouré"])
    out = vocab.vocab_map(source, target)[3:6]
    assert spelled(target, out) == [None, None, b"color"]
    assert vocab.vocab_map(source, target, "exact")[3:6].tolist() == [-1, -1, -1]


PIECES = st.text("abc d", min_size=2, max_size=9)


@given(st.lists(PIECES, min_size=1, max_size=12), st.lists(PIECES, min_size=1, max_size=30))
@settings(deadline=None, max_examples=150)
def test_least_edits_are_those_of_brute_force_and_the_first_wins(strings: list[str], candidates: list[str]):
    expected = [min(range(len(candidates)), key=lambda i, s=string: (edits(s, candidates[i]), i)) for string in strings]
    assert vocab.least_edits(strings, candidates).tolist() == expected
    assert vocab.least_edits([], candidates).tolist() == []


def test_long_tokens_have_distances_beyond_a_byte():
    assert vocab.least_edits(["=" * 700], ["-" * 300, "=" * 300]).tolist() == [1]


def test_a_map_is_computed_once_for_a_pair_of_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = vocab.cached_vocab_map(FIRST, SECOND, cache_dir=str(tmp_path))
    assert first.tolist() == vocab.vocab_map(FIRST, SECOND).tolist()
    exact = vocab.cached_vocab_map(FIRST, SECOND, "exact", cache_dir=str(tmp_path))
    assert exact.tolist() == vocab.vocab_map(FIRST, SECOND, "exact").tolist() != first.tolist()
    assert vocab.cached_vocab_map(SECOND, FIRST, cache_dir=str(tmp_path)).shape == (SECOND.num_vocab,)
    monkeypatch.setattr(vocab, "vocab_map", None)  # nothing is computed again
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    assert vocab.cached_vocab_map(FIRST, SECOND).tolist() == first.tolist()


def test_another_mode_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'min_edit'"):
        vocab.vocab_map(FIRST, SECOND, "min_edits")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- real tokenizers


def real_tokenizer(name: str, folder: Path) -> tokenizers.HuggingFace:
    packed_file = Path(DATA) / "llama_cpp_vocabs" / f"ggml-vocab-{name}.gguf.gz"
    with gzip.open(packed_file) as packed, (folder / "x.gguf").open("wb") as file:
        shutil.copyfileobj(packed, file)
    made = definition(open_gguf(folder / "x.gguf").metadata)
    return tokenizers.HuggingFace(json.dumps(made.tokenizer), made.config)


@needs_data
def test_all_pairs_of_six_real_tokenizers(tmp_path: Path):
    real = {name: real_tokenizer(name, tmp_path) for name in REAL}
    strings = (Path(DATA) / "llama_cpp_vocabs" / "ggml-vocab-gpt-2.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lossless = "The quick brown fox. " + " ".join(strings)
    rng = np.random.default_rng(0)
    located = {name: spans.locate(t, t.encode(lossless), lossless, changed="skip") for name, t in real.items()}
    for a, b in product(REAL, REAL):
        target, source = located[a], located[b]
        rows, found = spans.rows(target, source), spans.groups(target, source)
        covered = [side.bounds[edges] for side, edges in zip((target, source), found, strict=True)]
        assert covered[0][:-1].tolist() == covered[1][:-1].tolist() and covered[0][-1] == covered[1][-1] == len(lossless.encode())
        assert rows.accepted.mean() > (0.3 if "bert-bge" in (a, b) else 0.6), (a, b, rows.accepted.mean())
        if a == b and a != "bert-bge":
            assert rows.source.tolist() == list(range(len(target.kinds)))
        ids = vocab.vocab_map(real[b], real[a], "exact")
        if a == b:
            assert ids.tolist() == list(range(real[a].num_vocab))
        some = rng.integers(0, len(ids), 2000)
        some = some[ids[some] >= 0]
        same = [real[b].token_bytes(x) == real[a].token_bytes(y) for x, y in zip(some.tolist(), ids[some].tolist(), strict=True)]
        assert len(some) > 100 and sum(not is_same for is_same in same) <= 3  # those are special tokens, by role
        top, _ = a_teacher(rng, len(source.kinds), 300, 10)
        top = top._replace(ids=rng.integers(0, real[b].num_vocab - 300) + top.ids)
        out = project(top, rows, ids, real[a].encode(lossless))
        np.testing.assert_allclose(np.exp(out.logp.astype(np.float64)).sum(1) + out.tail, 1.0, atol=1e-5)
        assert out.ids.max() < real[a].num_vocab
    ids = [real[name].encode(lossless) for name in ("gpt-2", "phi-3")]
    by_bytes = spans.rows(located["gpt-2"], located["phi-3"])
    by_strings = dtw.rows(real["gpt-2"], ids[0], real["phi-3"], ids[1], "hard", strict=True)
    assert by_bytes.accepted.mean() > by_strings.accepted.mean() > 0.3
