"""Hugging Face streaming: resumable at any batch, by re-reading part of a block."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from jaxllm.config import ConfigError, DataConfig, SourceConfig, TokenizerConfig
from jaxllm.data import batch as batches
from jaxllm.data.position import Position
from jaxllm.data.tokenizer import ByteTokenizer

pytest.importorskip("datasets", reason="datasets is not installed: pip install 'jaxllm[stream]'")

FIELDS = ("tokens", "labels", "loss_mask", "segment_ids", "positions", "source")
TEXTS = [f"{i:03d}" + "xyzw"[i % 4] * (i * 7 % 50) for i in range(60)]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return lambda **fields: DataConfig(
        sources=(SourceConfig(kind="hf_stream", path=str(path)),), cache_dir=str(tmp_path / "cache"),
        **{"tokenizer": TokenizerConfig(kind="bytes"), "sequence_length": 16, "batch_size": 3, "shuffle_buffer": 11,
           "held_out_fraction": 0.0, **fields},
    )  # fmt: skip


def take(config, num, position=Position(), rows=np.arange):
    reading = batches.load(config, seed=2).read(position, rows)
    items = list(itertools.islice(reading, num))
    reading.close()
    return items


def same(a, b):
    return a.batch_id == b.batch_id and all(np.array_equal(getattr(a.batch, name), getattr(b.batch, name)) for name in FIELDS)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"packing": "concatenate", "segment_mask": False},
        {"packing": "none"},
        {"shuffle": False},
        {"batch_ramp": ((5, 1), (5, 2)), "held_out_fraction": 0.2},
    ],
)
def test_resuming_anywhere_gives_the_same_batches(config, fields):
    whole = take(config(**fields), 70)  # about two epochs
    for step in (1, 13, 44):
        position = Position.from_json(json.loads(json.dumps(whole[step - 1].next_position.to_json())))
        part = take(config(**fields), 5, position)
        assert all(map(same, part, whole[step:]))
        (second,) = take(config(**fields), 1, part[-1].next_position)  # a second resume
        assert same(second, whole[step + 5])


def test_a_stream_holds_every_document_once_an_epoch(config):
    found = []
    for item in take(config(batch_size=1), 400):
        segments = item.batch.segment_ids
        found += [ByteTokenizer().decode(item.batch.labels[segments == n]) for n in range(1, segments.max() + 1)]
    counts = Counter(found)
    short = [text for text in TEXTS if len(text) < 16]
    # Rows stay open across the epochs' border, so a document may be ahead of, or behind, the others by one epoch or two.
    assert 6 > min(counts[text] for text in short) >= max(counts[text] for text in short) - 2 > 0
    assert [text for text in found if text in short][: len(short)] != short


def test_skipped_batches_are_read_and_dropped(config):
    plain = take(config(), 12)
    position = plain[3].next_position.skip(5, 8)
    items = take(config(), 4, position)
    assert [item.batch_id for item in items] == [4, 8, 9, 10]
    assert all(same(item, plain[item.batch_id]) for item in items)


def test_hosts_keep_their_own_rows(config):
    whole = take(config(batch_size=4), 8)
    halves = [take(config(batch_size=4), 8, rows=lambda size, h=h: np.arange(size)[h * size // 2 : (h + 1) * size // 2]) for h in range(2)]
    for item, *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(item.batch.tokens, np.concatenate([part.batch.tokens for part in parts]))


def test_the_head_gives_what_is_held_out(config):
    made = config(held_out_fraction=0.3)
    dataset = batches.load(made, seed=0)
    held = set(dataset.held_out_texts())
    assert 5 < len(held) < 40
    trained = b"".join(item.batch.labels[item.batch.loss_mask > 0].astype(np.uint16).tobytes() for item in take(made, 200))
    for text in TEXTS:
        assert (np.array([*text.encode()[:3]], np.uint16).tobytes() in trained) == (text not in held)
    assert dataset.num_rows(0) == 0 and dataset.describe()["sources"][0]["head_documents"] == len(TEXTS)


def test_bad_streams_are_refused(config, tmp_path):
    from dataclasses import replace

    made = config()
    with pytest.raises(ConfigError, match="cannot be mixed"):
        batches.load(replace(made, sources=made.sources * 2), seed=0)
    for path, message in ((str(tmp_path / "no.jsonl"), "has no files"), (str(tmp_path / "nothing" / "there"), "cannot be opened")):
        with pytest.raises(ConfigError, match=message):
            batches.load(replace(made, sources=(replace(made.sources[0], path=path),)), seed=0)
    with pytest.raises(ConfigError, match=r"document 1 has no field 'txt'; did you mean 'text'\?"):
        batches.load(replace(made, sources=(replace(made.sources[0], field="txt"),)), seed=0)
    with pytest.raises(ConfigError, match="held out"):
        take(replace(made, held_out_fraction=1 - 1e-12), 1)
