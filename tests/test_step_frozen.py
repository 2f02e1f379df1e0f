"""What is frozen: teachers are arguments of the step, never donated, saved or trained; and so are a student's frozen leaves."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxllm import loop, pretrain, tree
from jaxllm.config import MeshConfig, ScheduleConfig
from jaxllm.contract import LM, Batch, Obs, Params
from jaxllm.losses.annotate import teacher
from jaxllm.losses.divergences import forward_kl
from jaxllm.losses.vocab import over_vocab
from jaxllm.models.transformer import decoder
from jaxllm.step import BASE, Experiment, Frozen, frozen_base, observe, state_factory, student_params
from tests.runs import corpus, digest, losses
from tests.stepper import (
    CONFIG,
    MESHES,
    MODEL,
    SGD,
    STUDENT_LM,
    Stepper,
    assert_close,
    batch_of,
    experiment_of,
    gradient,
    initial,
    mesh_of,
    numpy,
    observe_student,
    on_both_meshes,
    place_params,
)  # fmt: skip
from tests.tiny import config as TINY

# -------------------------------------------------------------------------------------- teachers


TEACHER_LM = decoder(replace(MODEL, num_layers=2, width=24))
KL = over_vocab(chunk=3, kl=(1.0, forward_kl("teacher")))


def watch_teacher(params: Params, batch: Batch) -> Obs:
    return observe(TEACHER_LM)(params, batch, None)


def teacher_params(seed: int) -> Params:
    """A teacher with opinions: a fresh model's predictions are nearly even."""
    params = initial(TEACHER_LM, seed)
    return params | {"unembed": {"kernel": 20 * params["unembed"]["kernel"]}}


def load_teacher(mesh: Mesh, seed: int = 7) -> Frozen:
    return {"teacher": place_params(teacher_params(seed), mesh)}


def distilling(**fields: Any) -> Experiment:
    return experiment_of(loss=KL, annotators=(teacher(watch_teacher, "teacher"),), load_frozen=load_teacher, **fields)


@cache
def hidden_of(lm: LM) -> Any:
    return jax.jit(lambda params, batch: lm(params, batch).hidden)


def log_softmax(lm: LM, params: Params, batch: Batch) -> np.ndarray:
    """In float64, from the final hidden states on."""
    hidden = np.asarray(hidden_of(lm)(params, batch), np.float64)
    logits = hidden @ np.asarray(tree.get(params, "unembed/kernel"), np.float64).T
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(batch: Batch, seed: int = 7) -> float:
    p, q = log_softmax(TEACHER_LM, teacher_params(seed), batch), log_softmax(STUDENT_LM, initial(), batch)
    return float((batch.loss_mask * (np.exp(p) * (p - q)).sum(-1)).sum() / batch.loss_mask.sum())


@pytest.fixture(scope="module", params=MESHES)
def distilled(request: pytest.FixtureRequest) -> Stepper:
    return Stepper(distilling(), mesh_of(request.param))


def test_the_loss_is_the_divergence_from_the_teacher_that_is_given(distilled: Stepper) -> None:
    """Two teachers through one compiled step: values in the frozen argument, not in the program, decide."""
    assert abs(divergence(batch_of(0), 7) - divergence(batch_of(0), 8)) > 1e-2
    copy = jax.jit(partial(jax.tree.map, jnp.copy))
    start = copy(distilled.state)
    for seed in (7, 8):
        distilled.state = copy(start)
        frozen = load_teacher(distilled.mesh, seed)
        kept = jax.tree.map(np.array, frozen)
        given, metrics = distilled.state, distilled(batch_of(0), frozen)
        np.testing.assert_allclose(metrics["loss"], divergence(batch_of(0), seed), rtol=1e-5)
        assert metrics["kl"] == metrics["loss"]
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.trainable)), "the state is donated"
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen)), "the teacher is not"
        jax.tree.map(np.testing.assert_array_equal, frozen, kept)
    assert distilled.jitted._cache_size() == 1
    distilled.state = start


