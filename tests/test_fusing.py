"""Fusion of stored predictions, from texts and tokenizers to a student's loss: three tokenizers, three models with random weights.

Oracles of FuseLLM's card, end to end: 3 (equal tokenizers), 4 (rows sum to 1), 6 (λ = 1 and P = O are the text's own loss), 7 (MinCE,
AvgCE), 9 (rejected rows), 10 (the loss against a dense one).
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import pretrain, tree
from jaxllm.align import dtw
from jaxllm.align.project import TopK, project
from jaxllm.align.vocab import vocab_map
from jaxllm.config import DistillConfig, TokenizerConfig, TrainConfig
from jaxllm.contract import Batch
from jaxllm.data import batch as batches
from jaxllm.data import taught
from jaxllm.data.position import Position
from jaxllm.data.taught import Best
from jaxllm.fusing import PAPER, FuseConfig, fuse_taught, teachers
from jaxllm.fusing.shards import Fuser
from jaxllm.fusing.values import Job
from jaxllm.losses.core import as_loss_fn
from jaxllm.losses.tokens import next_token
from jaxllm.losses.vocab import over_vocab
from jaxllm.step import observe
from tests.fusions import HERE, NAMES, config_of, fused, make_up, place, records, sources
from tests.test_pretrained import random_params

__all__ = ["place"]


def shards_of(fuser: Fuser) -> list[list[Best]]:
    """What a fusion writes, as float32, by corpus."""
    return [[fuser.shard(i, n)[0] for n in range(taught.num_shards(corpus))] for i, corpus in enumerate(fuser.corpora)]


# --------------------------------------------------------------------------------- what is written


def by_hand(fuser: Fuser, index: int, document: int) -> tuple[int, list[tuple[dict[int, float], float] | None]]:
    """(the teacher with the least nats a byte, for each row of a document: {target id: probability} and the rest, or None)."""

    def ends(tokenizer: Any, ids: np.ndarray) -> list[int]:
        return np.cumsum([len(tokenizer.token_bytes(int(id))) for id in ids]).tolist()

    def part(corpus: Any) -> slice:
        return slice(int(corpus.offsets[document]), int(corpus.offsets[document + 1]))

    stored = [one.records[index].at(np.arange(part(c).start, part(c).stop)) for one in fuser.teachers for c in [one.records[index].corpus]]
    best = int(np.argmin([-one.actual[:-1].astype(float).sum() for one in stored]))  # all read bos, and the same bytes
    one, said = fuser.teachers[best], stored[best]
    theirs = one.records[index].corpus
    read = {end: j for j, end in enumerate(ends(one.tokenizer, theirs.tokens[part(theirs)])[:-1])}
    ours = fuser.corpora[index]
    rows: list[tuple[dict[int, float], float] | None] = []
    for end in ends(fuser.tokenizer, ours.tokens[part(ours)])[:-1]:
        if end not in read:
            rows.append(None)
            continue
        found: dict[int, float] = defaultdict(float)
        p = np.exp(said.logp[read[end]].astype(float))
        p /= p.sum() + float(said.tail[read[end]])
        for id, probability in zip(said.ids[read[end]].tolist(), p.tolist(), strict=True):
            if one.vocab[id] >= 0:
                found[int(one.vocab[id])] += probability
        kept = dict(sorted(found.items(), key=lambda pair: -pair[1])[: fuser.config.k])
        rows.append((kept, 1.0 - sum(kept.values())))
    return best, rows


@pytest.mark.parametrize("target", NAMES)
def test_each_row_is_the_best_teachers_where_it_has_read_the_same_bytes(place: Path, target: str) -> None:
    """Documents of both corpora, one over the border of two shards, against dictionaries of Python; rejected rows by oracle 9."""
    fuser = fused(place, target, *NAMES)
    won: set[int] = set()
    for index, shards in enumerate(shards_of(fuser)):
        corpus = fuser.corpora[index]
        whole = Best(*(np.concatenate(parts) for parts in zip(*shards, strict=True)))
        over_border = int(np.searchsorted(corpus.offsets, taught.SHARD, side="right")) - 1
        num = int(corpus.meta["num_documents"])
        for document in {*np.random.default_rng(0).choice(num, 25).tolist(), min(over_border, num - 1), num - 1}:
            best, rows = by_hand(fuser, index, document)
            won.add(best)
            start, end = (int(x) for x in corpus.offsets[document : document + 2])
            assert whole.tail[end - 1] == 1 and np.isneginf(whole.logp[end - 1]).all() and whole.actual[end - 1] == 0
            for i, row in enumerate(rows, start):
                named = {int(id): float(np.exp(logp)) for id, logp in zip(whole.ids[i], whole.logp[i], strict=True) if np.isfinite(logp)}
                following = int(corpus.tokens[i + 1])
                if row is None:
                    assert named == {following: 1.0} and whole.tail[i] == 0, "a rejected row is the next token for certain"
                    continue
                assert named == pytest.approx(row[0], rel=2e-3, abs=1e-6)
                assert whole.tail[i] == pytest.approx(row[1], abs=2e-3)
                if not fuser.teachers[best].own:
                    assert np.exp(whole.actual[i]) == pytest.approx(row[0].get(following, row[1]), rel=1e-2, abs=2e-3)
    assert len(won) > 1


@pytest.mark.parametrize("target", ["bytes", "p400"])
@pytest.mark.parametrize(
    "config", [HERE, replace(HERE, fuse="avg_ce", k=9), replace(PAPER, k=4, workers=0), replace(HERE, how="hard", rejected="empty")]
)
def test_oracle_4_every_row_sums_to_1_with_at_most_k_tokens(place: Path, target: str, config: FuseConfig) -> None:
    """Before float16; a teacher of the target's tokenizer, which passes as float16 keeps it, is left out."""
    fuser = fused(place, target, *(name for name in NAMES if name != target), config=config)
    best = fuser.shard(1, 0)[0]
    assert best.ids.shape[1] == config.k and best.ids.max() < fuser.tokenizer.num_vocab
    np.testing.assert_allclose(np.exp(best.logp.astype(np.float64)).sum(axis=1) + best.tail, 1.0, atol=1e-5)
    for ids, logp in zip(best.ids, best.logp, strict=True):
        assert len(set(ids[np.isfinite(logp)].tolist())) == np.isfinite(logp).sum(), "an id twice"
        assert np.all(np.diff(logp[np.isfinite(logp)]) <= 0), "the most probable come first"


