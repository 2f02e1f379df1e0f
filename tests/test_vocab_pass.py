"""The pass over the vocabulary: cut anywhere, with any head, in the work that it does and in what it communicates on a mesh."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm import sharding
from jaxllm.config import MeshConfig
from jaxllm.contract import STUDENT, Obs, Unembedding, dot_in
from jaxllm.losses import vocab
from jaxllm.losses.annotate import teacher
from jaxllm.losses.core import as_loss_fn
from jaxllm.losses.divergences import TopK, forward_kl, soft_ce
from jaxllm.losses.tokens import accuracy, next_token, z_loss
from jaxllm.losses.vocab import over_vocab
from tests import hlo
from tests.observed import batch_of, random_batch, value

CUTS = [(1, 1, 1), (2, 1, 4), (2, 6, 3), (3, 7, 3), (2, 5, 5), (1, 9, 10)]
"""(rows, length, chunk): one token, chunks that divide, leave a remainder, are the whole or more than it."""


def test_any_chunk_of_any_length() -> None:
    """The pass is a sum over positions, however it is cut; every cut in one program."""
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.normal(size=shape).astype(np.float32)
    batches = [random_batch(rng, rows, length, 5) for rows, length, _ in CUTS]
    params = [(array(rows, length, 4), array(5, 4)) for rows, length, _ in CUTS]

    def f(chunk: int, batch: Any, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        loss = over_vocab(chunk, ce=(1.0, next_token()), z=(0.1, z_loss()))
        return value(loss, Obs(batch, jnp.int32(0), {STUDENT: hidden}, {STUDENT: Unembedding({"kernel": kernel}, num_vocab=5)}))

    def every(params: Any, batches: Any) -> Any:
        return [jax.value_and_grad(f, (2, 3))(cut[2], batch, *p) for cut, batch, p in zip(CUTS, batches, params, strict=True)]

    for cut, got, batch, (hidden, kernel) in zip(CUTS, jax.jit(every)(params, batches), batches, params, strict=True):
        logits, mask = hidden @ kernel.T, np.asarray(batch.loss_mask) / np.asarray(batch.loss_mask).sum()
        z = np.log(np.exp(logits).sum(-1, keepdims=True))
        one_hot = np.eye(5)[np.asarray(batch.labels)]
        want = np.sum(((z - (one_hot * logits).sum(-1, keepdims=True) + 0.1 * z**2)[..., 0]) * mask)
        d_logits = (np.exp(logits - z) * (1 + 0.2 * z) - one_hot) * mask[..., None]
        np.testing.assert_allclose(got[0], want, rtol=1e-5, err_msg=str(cut))
        np.testing.assert_allclose(got[1][0], d_logits @ kernel, atol=2e-6, err_msg=str(cut))
        np.testing.assert_allclose(got[1][1], np.einsum("BTV,BTD->VD", d_logits, hidden), atol=5e-6, err_msg=str(cut))


# ------------------------------------------------------------------------------- the work of the pass


def matmuls(wrt: tuple[str, ...], term: tuple[Any, Any] = (1.0, next_token())) -> int:
    """Matmuls per chunk of a pass whose gradient is taken with respect to `wrt`."""
    params = {"hidden": jnp.ones((2, 8, 4)), "kernel": jnp.ones((6, 4))}

    def f(trained: Any) -> jax.Array:
        p = params | trained
        obs = Obs(
            batch_of(np.zeros((2, 8), int)),
            jnp.int32(0),
            {STUDENT: p["hidden"]},
            {STUDENT: Unembedding({"kernel": p["kernel"]}, num_vocab=6)},
        )
        loss = over_vocab(2, loss=term)
        return loss.update(obs, (), loss.weigh(obs.batch))[0]

    trained = {name: params[name] for name in wrt}
    return str(jax.make_jaxpr(jax.grad(f) if wrt else f)(trained)).count("dot_general[")


def test_only_the_matmuls_that_are_wanted() -> None:
    """Logits, d hidden, d unembedding: three for training, two under a frozen head, one for an evaluation or a metric."""
    assert matmuls(("hidden", "kernel")) == 3
    assert matmuls(("hidden",)) == 2
    assert matmuls(("kernel",)) == 2
    assert matmuls(()) == 1
    assert matmuls(("hidden", "kernel"), (0.0, accuracy())) == 1


def lora_dot(name: str, spec: str, x: jax.Array, leaves: Any) -> jax.Array:
    return jnp.einsum(spec, x, leaves["kernel"]) + x @ leaves["a"] @ leaves["b"]


def test_any_dot_may_be_the_head() -> None:
    """LoRA on the head, with a frozen kernel: its factors get the gradient of the dense formula, the kernel none."""
    rng = np.random.default_rng(7)
    hidden, batch = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32), random_batch(rng, 2, 5, 6)
    kernel = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    factors = {"a": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32), "b": jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)}

    def ours(trained: Any) -> jax.Array:
        head = Unembedding({"kernel": kernel, "a": trained["a"], "b": trained["b"]}, 0.5, 3.0, 6, lora_dot)
        return value(over_vocab(2, loss=(1.0, next_token())), Obs(batch, jnp.int32(0), {STUDENT: trained["hidden"]}, {STUDENT: head}))

    def dense(trained: Any) -> jax.Array:
        logits = 3.0 * jnp.tanh(0.5 * (trained["hidden"] @ (kernel.T + trained["a"] @ trained["b"])) / 3.0)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.labels[..., None], -1)[..., 0]
        return -jnp.sum(picked * batch.loss_mask) / batch.loss_mask.sum()

    both = (jax.jit(jax.value_and_grad(f))({"hidden": hidden, **factors}) for f in (ours, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *both)


def test_bfloat16_gradients_add_up_in_float32() -> None:
    """256 chunks of a bf16 model: the sum is as exact as one of them. A bf16 running sum would lose 1/256 terms altogether."""
    length = 256
    hidden, kernel = jnp.ones((1, length, 2), jnp.bfloat16), jnp.zeros((4, 2), jnp.bfloat16)

    def f(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        head = Unembedding({"kernel": kernel}, num_vocab=4, dot=dot_in("bfloat16"))
        return value(
            over_vocab(1, loss=(1.0, next_token())),
            Obs(batch_of(np.zeros((1, length), int)), jnp.int32(0), {STUDENT: hidden}, {STUDENT: head}),
        )

    scalar, (d_hidden, d_kernel) = jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, kernel)
    assert (scalar.dtype, d_hidden.dtype, d_kernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(scalar, np.log(4), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(d_kernel, np.float32)[:, 0], np.array([-0.75, 0.25, 0.25, 0.25]), rtol=2**-8)


# ------------------------------------------------------------------------------------------ on a mesh

ROWS, LENGTH, WIDTH, LOGICAL, PADDED = 8, 12, 16, 77, 80


def mesh_world(lora: bool) -> tuple[Any, Any, Any]:
    """Params, frozen teacher and batch; kernels padded from LOGICAL to PADDED rows, with LoRA factors beside them or not."""
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.normal(size=shape).astype(np.float32)
    head = {"kernel": (PADDED, WIDTH)} | ({"a": (WIDTH, 2), "b": (2, PADDED)} if lora else {})
    model = lambda: {"hidden": array(ROWS, LENGTH, WIDTH), "unembed": {name: array(*shape) for name, shape in head.items()}}
    params, frozen = model(), {"t": model()}
    top = TopK(rng.integers(0, LOGICAL, (ROWS, LENGTH, 3)), -1.5 - rng.random((ROWS, LENGTH, 3)), rng.random((ROWS, LENGTH)))
    return params, frozen, random_batch(rng, ROWS, LENGTH, LOGICAL, extras=jax.tree.map(jnp.asarray, top.extras("top")))


def mesh_loss(dot: Any = dot_in("float32"), **more: Any) -> Any:
    """Every way in which a token loss meets the vocabulary."""
    kl, top = (0.5, forward_kl("t", 2.0)), (0.3, soft_ce("top", "uniform"))
    loss = over_vocab(4, ce=(1.0, next_token(0.1)), z=(1e-2, z_loss()), kl=kl, top=top, right=(0.0, accuracy()), **more)
    look = lambda p, b: Obs(b, jnp.int32(0), {STUDENT: p["hidden"]}, {STUDENT: Unembedding(p["unembed"], 0.7, 5.0, LOGICAL, dot)})
    loss_fn = as_loss_fn(look, loss, [teacher(look, "t")])
    return jax.value_and_grad(lambda p, frozen, b: loss_fn(p, frozen, b, ())[0])


@cache
def one_device(dot: Any = dot_in("float32")) -> Any:
    return jax.jit(mesh_loss(dot))(*mesh_world(dot is lora_dot))


def on_mesh(shape: tuple[int, int, int], f: Any, lora: bool = False) -> tuple[Any, list[hlo.Collective]]:
    """Value and gradients, and what the program communicates."""
    mesh = sharding.make_mesh(MeshConfig(*shape))
    params, frozen, batch = mesh_world(lora)
    layout = {"hidden": P(("slice", "data"), None, "model"), "kernel": P("model", "data"), "a": P(), "b": P()}
    place = jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, layout[path[-1].key]), params)
    with jax.set_mesh(mesh):
        args = jax.device_put((params, frozen, batch), (place, {"t": place}, sharding.batch_sharding(mesh)))
        program = jax.jit(f, out_shardings=(None, place)).lower(*args).compile()
        return program(*args), hlo.collectives(str(program.as_text()), mesh.shape)


def complaints(found: list[hlo.Collective], models: int) -> list[str]:
    """What the vocabulary pass must not communicate."""
    gathers = hlo.select(found, "all-gather", "all-to-all", axis="model")
    wrong = [f"the vocabulary is gathered over model: {c}" for c in gathers if any({PADDED, LOGICAL} & set(a.shape) for a in c.results)]
    for axis in ("data", "slice"):
        wrong += [f"traffic over {axis} inside the chunk loop: {c}" for c in hlo.select(found, axis=axis, in_loop=True)]
        kernel = PADDED * WIDTH // models
        whole = [a for c in hlo.select(found, "all-gather", axis=axis) for a in c.results if a.size >= kernel]
        if len(whole) > 2:  # the student's and the teacher's
            wrong.append(f"{len(whole)} gathers of an unembedding over {axis}")
        reduced = [a for c in hlo.select(found, "all-reduce", "reduce-scatter", axis=axis) for a in c.operands if a.size > 64]
        if len(reduced) > 1:
            wrong.append(f"{len(reduced)} gradient reductions over {axis}")
    return wrong


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (1, 1, 8), (2, 2, 2)])
def test_sharded_equals_one_device_with_the_least_traffic(shape: tuple[int, int, int], capfd: Any) -> None:
    """No gather over `model` of unembedding or logits; over `data` one gather per unembedding and one reduction, none per chunk."""
    result, found = on_mesh(shape, mesh_loss())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6 * float(jnp.abs(b).max())), result, one_device())
    assert complaints(found, shape[2]) == []
    assert len(hlo.select(found, "reduce-scatter", axis="data")) == (shape[1] > 1)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_bfloat16_on_a_mesh() -> None:
    """Equal to one device, and every sum over data shards is float32: a bf16 one would abort XLA:CPU."""
    result, found = on_mesh((2, 2, 2), mesh_loss(dot_in("bfloat16")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max())), result, one_device(dot_in("bfloat16")))
    assert complaints(found, 2) == []
    assert {a.dtype for c in hlo.select(found, "all-reduce", "reduce-scatter", axis="data") for a in c.operands} == {"f32"}


def test_any_dot_on_a_mesh() -> None:
    """LoRA on the head: each of its leaves is reduced once, after the loop, by the pass's own derivative of that `dot`."""
    result, found = on_mesh((1, 4, 2), mesh_loss(lora_dot), lora=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6 * float(jnp.abs(b).max())), result, one_device(lora_dot))
    assert hlo.select(found, axis="data", in_loop=True) == []


def test_a_token_loss_that_looks_at_the_whole_vocabulary_is_caught() -> None:
    whole = lambda view: jnp.max(jnp.sort(sharding.constrain(view.logits(), "B T .")[..., :LOGICAL], axis=-1), axis=-1)
    _, found = on_mesh((1, 2, 4), mesh_loss(most=(0.1, whole)))
    assert any("gathered over model" in line for line in complaints(found, 4))


def test_a_pass_left_to_the_partitioner_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab, "_on_mesh", vocab._chunks)
    _, found = on_mesh((1, 4, 2), mesh_loss())
    assert any("inside the chunk loop" in line for line in complaints(found, 2))
