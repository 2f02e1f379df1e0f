"""Texts, three tokenizers and made-up stored predictions: what the tests of fusion share."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.config import DataConfig, ModelConfig, SourceConfig, TokenizerConfig, TrainConfig
from jaxllm.data import batch as batches
from jaxllm.data import taught
from jaxllm.data.corpus import Corpus
from jaxllm.data.taught import Best, Meta
from jaxllm.fusing import FuseConfig
from jaxllm.fusing.shards import Fuser
from jaxllm.fusing.values import Job

NAMES = {"bytes": TokenizerConfig(kind="bytes"), "p400": TokenizerConfig(vocab_size=400), "p520": TokenizerConfig(vocab_size=520)}
TABLES = {"bytes": 331, "p400": 443, "p520": 521}
"""Entries of each teacher's table: prime, and more than tokens."""
MODEL = ModelConfig(num_layers=1, width=16, num_heads=2, num_kv_heads=2, head_size=8, ff_width=24, vocab_size=521, max_length=64)
K = 6
HERE = FuseConfig(k=K, workers=0)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, of 1.1 shards of bytes and of one; what a teacher of each tokenizer might say of them."""
    folder = tmp_path_factory.mktemp("fusing")
    (folder / "code.txt").write_text(inspect.getsource(argparse)[:72_000])
    (folder / "other.txt").write_text("\n\n".join(f"Übung {i}: naïve — “{'é' * (i % 5)}” 日本 {i * i}" for i in range(60)))
    for seed, name in enumerate(NAMES):
        make_up(folder / f"taught-{name}", config_of(folder, name), TABLES[name], seed)
    return folder


def make_up(out: Path, config: TrainConfig, num_vocab: int, seed: int) -> None:
    """Predictions at random, in the files that `jaxllm teach` would write; those of one seed are better in some documents."""
    dataset = batches.load(config.data, seed=0)
    meta = Meta(K, num_vocab, f"made up {seed}", f"fingerprint {seed}", dataset.tokenizer.fingerprint, 48)
    taught.write_meta(out, meta)
    for corpus in dataset.corpora:
        best = predictions(corpus, num_vocab, np.random.default_rng(seed))
        for number in range(taught.num_shards(corpus)):
            part = Best(*(field[number * taught.SHARD : (number + 1) * taught.SHARD] for field in best))
            taught.write_shard(taught.shard_file(out, corpus, number), meta.layout.encode(part))


def predictions(corpus: Corpus, num_vocab: int, rng: np.random.Generator) -> Best:
    """K distinct ids a row, among them mostly the one that comes; their probabilities and the tail from a softmax."""
    num = int(corpus.meta["num_tokens"])
    rows = np.arange(num)
    first, step = rng.integers(num_vocab, size=(num, 1)), rng.integers(1, num_vocab, size=(num, 1))
    ids = ((first + np.arange(K) * step) % num_vocab).astype(np.int32)
    following = np.append(corpus.tokens[1:], 0).astype(np.int32)
    column = rng.integers(K, size=num)
    put = ~(ids == following[:, None]).any(axis=1) & (rng.random(num) < 0.8)
    ids[rows[put], column[put]] = following[put]
    skill = np.repeat(rng.choice([0.0, 1.0, 2.0], size=len(corpus.offsets) - 1), np.diff(corpus.offsets))
    logits = 1.5 * rng.normal(size=(num, K + 1))
    hit = ids == following[:, None]
    logits[:, :K] += skill[:, None] * hit
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    actual = np.log(np.where(hit.any(axis=1), np.where(hit, p[:, :K], 0).sum(axis=1), 0.1 * p[:, K]))
    order = np.argsort(-p[:, :K], axis=1)
    best = Best(np.take_along_axis(ids, order, 1), np.log(np.take_along_axis(p, order, 1)).astype(np.float32),
                p[:, K].astype(np.float32), actual.astype(np.float32))  # fmt: skip
    last = corpus.offsets[1:] - 1
    for field, empty in zip(best, taught.nothing(taught.Layout(K, num_vocab), 1), strict=True):
        field[last] = empty
    return best


def config_of(folder: Path, name: str, **changes: Any) -> TrainConfig:
    texts = (
        SourceConfig(path=str(folder / "code.txt"), document="paragraph"),
        SourceConfig(path=str(folder / "other.txt"), document="line"),
    )
    data = DataConfig(
        sources=texts, tokenizer=NAMES[name], sequence_length=48, batch_size=4, held_out_fraction=0.05, cache_dir=str(folder / "cache")
    )
    return TrainConfig(model=MODEL, data=replace(data, **changes), num_steps=4, precision="float32")


def sources(folder: Path, *names: str) -> list[tuple[str, TrainConfig]]:
    """Arguments of `fuse_taught`."""
    return [(str(folder / f"taught-{name}"), config_of(folder, name)) for name in names]


def fused(folder: Path, target: str, *names: str, config: FuseConfig = HERE) -> Fuser:
    """One that writes nothing."""
    return Fuser(Job(config_of(folder, target), str(folder / "none"), tuple(sources(folder, *names)), config), lambda line: None)


def records(out: Path) -> dict[str, bytes]:
    """Shards and their marks."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.glob("*/*")) if path.suffix != ".tally"}
