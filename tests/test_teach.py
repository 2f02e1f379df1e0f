"""`jaxllm teach`: records of a teacher's predictions, and how a student's batches find them again."""

from __future__ import annotations

import argparse
import inspect
import os
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import pretrained
from jaxllm.config import ConfigError, DataConfig, ModelConfig, SourceConfig, TokenizerConfig, TrainConfig
from jaxllm.contract import Out, Unembedding
from jaxllm.data import batch as batches
from jaxllm.data import taught
from jaxllm.data.packing import Packing
from jaxllm.data.position import Position
from jaxllm.data.taught import Best, Layout
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.losses.best import best_of
from jaxllm.models.transformer import decoder
from jaxllm.teach import TeachConfig, main, teach
from tests.observed import batch_of
from tests.runs import ROOT
from tests.test_pretrained import SOURCE, random_params

MODEL = ModelConfig(num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_size=4, ff_width=24, vocab_size=261, max_length=64)
K = 5
CONFIG = TeachConfig(k=K, batch_tokens=2048)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a little over two shards, a teacher, and what the teacher says of the text."""
    folder = tmp_path_factory.mktemp("teach")
    (folder / "text.txt").write_text((inspect.getsource(argparse) + inspect.getsource(typing))[:150_000])
    for name, seed in (("teacher", 0), ("other", 1)):
        pretrained.save(folder / name, MODEL, random_params(MODEL, seed=seed), ByteTokenizer(), source=SOURCE)
    teach(str(folder / "teacher"), target(folder), str(folder / "taught"), CONFIG)
    return folder


def target(folder: Path, **changes: Any) -> TrainConfig:
    data = DataConfig(
        sources=(SourceConfig(kind="text", path=str(folder / "text.txt"), document="paragraph"),), tokenizer=TokenizerConfig(kind="bytes"),
        sequence_length=32, batch_size=8, held_out_fraction=0.1, cache_dir=str(folder / "cache"),
    )  # fmt: skip
    return TrainConfig(model=MODEL, data=replace(data, **changes))


def first_batches(config: TrainConfig, out: Path, num: int) -> list[Any]:
    dataset = batches.load(config.data, seed=3, taught={"t": str(out)})
    items = dataset.read(Position(), lambda size: np.arange(size))
    found = [next(items).batch for _ in range(num)]
    items.close()  # type: ignore[attr-defined]
    return found


# ------------------------------------------------------------------------------------------- records


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(1, 70), st.integers(2, 1 << 20))
def test_a_record_keeps_ids_exactly_and_numbers_as_float16(data: Any, k: int, num_vocab: int) -> None:
    layout = Layout(k, num_vocab)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    best = Best(
        rng.integers(0, num_vocab, (7, k)).astype(np.int32),
        -20 * rng.random((7, k)).astype(np.float32),
        rng.random(7).astype(np.float32),
        -9 * rng.random(7).astype(np.float32),
    )
    best.ids[0], best.logp[1] = num_vocab - 1, -np.inf
    records = layout.encode(best)
    assert records.shape == (7, layout.num_bytes)
    again = layout.decode(records)
    np.testing.assert_array_equal(again.ids, best.ids)
    np.testing.assert_array_equal(again.logp, best.logp.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(again.tail, best.tail.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(again.actual, best.actual.astype(np.float16).astype(np.float32))


def test_64_tokens_take_under_300_bytes_at_any_vocabulary() -> None:
    assert max(Layout(64, num_vocab).num_bytes for num_vocab in (32_000, 49_152, 128_256, 256_000, 1 << 20)) < 300


def test_the_tail_is_the_mass_of_the_others_however_small() -> None:
    """Ties at the last place and a rest of 1e-12 included, where one minus the sum of the named would be noise."""
    logits = np.array([[[3.0, 1.0, 1.0, 1.0, 0.0, -2.0], [30.0, 29.0, 2.0, 1.0, 0.0, -9.0]]])

    plain = decoder(ModelConfig(width=6, vocab_size=6, num_heads=1, num_kv_heads=1, head_size=6, ff_width=6, num_layers=1))
    out = Out(jax.numpy.asarray(logits, jax.numpy.float32), {})
    head = Unembedding({"kernel": jax.numpy.eye(6)}, num_vocab=6)
    stub = plain._replace(apply=lambda *_, **__: out, unembed=lambda params: head)
    for k in (1, 2, 3, 6):
        ids, logp, tail, actual = best_of(stub, k)({}, batch_of(np.array([[2, 5]])))
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        order = -np.sort(-p, axis=-1)
        np.testing.assert_allclose(np.exp(logp), order[..., :k], rtol=1e-5)
        np.testing.assert_allclose(tail, order[..., k:].sum(-1), rtol=1e-4, atol=1e-30)
        np.testing.assert_allclose(actual, [[np.log(p[0, 0, 2]), np.log(p[0, 1, 5])]], rtol=1e-5)
        assert ids.shape == (1, 2, k)


# ------------------------------------------------------------------------------------------ teaching


def test_the_folder_says_what_the_teacher_says_document_by_document(place: Path) -> None:
    """Every position of random documents, against logits of the document alone, cut into windows of the context."""
    model = pretrained.load(place / "teacher")
    dataset = batches.load(target(place).data, seed=0)
    (corpus,) = dataset.corpora
    (records,) = taught.open_taught(place / "taught", [corpus], dataset.tokenizer)
    run = jax.jit(lambda params, tokens: model.lm.unembed(params).logits(model.lm.apply(params, tokens).hidden))
    rng = np.random.default_rng(0)
    sizes = np.diff(corpus.offsets)
    chosen = [*rng.choice(len(sizes), 12, replace=False), int(sizes.argmax()), len(sizes) - 1]
    over_border = int(np.searchsorted(corpus.offsets, taught.SHARD, side="right")) - 1
    for document in (*chosen, over_border):
        start, end = corpus.offsets[document : document + 2]
        got = records.at(np.arange(start, end))
        assert got.tail[-1] == 1 and np.all(np.isneginf(got.logp[-1])), "nothing follows a document's end"
        for begin in range(start, end - 1, 32):
            length = min(32, end - 1 - begin)
            tokens = np.zeros((1, 32), np.int32)
            tokens[0, :length] = corpus.tokens[begin : begin + length]
            logits = np.asarray(run(model.params, tokens), np.float64)[0, :length]
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            here = slice(begin - start, begin - start + length)
            np.testing.assert_allclose(got.logp[here], -np.sort(-logp)[:, :K], atol=3e-3)
            np.testing.assert_allclose(np.take_along_axis(logp, got.ids[here], 1), -np.sort(-logp)[:, :K], atol=1e-4)
            np.testing.assert_allclose(got.actual[here], logp[np.arange(length), corpus.tokens[begin + 1 : begin + 1 + length]], 1e-3, 5e-3)
            np.testing.assert_allclose(got.tail[here], 1 - np.exp(-np.sort(-logp)[:, :K]).sum(-1), atol=1e-3)


@pytest.mark.parametrize("packing", ["first_fit", "none"])
def test_a_batch_finds_what_the_teacher_says_of_that_batch(place: Path, packing: Packing) -> None:
    """With rows cut as the teacher's windows were: the stored predictions are those of the teacher on the very batch."""
    model = pretrained.load(place / "teacher")
    expect = jax.jit(best_of(model.lm, K))
    for batch in first_batches(target(place, packing=packing), place / "taught", 2):
        ids, logp, tail, _ = (np.asarray(x) for x in expect(model.params, batch))
        says = batch.loss_mask > 0
        assert says.any()
        assert batch.extras["t/ids"].shape == (8, 32, K)
        np.testing.assert_allclose(batch.extras["t/logp"][says], logp[says], atol=5e-3)
        np.testing.assert_allclose(batch.extras["t/tail"][says], tail[says], atol=1e-3)
        assert (batch.extras["t/ids"][says] == ids[says]).mean() > 0.99  # near ties may change places
        padding = batch.segment_ids == 0
        assert np.all(np.isneginf(batch.extras["t/logp"][padding])) and np.all(batch.extras["t/tail"][padding] == 1)


