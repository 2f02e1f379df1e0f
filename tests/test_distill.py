"""Runs that learn from teachers: in the step or stored, by logits, hidden states and attention, on the student's own rows too."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import distill, pretrain, pretrained, sharding, tree
from jaxllm.config import (
    ConfigError,
    DataConfig,
    DistillConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from jaxllm.contract import STUDENT, Obs
from jaxllm.data import batch as batches
from jaxllm.data.position import Position
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.losses.sequence import attention_kl
from jaxllm.models.generate import complete, generator, sampler
from jaxllm.step import Experiment, frozen_base, program
from jaxllm.teach import TeachConfig, teach
from tests.observed import batch_of, value
from tests.runs import corpus, train
from tests.test_pretrained import SOURCE, random_params

MODEL = ModelConfig(num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_size=4, ff_width=24, vocab_size=261, max_length=64)
WIDE = replace(MODEL, num_layers=3, width=24, ff_width=32, num_heads=8, head_size=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    corpus(folder).write_text(corpus(folder).read_text()[:60_000])
    for name, model, seed in (("teacher", MODEL, 0), ("wide", WIDE, 1), ("padded", replace(MODEL, vocab_size=300), 2)):
        scaled = jax.tree.map(lambda x: 0.2 * x, random_params(model, seed=seed))
        pretrained.save(folder / name, model, scaled, ByteTokenizer(), source=SOURCE)
    return folder


def config_of(place: Path, data: dict[str, Any] | None = None, **options: Any) -> TrainConfig:
    sources = (SourceConfig(kind="text", path=str(place / "corpus.txt"), document="paragraph"),)
    plain = DataConfig(
        sources=sources, tokenizer=TokenizerConfig(kind="bytes"), sequence_length=32, batch_size=4, cache_dir=str(place / "cache")
    )
    return TrainConfig(model=MODEL, data=replace(plain, **(data or {})), remat="none", distill=DistillConfig(**options), num_steps=10)


def first_step(experiment: Experiment, mesh_config: MeshConfig = MeshConfig(data=1), steps: int = 1) -> tuple[Any, list[dict[str, float]]]:
    """(state after the steps, metrics of each)."""
    config = replace(experiment.config, mesh=mesh_config)
    experiment = replace(experiment, config=config)
    mesh = sharding.make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        made = program(experiment, mesh)
        params = experiment.initial_params(mesh) if experiment.initial_params else None
        frozen = {**frozen_base(experiment, mesh, params), **(experiment.load_frozen(mesh) if experiment.load_frozen else {})}
        state = made.make_state(params)
        dataset = experiment.load_data(config.data, seed=0)
        items = dataset.read(Position(), lambda size: sharding.host_rows(mesh, size))
        rows = []
        for _ in range(steps):
            batch = batches.to_global(next(items).batch, mesh, config.data.batch_size)
            known = {name: (one.shape, one.dtype) for name, one in experiment.extras.items()}
            assert {name: (x.shape[2:], x.dtype) for name, x in batch.extras.items()} == known, "what a plan is told"
            state, metrics = made.step(state, frozen, batch)
            rows.append({name: float(x) for name, x in metrics.items()})
        items.close()
        return jax.tree.map(np.asarray, state.trainable), rows


def build(config: TrainConfig) -> Experiment:
    return pretrain.experiment(config, precision="float32")


def test_a_student_that_is_its_teacher_has_nothing_to_learn(place: Path) -> None:
    config = replace(config_of(place, teachers=((str(place / "teacher"), 1.0),)), init_from=str(place / "teacher"))
    _, (metrics,) = first_step(build(config))
    assert abs(metrics["teacher"]) < 1e-6
    assert metrics["grad_norm"] < 1e-5
    assert metrics["ce"] > 1.0, "the text's own loss is a metric"


def test_what_is_stored_is_what_the_teacher_says_in_the_step(place: Path, tmp_path: Path) -> None:
    """All 261 tokens stored: the same loss and gradient as with the teacher in the step, to float16's precision."""
    teach(str(place / "teacher"), config_of(place), str(place / "taught"), TeachConfig(k=261, batch_tokens=1024))
    (_, (live,)), (_, (stored,)) = (
        first_step(build(config_of(place, kind="jensen_shannon", ce=0.5, **given)))
        for given in ({"teachers": ((str(place / "teacher"), 2.0),)}, {"stored": ((str(place / "taught"), 2.0),)})
    )
    np.testing.assert_allclose(stored["stored"], live["teacher"], rtol=3e-3, atol=1e-3)
    for name in ("loss", "ce", "grad_norm"):
        np.testing.assert_allclose(stored[name], live[name], rtol=5e-3, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(live["loss"], 0.5 * live["ce"] + 2.0 * live["teacher"], rtol=1e-5)


def test_tables_of_one_tokenizer_padded_differently_just_work(place: Path) -> None:
    _, (metrics,) = first_step(build(config_of(place, teachers=((str(place / "padded"), 1.0),))))
    assert 0 < metrics["teacher"] < 20


@pytest.mark.whole
def test_two_teachers_a_schedule_and_a_mesh(place: Path) -> None:
    """Sharded by their own rules, the same numbers; and ce runs from 0.2 to 0.8 while the teachers' weights shrink with 1 - ce."""
    teachers = ((str(place / "teacher"), 1.0), (str(place / "wide"), 0.5))
    experiment = build(config_of(place, {"batch_size": 8}, teachers=teachers, ce=0.2, ce_end=0.8))
    one, rows = first_step(experiment, steps=3)
    eight, sharded = first_step(experiment, MeshConfig(data=4, model=2), steps=3)
    for step, row in enumerate(rows):
        ce = 0.2 + 0.6 * step / 10
        share = (1 - ce) / 0.8
        np.testing.assert_allclose(row["loss"], ce * row["ce"] + share * (row["teacher_1"] + 0.5 * row["teacher_2"]), rtol=1e-5)
        np.testing.assert_allclose(sharded[step]["loss"], row["loss"], rtol=1e-5)
    for (path, a), (_, b) in zip(tree.items(one), tree.items(sharding.trim_vocab(eight, 261)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=path)


@pytest.mark.parametrize(
    ("options", "ce", "share"),
    [
        ({"ce": 1.0, "weight_end": 0.0}, [1.0] * 4, [1.0, 0.9, 0.5, 0.0]),  # uptraining: the model before its surgery is let go
        ({"ce": 1.0, "ce_end": 0.5, "weight_end": 2.0}, [1.0, 0.95, 0.75, 0.5], [1.0, 1.1, 1.5, 2.0]),
        ({"ce": 0.2, "ce_end": 0.8}, [0.2, 0.26, 0.5, 0.8], [1.0, 0.925, 0.625, 0.25]),
        ({"ce": 1.0}, [1.0] * 4, [1.0] * 4),
    ],
)
def test_weights_run_along_lines(place: Path, options: dict[str, float], ce: list[float], share: list[float]) -> None:
    """Of steps 0, 1, 5 and 10 of 10; after the last they stay."""
    config = config_of(place, teachers=(("x", 3.0),), **options)
    at = lambda weight: [float(weight(jnp.int32(step)) if callable(weight) else weight) for step in (0, 1, 5, 10, 12)]
    np.testing.assert_allclose(at(distill.text_weight(config)), [*ce, ce[-1]], rtol=1e-6)
    np.testing.assert_allclose(at(distill.teacher_weight(config, 3.0)), 3.0 * np.array([*share, share[-1]]), rtol=1e-6)


def test_hidden_states_are_matched_through_a_learned_map_and_weigh_as_much_as_the_logits(place: Path) -> None:
    """α L_states equals L_logits of the step before, with no gradient through α; the map trains, and a loaded model has none."""
    experiment = build(config_of(place, teachers=((str(place / "wide"), 1.0),), states="cosine"))
    assert experiment.lm.init(jax.random.key(0))["projections"]["kernel"].shape == (2, 16, 24)
    state, rows = first_step(experiment, steps=2)
    np.testing.assert_allclose(rows[0]["loss"], rows[0]["text/teacher"] + rows[0]["states"], rtol=1e-5)  # α begins at 1
    alpha = rows[0]["text/teacher"] / rows[0]["states"]
    np.testing.assert_allclose(rows[1]["loss"], rows[1]["text/teacher"] + alpha * rows[1]["states"], rtol=1e-5)
    start = jax.tree.map(np.asarray, experiment.lm.init(jax.random.key(0)))
    assert np.any(state["projections"]["kernel"] != start["projections"]["kernel"])


def test_attention_kl_is_minilm_s(place: Path) -> None:
    """Against NumPy, in packed rows, with grouped keys; zero for equal models; longer rows than a chunk of queries."""
    rng = np.random.default_rng(0)
    layers, rows, length = 2, 2, 150
    q, tq = (rng.normal(size=(layers, rows, length, 4, 3)) for _ in range(2))
    k, tk = rng.normal(size=(layers, rows, length, 2, 3)), rng.normal(size=(layers, rows, length, 4, 3))
    mask = (rng.random((rows, length)) < 0.5).astype(np.float32)
    segments = np.minimum(1 + np.arange(length) // 70, 2)[None].repeat(rows, 0)
    segments[:, 140:] = 0
    batch = batch_of(np.zeros((rows, length), int), mask * (segments > 0)).replace(segment_ids=jnp.asarray(segments, jnp.int32))

    def probabilities(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        k = k.repeat(q.shape[2] // k.shape[2], axis=2)
        scores = np.einsum("bthe,bshe->bhts", q, k) / np.sqrt(3)
        seen = (segments[:, :, None] == segments[:, None, :]) & np.tril(np.ones((length, length), bool))
        scores = np.where(seen[:, None], scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)

    expected = 0.0
    for ours, theirs in ((0, 1), (1, 1)):
        s, t = probabilities(q[ours], k[ours]), probabilities(tq[theirs], tk[theirs])
        kl = np.where(t > 0, t * (np.log(np.maximum(t, 1e-300)) - np.log(np.maximum(s, 1e-300))), 0).sum(-1).mean(1)
        expected += (kl * np.asarray(batch.loss_mask)).sum() / np.asarray(batch.loss_mask).sum() / 2
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    taps = {STUDENT: {"q": f32(q), "k": f32(k)}, "t": {"q": f32(tq), "k": f32(tk)}}
    got = value(attention_kl([(0, 1), (1, 1)], "t"), Obs(batch, jnp.int32(0), taps=taps))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    same = Obs(batch, jnp.int32(0), taps={STUDENT: taps["t"], "t": taps["t"]})
    assert abs(float(value(attention_kl([(0, 0)], "t"), same))) < 1e-6
    wide = Obs(batch, jnp.int32(0), taps={STUDENT: taps[STUDENT], "t": {"q": f32(tq)[:, :, :, :2], "k": f32(tk)[:, :, :, :2]}})
    with pytest.raises(ConfigError, match=r"attention of 4 heads.*'t' has 2 of 3.*divisor of both 12 and 6"):
        value(attention_kl([(0, 0)], "t"), wide)
    assert np.isfinite(value(attention_kl([(0, 0)], "t", heads=3), wide))


@pytest.mark.whole
def test_attention_and_states_train(place: Path) -> None:
    wide = replace(WIDE, num_heads=4, head_size=4)
    pretrained.save(place / "four", wide, jax.tree.map(lambda x: 0.5 * x, random_params(wide)), ByteTokenizer(), source=SOURCE)
    config = config_of(
        place, teachers=((str(place / "four"), 1e-3),), attention_layers=((1, 2),), attention_weight=100.0, states="mse", state_weight=1.0,
        state_layers=((-1, -1),),
    )  # fmt: skip
    steady = OptimConfig(lr=1e-2, schedule=ScheduleConfig(kind="constant"))
    _, rows = first_step(build(replace(config, optim=steady)), steps=30)
    for name in ("attention", "states"):
        first, last = (np.mean([row[name] for row in part]) for part in (rows[:5], rows[-5:]))
        assert last < 0.97 * first, (name, first, last)


# ----------------------------------------------------------------------------------------- on policy


def test_the_student_goes_on_with_a_row_as_it_would_generate(place: Path) -> None:
    """At a temperature near 0, what it writes is its greedy continuation; up to the end of text, and with the loss on that alone."""
    model = pretrained.load(place / "teacher")
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 256, (4, 12)).astype(np.int32)
    mask = np.ones((4, 12), np.float32)
    mask[0, :3] = 0  # a prompt of four tokens
    batch = batch_of(tokens, mask)
    lengths = distill.prompt_lengths(batch, least=2)
    assert lengths.tolist() == [4, 2, 2, 2]
    greedy = complete(
        generator(model.lm, sampler(0.0)), model.params, [tokens[i, :n].tolist() for i, n in enumerate([4, 2, 2, 2])], num_tokens=6
    )
    end = greedy[1][2]  # ends the second row early, and wherever else it comes
    write = jax.jit(lambda key: distill.write(model.lm, model.params, batch, lengths, key, 6, 1e-6, end))
    out = jax.tree.map(np.asarray, write(jax.random.key(0)))
    for row, (n, text) in enumerate(zip([4, 2, 2, 2], greedy, strict=True)):
        text = text[: text.index(end) + 1] if end in text else text
        total = n + len(text)
        assert out.tokens[row, :total].tolist() == [*tokens[row, :n].tolist(), *text][:12]
        assert out.labels[row, n - 1 : total - 1].tolist() == text
        assert out.loss_mask[row].tolist() == [float(n - 1 <= t < total - 1) for t in range(12)]
        assert out.segment_ids[row].tolist() == [int(t < total) for t in range(12)]
    long = jax.jit(lambda key: distill.write(model.lm, model.params, batch, lengths, key, 50, 1.0, None))(jax.random.key(0))
    assert np.all(np.asarray(long.segment_ids) == 1)
    assert np.asarray(long.loss_mask).sum(1).tolist() == [9, 11, 11, 11], "the last label lies one beyond the row"


def test_a_share_of_the_rows_is_the_student_s_own(place: Path) -> None:
    options = {"teachers": ((str(place / "teacher"), 1.0),), "kind": "jensen_shannon", "on_policy_tokens": 8, "on_policy_prompt": 4}
    config = config_of(place, {"packing": "none", "batch_size": 16}, **options, on_policy=0.5)
    experiment = build(config)
    assert experiment.rollout is not None
    dataset = batches.load(config.data, seed=0)
    items = dataset.read(Position(), lambda size: np.arange(size))
    batch = jax.tree.map(jnp.asarray, next(items).batch)
    items.close()  # type: ignore[attr-defined]
    params = experiment.lm.init(jax.random.key(0))
    new = jax.jit(experiment.rollout)(params, {}, batch, jax.random.key(1))
    changed = np.any(np.asarray(new.tokens) != np.asarray(batch.tokens), axis=1)
    assert 2 < changed.sum() < 14
    for name in ("labels", "loss_mask", "segment_ids", "positions"):
        np.testing.assert_array_equal(np.asarray(getattr(new, name))[~changed], np.asarray(getattr(batch, name))[~changed])
    _, rows = first_step(experiment, steps=2)
    assert all(np.isfinite(row["loss"]) and 0 < row["teacher"] < np.log(2) for row in rows)


# -------------------------------------------------------------------------------------------- errors


def test_bad_input(place: Path) -> None:
    teacher = ((str(place / "teacher"), 1.0),)
    pieces = {"tokenizer": TokenizerConfig(vocab_size=400)}
    small = replace(config_of(place, teachers=teacher), model=replace(MODEL, vocab_size=200))
    cases: list[tuple[Any, str]] = [
        (lambda: DistillConfig(ce=0.5), "no teacher: give --distill.teachers"),
        (lambda: DistillConfig(stored=(("x", 1.0),), states="mse"), "need a teacher in the step"),
        (lambda: DistillConfig(teachers=teacher, on_policy=1.5), "on_policy is 1.5"),
        (lambda: DistillConfig(teachers=teacher, on_policy=0.5, ce=0.1), "replaces rows"),
        (lambda: DistillConfig(teachers=(("x", -1.0),)), r"'x', -1.0.*positive"),
        (lambda: DistillConfig(teachers=teacher, temperature=-1.0), r"temperature is -1.0; it must be positive"),
        (lambda: DistillConfig(teachers=teacher, temperature=float("nan")), r"temperature is nan"),
        (lambda: DistillConfig(teachers=teacher, kind="soft_ce", temperature=2.0), r"'soft_ce' .*temperature is 2.0; set it to 1"),
        (lambda: DistillConfig(teachers=teacher, weight_end=-0.5), r"weight_end is -0.5; it must be at least 0"),
        (lambda: DistillConfig(teachers=teacher, ce=1.0, ce_end=0.5), r"start below 1, or say with distill.weight_end"),
        (lambda: build(config_of(place, teachers=(("nowhere", 1.0),))), "nowhere"),
        (
            lambda: build(config_of(place, {"sequence_length": 128}, teachers=teacher)),
            "context of 64 tokens, and data.sequence_length",
        ),
        (lambda: build(config_of(place, teachers=teacher, on_policy=0.5)), "packing 'first_fit' puts several documents"),
        (lambda: build(small), "261 vocabulary entries and the student 200.*259 tokens.*aligned"),
        (lambda: first_step(build(config_of(place, pieces, teachers=teacher))), "reads tokens of .*, and the data are in those of"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            raise AssertionError(f"not refused: {message}", call())


@pytest.mark.whole
def test_the_command_distils_resumes_and_refuses_another_teacher(place: Path, tmp_path: Path) -> None:
    """`jaxllm train --distill.teachers …`, twice; the student is loaded as an ordinary model; a teacher that changed is refused."""
    text = corpus(tmp_path)
    model = ModelConfig(num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_size=8, ff_width=64, vocab_size=259, max_length=64)
    weights = jax.tree.map(lambda x: 0.1 * x, random_params(model))
    for seed, name in ((0, "teacher"), (1, "other")):
        noise = jax.tree.map(lambda x, seed=seed: x + 0.01 * seed, weights)
        pretrained.save(tmp_path / name, model, noise, ByteTokenizer(), source=SOURCE)
    words = ["--distill.teachers", str(tmp_path / "teacher"), "1.0", "--distill.states", "cosine", "--run_dir", str(tmp_path / "run")]
    train("--num_steps", "6", *words, text=text)
    assert "projections" not in pretrained.load(tmp_path / "run").params
    train("--num_steps", "12", *words, text=text)
    (tmp_path / "teacher").rename(tmp_path / "old")
    os.symlink(tmp_path / "other", tmp_path / "teacher")
    output = train("--num_steps", "15", *words, text=text, status=2)
    assert "this run began with the teacher" in output