def test_the_papers_alignment_is_that_of_each_document_alone(place: Path) -> None:
    """The dynamic programme and FuseLLM's rules on single documents, against the shard made of all of them; rejected rows by oracle 9."""
    fuser = fused(place, "p400", "p520", config=replace(PAPER, k=4, workers=0))
    (best,), teacher, corpus, texts = shards_of(fuser)[1], fuser.teachers[0], fuser.corpora[1], 0
    theirs = teacher.records[1].corpus
    assert (
        np.array_equal(teacher.vocab[:520], vocab_map(teacher.tokenizer, fuser.tokenizer, "min_edit")) and (teacher.vocab[520:] == -1).all()
    )
    for document in range(0, 60, 7):
        (start, end), (first, last) = (one.offsets[document : document + 2].tolist() for one in (corpus, theirs))
        ids, said = corpus.tokens[start:end], teacher.records[1].at(np.arange(first, last))
        rows = dtw.rows(fuser.tokenizer, ids, teacher.tokenizer, theirs.tokens[first:last], "soft", vocab=teacher.vocab)
        alone = project(TopK(*said[:3]), rows, teacher.vocab, ids, k=4, collisions="highest", unmapped="renormalise")
        for got, want in zip(best, alone, strict=False):
            np.testing.assert_allclose(got[start : end - 1], want[:-1], atol=1e-6)
        rejected = np.flatnonzero(~rows.accepted[:-1])
        np.testing.assert_array_equal(best.ids[start + rejected, 0], ids[rejected + 1])
        assert np.all(best.logp[start + rejected, 0] == 0)
        texts += len(rejected)
    assert texts > 10


def test_by_bytes_more_rows_have_a_source_and_by_edit_distance_more_mass_has_a_target(place: Path) -> None:
    def counts(**options: Any) -> tuple[float, float]:
        one = fused(place, "p400", "p520", config=replace(HERE, **options)).shard(0, 0)[1]["sources"][0]
        return one["accepted"] / one["rows"], one["mapped"] / one["named"]

    spans, soft, strict, hard = counts(), counts(how="soft"), counts(how="soft", strict=True), counts(how="hard")
    assert spans[0] > strict[0] and soft[0] >= strict[0] >= 0.3 and soft[0] >= hard[0]
    assert soft[1] > hard[1] and spans[1] > counts(vocab="exact")[1]