def constants(step: Stepper, frozen: Frozen) -> set[tuple[int, ...]]:
    """Shapes of the arrays that the step holds instead of being given them."""
    with jax.set_mesh(step.mesh):
        jaxpr = jax.make_jaxpr(step.function)(step.state, frozen, step.place(batch_of(0)))
    return {np.shape(c) for c in jaxpr.consts}


def test_the_teacher_is_a_parameter_of_the_program(distilled: Stepper) -> None:
    frozen = load_teacher(distilled.mesh)
    shapes = {leaf.shape for leaf in jax.tree.leaves(frozen)}
    assert not shapes & constants(distilled, frozen)
    with jax.set_mesh(distilled.mesh):
        lowered = distilled.jitted.lower(distilled.state, frozen, distilled.place(batch_of(0)))
    state, given, batch = lowered.args_info[0]
    assert {leaf.donated for leaf in jax.tree.leaves(given)} == {leaf.donated for leaf in jax.tree.leaves(batch)} == {False}
    assert {leaf.donated for leaf in jax.tree.leaves(state)} == {True}
    text = lowered.compile().as_text() or ""
    given_names = set(re.findall(r'parameter\(\d+\).*op_name="(frozen\[[^"]*)"', text.replace("\\'", "'")))
    assert given_names == {"frozen" + "".join(f"['{key}']" for key in path.split("/")) for path in tree.paths(frozen)}

    shut = teacher(lambda params, batch: watch_teacher(frozen["teacher"], batch), "teacher")
    wrong = Stepper(replace(distilled.experiment, annotators=(shut,)), distilled.mesh)
    assert shapes <= constants(wrong, frozen), "twin: a teacher closed over is seen"


@pytest.mark.parametrize("distilled", ["2×2×2"], indirect=True)  # without a mesh, the laws show it for every loss
def test_the_teacher_gets_no_gradient(distilled: Stepper) -> None:
    """The loss varies with the teacher (above), and its derivative with respect to it is zero all the same."""
    frozen = load_teacher(distilled.mesh)
    with jax.set_mesh(distilled.mesh):
        loss = lambda frozen: distilled.function(distilled.state, frozen, distilled.place(batch_of(0)))[1]["loss"]
        grads = jax.jit(jax.grad(loss))(frozen)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_the_teacher_has_no_optimizer_state(distilled: Stepper) -> None:
    student = {np.shape(leaf) for leaf in jax.tree.leaves(distilled.state.trainable)} | {()}
    assert {np.shape(leaf) for leaf in jax.tree.leaves((distilled.state.opt_state, distilled.state.loss_state))} <= student


@pytest.mark.whole
def test_a_run_loads_its_teacher_each_time_and_saves_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    text = corpus(tmp_path)
    config = replace(
        TINY,
        model=replace(TINY.model, num_layers=1, residual_dropout=0.0),
        data=replace(TINY.data, sources=(replace(TINY.data.sources[0], path=str(text)),), sequence_length=32),
        mesh=MeshConfig(data=1),
        run_dir=str(tmp_path / "run"),
        num_steps=2,
    )
    lm = decoder(replace(config.model, num_layers=3))
    loaded = []

    def load(mesh: Mesh) -> Frozen:
        loaded.append(place_params(initial(lm, 5), mesh))
        return {"teacher": loaded[-1]}

    annotate = teacher(lambda params, batch: observe(lm)(params, batch, None), "teacher")

    def run(num_steps: int) -> tuple[int, dict[str, str]]:
        plain = pretrain.experiment(
            replace(config, num_steps=num_steps), precision="float32", loss=over_vocab(loss=(1.0, forward_kl("teacher")))
        )
        ending = loop.run(replace(plain, annotators=(annotate,), load_frozen=load, sample=None), "float32", say=lambda line: None)
        assert (ending.step, ending.exit_code) == (num_steps, 0)
        return digest(tmp_path / "run")

    step, leaves = run(2)
    trained = {path for path in leaves if path.startswith("/trainable/")}
    shapes = jax.eval_shape(decoder(config.model).init, jax.random.key(0))
    assert step == 2 and trained == {f"/trainable/{path}" for path in tree.paths(shapes)}
    assert not [path for path in leaves if "teacher" in path or "frozen" in path]
    assert run(3)[0] == 3 and len(loaded) == 2, "resuming loads it again"
    assert all(loss > 0 for loss, _ in losses(tmp_path / "run").values())