def test_rows_cut_anywhere_find_the_prediction_of_their_own_label(place: Path) -> None:
    """Concatenated rows cut documents where no window ends: a record is that of the flat position, so of the same next token."""
    dataset = batches.load(target(place).data, seed=0)
    (corpus,) = dataset.corpora
    (records,) = taught.open_taught(place / "taught", [corpus], dataset.tokenizer)
    whole, tokens = records.at(np.arange(len(corpus.tokens))), np.asarray(corpus.tokens)
    for batch in first_batches(target(place, packing="concatenate"), place / "taught", 1):
        for row in range(8):
            num = int((batch.segment_ids[row] == 1).sum())
            found = np.flatnonzero(np.all(np.lib.stride_tricks.sliding_window_view(tokens, num) == batch.tokens[row, :num], axis=1))
            assert len(found)  # the text repeats itself here and there
            assert any(np.array_equal(batch.extras["t/ids"][row, :num], whole.ids[begin : begin + num]) for begin in found)


def test_parts_make_the_same_folder(place: Path, tmp_path: Path) -> None:
    for part in ("1/2", "0/2"):
        teach(str(place / "teacher"), target(place), str(tmp_path / "out"), replace(CONFIG, part=part))
    assert contents(tmp_path / "out") == contents(place / "taught")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "meta.json"
    }


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_shard_is_named_and_made_again_alone(place: Path, tmp_path: Path, damage: str, capsys: Any) -> None:
    out = tmp_path / "out"
    shutil.copytree(place / "taught", out)
    files = sorted(out.rglob("*.bin"))
    assert len(files) > 2
    data = bytearray(files[1].read_bytes())
    data[1000] ^= 4
    files[1].write_bytes(data[:-7] if damage == "truncated" else data)
    if damage == "gone":
        files[1].unlink()
    reason = {"truncated": "bytes instead of", "flipped": "hash differs", "gone": "is missing"}[damage]
    with pytest.raises(ConfigError, match=rf"00001.bin {reason}|00001.bin has.*{reason}"):
        dataset = batches.load(target(place).data, seed=3, taught={"t": str(out)})
        dataset._rows.taught["t"][0].at(np.array([taught.SHARD]))  # type: ignore[union-attr]
    before = {path: path.stat().st_mtime_ns for path in files if path != files[1]}
    teach(str(place / "teacher"), target(place), str(out), CONFIG)
    assert contents(out) == contents(place / "taught")
    assert before == {path: path.stat().st_mtime_ns for path in before}, "whole shards are left alone"