def test_oracle_3_a_teacher_with_the_targets_tokenizer_passes_exactly(place: Path, tmp_path: Path) -> None:
    """To the bit, where it names tokens alone; what it expects of its table's padding goes to the tail."""
    config = config_of(place, "p400")
    make_up(tmp_path / "taught", config, 400, seed=8)
    fuse_taught(config, str(tmp_path / "out"), [(str(tmp_path / "taught"), config)], HERE)
    assert records(tmp_path / "out") == records(tmp_path / "taught")
    fuser = fused(place, "p400", "p400")
    stored = fuser.teachers[0].records[1].at(np.arange(len(fuser.corpora[1].tokens)))
    (best,) = shards_of(fuser)[1]
    padded = (stored.ids >= 400).any(axis=1) & (stored.tail < 1)
    assert 0 < padded.sum() < len(padded)
    for got, want in zip(best, stored, strict=True):
        np.testing.assert_array_equal(got[~padded], want[~padded])
    lost = np.where(stored.ids >= 400, np.exp(stored.logp), 0).sum(axis=1)
    np.testing.assert_allclose(best.tail[padded], (stored.tail + lost)[padded], atol=2e-3)


def test_oracle_3_fewer_tokens_are_the_first_and_renormalised_they_are_divided_by_their_sum(place: Path) -> None:
    three = replace(HERE, k=3)
    (whole,), (fewer,), (paper,) = (
        shards_of(fused(place, "p520", "p520", config=config))[1] for config in (HERE, three, replace(three, unmapped="renormalise"))
    )
    predicts = whole.tail < 1
    real = whole.ids[predicts][:, :3] < 420
    assert (~real).any(), "padding of the table is no token, and goes to the tail"
    rows = predicts.nonzero()[0][real.all(axis=1)]
    first = np.exp(whole.logp[rows, :3].astype(np.float64))
    np.testing.assert_array_equal(fewer.ids[rows], whole.ids[rows, :3])
    np.testing.assert_allclose(np.exp(fewer.logp[rows]), first, rtol=2e-3)
    np.testing.assert_allclose(np.exp(paper.logp[rows]), first / first.sum(axis=1, keepdims=True), rtol=1e-4)
    assert np.all(paper.tail[rows] == 0)


def test_oracle_7_one_teacher_is_itself_by_either_function_and_equals_weigh_the_same(place: Path, tmp_path: Path) -> None:
    run = lambda out, *names, **options: fuse_taught(  # type: ignore[misc]
        config_of(place, "p400"), str(tmp_path / out), sources(place, *names), replace(HERE, **options)
    )["all"]["sources"]
    one = run("min", "p520")
    assert run("avg", "p520", fuse="avg_ce") == one and records(tmp_path / "avg") == records(tmp_path / "min")
    (path,) = one
    assert one[path]["share"] == 1.0
    fuser = fused(place, "p400", "p520", "p520")
    tally = fuser.shard(1, 0)[1]
    assert [counts["won"] for counts in tally["sources"]] == [60, 0], "ties go to the first"
    equal = fused(place, "p400", "p520", "p520", config=replace(HERE, fuse="avg_ce")).shard(1, 0)
    assert [counts["won"] for counts in equal[1]["sources"]] == pytest.approx([30, 30])
    np.testing.assert_allclose(np.exp(equal[0].logp), np.exp(fuser.shard(1, 0)[0].logp), atol=1e-5)


def test_per_token_a_teacher_of_short_tokens_wins_that_per_byte_loses(place: Path) -> None:
    """Every teacher wins where its own mean, recounted from what is stored, is least."""
    shares = {}
    for per in ("byte", "token"):
        fuser = fused(place, "p520", *NAMES, config=replace(HERE, per=per))
        want = np.zeros(3)
        for document in range(60):
            means = []
            for one in fuser.teachers:
                corpus = one.records[1].corpus
                start, end = (int(x) for x in corpus.offsets[document : document + 2])
                nats = -one.records[1].at(np.arange(start, end - 1)).actual.astype(float).sum()
                means.append(nats / (end - start - 1 if per == "token" else 1))
            want[int(np.argmin(means))] += 1
        shares[per] = [counts["won"] for counts in fuser.shard(1, 0)[1]["sources"]]
        assert shares[per] == want.tolist()
    assert shares["byte"] != shares["token"]