def test_a_teacher_may_share_arrays_with_the_weights_that_a_run_starts_from() -> None:
    """Uptraining's 'before' is the start itself: the donated state must hold copies."""
    mesh = mesh_of("2×2×2")
    experiment = experiment_of(annotators=(teacher(observe_student, "teacher"),), loss=KL)
    step = Stepper(experiment, mesh)
    params = place_params(initial(), mesh)
    with jax.set_mesh(mesh):
        step.state = state_factory(experiment, mesh)[0](params)
    values = [step(batch_of(1), {"teacher": params})["loss"] for _ in range(3)]
    assert abs(values[0]) < 1e-6, "no divergence from itself"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


# ----------------------------------------------------------------------------------- frozen leaves

FREEZE = ((r"layers/mlp/up/.*", False), (r"(embed|layers)/.*", True))
FROZEN_CONFIG = replace(CONFIG, optim=replace(SGD, name="adamw", freeze=FREEZE, ema_decay=0.9, num_microbatches=2))


def is_frozen(path: str) -> bool:
    return path.startswith(("embed/", "layers/")) and path != "layers/mlp/up/kernel"


@on_both_meshes
def test_frozen_leaves_keep_their_bits_and_have_no_state(mesh_name: str) -> None:
    experiment, mesh = experiment_of(FROZEN_CONFIG), mesh_of(mesh_name)
    step = Stepper(experiment, mesh, from_seed=True)
    with jax.set_mesh(mesh):
        frozen = frozen_base(experiment, mesh)
    start = numpy(initial())
    assert set(tree.paths(frozen[BASE])) == {path for path in start if is_frozen(path)}
    assert_close(numpy(student_params(step.state, frozen)), start, rtol=1e-6)
    kept = jax.tree.map(np.array, frozen)
    for i in range(3):
        step(batch_of(i), frozen)
    jax.tree.map(np.testing.assert_array_equal, frozen, kept)
    after = numpy(student_params(step.state, frozen, average=False))
    assert all((after[path] != start[path]).any() for path in start if not is_frozen(path)), "the others train"
    assert all(is_frozen(path) == np.array_equal(after[path], numpy(kept[BASE])[path]) for path in start if is_frozen(path))
    for part in (step.state.trainable, step.state.opt_state, step.state.ema):
        keys = [keys for keys, _ in jax.tree_util.tree_leaves_with_path(part)]
        held = {"/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey)) for path in keys} - {""}
        assert held == {path for path in start if not is_frozen(path)}


@on_both_meshes
def test_the_gradient_is_of_the_trained_leaves_alone(mesh_name: str) -> None:
    """One step of plain SGD against the whole gradient, of which the frozen part is thrown away."""
    config = replace(SGD, b1=0.0, weight_decay=0.0, schedule=ScheduleConfig("constant"), freeze=FREEZE)
    experiment, mesh = experiment_of(replace(CONFIG, optim=config)), mesh_of(mesh_name)
    step = Stepper(experiment, mesh)
    metrics = step(batch_of(0), frozen_base(experiment, mesh, place_params(initial(), mesh)))
    grads = {path: np.asarray(leaf) for path, leaf in tree.items(gradient(initial(), batch_of(0))) if not is_frozen(path)}
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum(np.square(g).sum() for g in grads.values())), rtol=1e-5)
    want = {path: leaf - config.lr * grads[path] for path, leaf in numpy(initial()).items() if path in grads}
    assert_close(numpy(step.state.trainable), want, rtol=1e-5, atol=1e-7)


def test_a_frozen_base_comes_from_the_given_weights() -> None:
    experiment, mesh = experiment_of(FROZEN_CONFIG), mesh_of("1")
    given = initial(seed=99)
    frozen, state = frozen_base(experiment, mesh, given), state_factory(experiment, mesh)[0](given)
    jax.tree.map(np.testing.assert_array_equal, student_params(state, frozen), given)
    assert frozen_base(experiment_of(), mesh, given) == frozen_base(experiment_of(), mesh) == {}, "nothing is frozen, nothing is held"