def test_another_teacher_or_tokenizer_is_refused_with_both_fingerprints(place: Path, tmp_path: Path) -> None:
    from jaxllm import manifest

    teacher, other = (manifest.fingerprint(place / name) for name in ("teacher", "other"))
    with pytest.raises(ConfigError, match=rf"teacher_fingerprint was {teacher}, is {other}"):
        teach(str(place / "other"), target(place), str(place / "taught"), CONFIG)
    with pytest.raises(ConfigError, match="k was 5, is 6"):
        teach(str(place / "teacher"), target(place), str(place / "taught"), replace(CONFIG, k=6))
    pieces = target(place, tokenizer=TokenizerConfig(vocab_size=400))
    ours, theirs = batches.load(pieces.data, seed=0).tokenizer.fingerprint[:12], ByteTokenizer().fingerprint[:12]
    with pytest.raises(ConfigError, match=rf"{ours}.*{theirs}"):
        teach(str(place / "teacher"), pieces, str(tmp_path / "out"), CONFIG)
    with pytest.raises(ConfigError, match=rf"{theirs}.*{ours}"):
        batches.load(pieces.data, seed=0, taught={"t": str(place / "taught")})


def test_bad_input(place: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    teacher, run = str(place / "teacher"), lambda out="out", data={}, **flags: teach(  # type: ignore[misc]
        str(place / "teacher"), target(place, **data), str(tmp_path / out), TeachConfig(**flags)
    )  # fmt: skip
    load = lambda *words: main([teacher, "TARGET", *words], lambda name: target(place))
    cases: Sequence[tuple[Any, str]] = (
        (lambda: run(data={"sequence_length": 128}), "context is 64 tokens, and rows of 128.*--context 64"),
        (lambda: run(k=262), "--k is 262.*261 entries"),
        (lambda: run(out="mine"), "mine is not empty"),
        (lambda: run(part="2/2"), "--part is '2/2'"),
        (lambda: main(["a", "b"], lambda name: target(place)), "needs a teacher, a target and a folder"),
        (lambda: load(str(tmp_path / "out"), "--kk", "3"), "kk"),
        (lambda: batches.load(target(place).data, seed=0, taught={"t": str(tmp_path / "none")}), "nothing that jaxllm teach wrote"),
    )
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.fault
def test_kill_9_loses_no_shard(place: Path, tmp_path: Path) -> None:
    """Killed at the first shard's mark, and once more in the middle; the third run ends with the bytes of an unbroken one."""
    script = tmp_path / "target.py"
    script.write_text(f"from pathlib import Path\nfrom tests.test_teach import target\nconfig = target(Path({str(place)!r}))\n")
    command = [sys.executable, "-m", "jaxllm", "teach", str(place / "teacher"), str(script), str(tmp_path / "out"), "--k", str(K)]
    command += ["--batch_tokens", "2048"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAXLLM_CACHE": str(tmp_path / "cache")}
    for wanted in (1, 2):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 240
        while len([*(tmp_path / "out").glob("*/*.json")]) < wanted and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, process.stderr and process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, env=environment, capture_output=True, timeout=300).returncode == 0
    assert contents(tmp_path / "out") == contents(place / "taught")