def test_text_that_not_all_teachers_predict_is_not_compared(place: Path, tmp_path: Path) -> None:
    """A teacher without bos never predicts a first token; with it counted for the others, they would lose by it alone."""
    folder = tmp_path / "nobos"
    folder.mkdir()
    model = json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "added_tokens": [
            {"id": 256, "content": "<|endoftext|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
        ], "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": _byte_level(), "merges": []},
    })  # fmt: skip
    (folder / "tokenizer.json").write_text(model)
    config = config_of(place, "bytes", tokenizer=TokenizerConfig(kind="huggingface", path=str(folder / "tokenizer.json")))
    tokenizer = batches.load(config.data, seed=0).tokenizer
    assert tokenizer.bos_id is None
    make_up(tmp_path / "taught", config, 331, seed=5)
    job = Job(config_of(place, "p400"), "none", (*sources(place, "bytes"), (str(tmp_path / "taught"), config)), HERE)
    fuser = Fuser(job, lambda line: None)
    scores = fuser._scores(fuser._read(1, 0))
    assert np.array_equal(scores.num_tokens[0], scores.num_tokens[1]), "bytes both: as many after the first as the other"
    start, end = (int(x) for x in fuser.teachers[0].records[1].corpus.offsets[5:7])
    after_first = fuser.teachers[0].records[1].at(np.arange(start + 1, end - 1)).actual.astype(float)
    assert scores.nats[0, 5] == pytest.approx(-after_first.sum()) and scores.num_bytes[5] == end - start - 3


def _byte_level() -> dict[str, int]:
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return {letters[byte]: byte for byte in range(256)} | {"<|endoftext|>": 256}


def test_ids_go_to_the_token_that_the_target_would_begin_with(place: Path) -> None:
    small, large = (batches.load(config_of(place, name).data, seed=0).tokenizer for name in ("p400", "p520"))
    found = teachers.first_tokens(large, small)
    shortened = 0
    for id in range(large.num_vocab):
        data = large.token_bytes(id)
        if found[id] >= 0 and data:
            assert data.startswith(small.token_bytes(int(found[id])))
            if small.token_bytes(int(found[id])) != data:
                shortened += 1
                assert small.encode(data.decode())[0] == found[id]
    assert shortened > 20 and (found[260:] >= 0).all(), "every piece begins somehow"
    assert found[large.eos_id] == small.eos_id  # type: ignore[index]


def test_statistics_are_counts_of_what_was_written(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = fuse_taught(config_of(place, "bytes"), str(out), sources(place, "p400", "p520"), HERE)
    assert json.loads((out / "statistics.json").read_text()) == found and len(found) == 3
    fuser = fused(place, "bytes", "p400", "p520")
    rows = rejected = 0
    won = np.zeros(2)
    for document in range(60):
        best, some = by_hand(fuser, 1, document)
        won[best] += 1
        rows, rejected = rows + len(some), rejected + sum(row is None for row in some)
    one = next(value for name, value in found.items() if name.startswith("1 ") and "other.txt" in name)
    assert one["documents"] == 60 and one["rows"] == rows
    assert [source["share"] for source in one["sources"].values()] == pytest.approx((won / 60).tolist())
    accepted = sum(source["accept_rate"] * source["rows"] for source in one["sources"].values() if source["rows"])
    assert accepted == pytest.approx(rows - rejected)
    assert all(0.5 < source["mapped_mass"] <= 1 for source in found["all"]["sources"].values())


# ------------------------------------------------------------------------------------ a student's loss


def first_batch(config: TrainConfig, out: Path) -> Batch:
    items = batches.load(config.data, seed=3, taught={"stored": str(out)}).read(Position(), lambda size: np.arange(size))
    batch = next(items).batch
    items.close()  # type: ignore[attr-defined]
    return batch


def loss_and_gradient(config: TrainConfig, batch: Batch, step: int = 0, loss: Any = None) -> tuple[float, dict[str, np.ndarray]]:
    experiment = pretrain.experiment(config, precision="float32", loss=loss)
    forward = lambda params, batch: observe(experiment.lm)(params, batch, None)
    params = jax.tree.map(jax.numpy.asarray, random_params(config.model, seed=9))
    value = lambda params, batch: as_loss_fn(forward, experiment.loss)(params, {}, batch, experiment.loss.init(params), step=step)[0]
    number, gradient = jax.jit(jax.value_and_grad(value))(params, batch)
    return float(number), {path: np.asarray(leaf) for path, leaf in tree.items(gradient)}


@pytest.fixture(scope="module")
def out(place: Path) -> Path:
    """Fused from two other tokenizers, for a student of 300 pieces."""
    fuse_taught(config_of(place, "p400"), str(place / "fused"), sources(place, "bytes", "p520"), HERE)
    return place / "fused"


def distilled(place: Path, out: Path, **options: Any) -> TrainConfig:
    return replace(config_of(place, "p400"), distill=DistillConfig(stored=((str(out), 1.0),), kind="soft_ce", **options))


def test_oracle_6_at_lambda_1_loss_and_gradient_are_the_texts_to_the_bit(place: Path, out: Path) -> None:
    """λ runs from 0.9 to 1, where the teacher weighs nothing."""
    config = distilled(place, out, ce=0.9, ce_end=1.0)
    batch = first_batch(config, out)
    own = over_vocab(chunk=config.loss.chunk, ce=(1.0, next_token()))
    want, wanted = loss_and_gradient(replace(config, distill=DistillConfig()), batch, loss=own)
    got, gradient = loss_and_gradient(config, batch, step=config.num_steps)
    assert got == want
    for path, leaf in gradient.items():
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)
    assert loss_and_gradient(config, batch, step=0)[0] != want


def test_oracle_6_at_lambda_0_a_teacher_that_is_the_text_is_the_texts_loss(place: Path, tmp_path: Path) -> None:
    """A teacher that says what comes, written as `jaxllm teach` writes, and fused."""
    config = config_of(place, "p400")
    corpora = batches.load(config.data, seed=0).corpora
    meta = taught.read_meta(place / "taught-p400")
    assert meta is not None
    taught.write_meta(tmp_path / "certain", meta)
    for corpus in corpora:
        num = int(corpus.meta["num_tokens"])
        best = taught.nothing(meta.layout, num)
        best.ids[:-1, 0], best.logp[:, 0], best.tail[:] = corpus.tokens[1:], 0.0, 0.0
        taught.write_shard(taught.shard_file(tmp_path / "certain", corpus, 0), meta.layout.encode(best))
    fuse_taught(config, str(tmp_path / "out"), [(str(tmp_path / "certain"), config)], replace(HERE, unmapped="renormalise"))
    distill = distilled(place, tmp_path / "out", tail="renormalise")
    batch = first_batch(distill, tmp_path / "out")
    want, wanted = loss_and_gradient(config, batch, loss=over_vocab(chunk=config.loss.chunk, ce=(1.0, next_token())))
    got, gradient = loss_and_gradient(distill, batch)
    assert got == pytest.approx(want, rel=1e-6)
    for path, leaf in gradient.items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("tail", ["rest", "renormalise"])
def test_oracle_10_the_loss_is_that_of_a_dense_target(place: Path, out: Path, tail: Any) -> None:
    """λ CLM + (1 − λ) fusion on a batch, in NumPy and float64 over the whole vocabulary."""
    config = distilled(place, out, ce=0.9, tail=tail)
    config = replace(config, distill=replace(config.distill, stored=((str(out), 0.1),)))
    batch = first_batch(config, out)
    experiment = pretrain.experiment(config, precision="float32")
    params = random_params(config.model, seed=9)
    forward = jax.jit(lambda params, batch: experiment.lm.unembed(params).logits(experiment.lm(params, batch).hidden))
    logits = np.asarray(forward(params, batch), np.float64)
    logq = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    total, count = 0.0, 0
    for b, t in np.argwhere(batch.loss_mask > 0):
        dense = np.zeros(logq.shape[-1])
        for id, logp in zip(batch.extras["stored/ids"][b, t], batch.extras["stored/logp"][b, t], strict=True):
            dense[id] += np.exp(float(logp))
        named = dense > 0
        if tail == "renormalise":
            soft = -(dense / max(dense.sum(), 1e-300) * logq[b, t])[named].sum()
        else:
            rest = np.log(np.exp(logq[b, t][~named]).sum())
            soft = -(dense * logq[b, t])[named].sum() - max(float(batch.extras["stored/tail"][b, t]), 1e-8) * rest
        total += 0.9 * -logq[b, t, batch.labels[b, t]] + 0.1 * soft
        count += 1
    assert loss_and_gradient(config, batch)[0] == pytest.approx(total / count, rel=1e-5)
