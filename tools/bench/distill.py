"""Distillation from a teacher in the step: temporary memory against dense logits, and time against its parts.

    python -m tools.bench.distill                    # memory at V 128,256; time of a small student with a small teacher
    python -m tools.bench.distill --memory_only      # compiles, and runs nothing

Memory: XLA's `temp_size_in_bytes` of value and gradient of the forward KL, from final hidden states and the two heads on, against
the same with both models' logits whole. Time: the whole training step, in turn with the student's own step on next-token loss and
the teacher's forward pass alone; the median over rounds of distilled / (student + teacher). Limits: 15 % of the memory, 1.1 × the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import distill, pretrain, sharding
from jaxllm.cli import setup_jax
from jaxllm.config import DataConfig, DistillConfig, MeshConfig, ModelConfig, TrainConfig
from jaxllm.contract import STUDENT, Batch, Obs, Params, Unembedding
from jaxllm.losses.core import as_loss_fn
from jaxllm.losses.divergences import KINDS
from jaxllm.losses.vocab import over_vocab
from jaxllm.step import program

MIB = 2**20


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 2), ("length", 1024), ("width", 512), ("vocab", 128_256), ("chunk", 64), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory_only", action="store_true")
    args = parser.parse_args()
    setup_jax()
    memory(args.rows, args.length, args.width, args.vocab, args.chunk)
    if not args.memory_only:
        times(args.rounds)


def memory(rows: int, length: int, width: int, vocab: int, chunk: int) -> None:
    """A line for each divergence, and for the dense forms."""
    shape = jax.ShapeDtypeStruct
    f32, i32 = jnp.float32, jnp.int32
    params = {"hidden": shape((rows, length, width), f32), "kernel": shape((vocab, width), f32)}
    ids = shape((rows, length), i32)
    batch: Any = Batch(ids, ids, shape((rows, length), f32), ids, ids)

    def apply(params: Params, batch: Batch) -> Obs:
        head = lambda kernel: Unembedding({"kernel": kernel}, num_vocab=vocab)
        hidden = {STUDENT: params["hidden"], "t": params["teacher_hidden"]}
        return Obs(batch, jnp.int32(0), hidden, {STUDENT: head(params["kernel"]), "t": head(params["teacher_kernel"])})

    def chunked(kind: str) -> Callable[..., Any]:
        loss = as_loss_fn(apply, over_vocab(chunk=chunk, kl=(1.0, KINDS[kind]("t"))))
        return lambda student, teacher, batch: loss({**student, **teacher}, {}, batch, ())[0]

    def dense(student: Params, teacher: Params, batch: Batch) -> Any:
        logits = jnp.einsum("BTD,VD->BTV", student["hidden"], student["kernel"])
        theirs = jax.lax.stop_gradient(jnp.einsum("BTD,VD->BTV", teacher["teacher_hidden"], teacher["teacher_kernel"]))
        log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(theirs)
        return jnp.sum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) * batch.loss_mask) / jnp.sum(batch.loss_mask)

    teacher = {f"teacher_{name}": leaf for name, leaf in params.items()}
    size = lambda f: jax.jit(jax.value_and_grad(f)).lower(params, teacher, batch).compile().memory_analysis().temp_size_in_bytes
    whole = size(dense)
    print(f"forward KL against a teacher's hidden states, B {rows}, T {length}, D {width}, V {vocab}, float32")
    print(f"  {'dense':24} {whole / MIB:8.0f} MiB    (one array of logits: {rows * length * vocab * 4 / MIB:.0f} MiB)")
    for kind in KINDS:
        found = size(chunked(kind))
        print(f"  {kind + f', chunk {chunk}':24} {found / MIB:8.0f} MiB    {found / whole:6.1%} of dense", flush=True)


def times(rounds: int) -> None:
    """Distilled step against the student's own and the teacher's forward pass."""
    student = ModelConfig(
        num_layers=6, width=256, num_heads=8, num_kv_heads=8, head_size=32, ff_width=704, vocab_size=16_384, max_length=512,
        tied_embeddings=True,
    )  # fmt: skip
    model = replace(student, num_layers=8, width=384, ff_width=1024)
    config = TrainConfig(model=student, data=DataConfig(batch_size=8, sequence_length=256), mesh=MeshConfig(data=1), remat="none")
    taught = replace(config, distill=DistillConfig(teachers=(("bench", 1.0),)))
    mesh = sharding.make_mesh(config.mesh)
    plain = pretrain.experiment(config, precision="float32")
    teacher = distill.of_config("bench", model, "float32")
    both = distill.experiment(replace(plain, config=taught), "float32", [teacher])
    ids = jax.random.randint(jax.random.key(0), (8, 256), 0, student.vocab_size)
    ones = jnp.ones(ids.shape, jnp.int32)
    batch = Batch(ids, jnp.roll(ids, -1, 1), jnp.ones(ids.shape), ones, jnp.broadcast_to(jnp.arange(256), ids.shape))
    frozen = {"teacher": jax.jit(lambda: teacher.load(mesh))()}
    forward = jax.jit(lambda params: teacher.lm(params, batch).hidden)
    runs: dict[str, Callable[[], Any]] = {"teacher": lambda: forward(frozen["teacher"])}
    for name, experiment, given in (("student", plain, {}), ("distilled", both, frozen)):
        made = program(experiment, mesh)
        state = {"now": made.make_state()}

        def step(made: Any = made, state: dict[str, Any] = state, given: Any = given) -> Any:
            state["now"], metrics = made.step(state["now"], given, batch)
            return metrics["loss"]

        runs[name] = step
    laps: dict[str, list[float]] = {name: [] for name in runs}
    for lap in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if lap:
                laps[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in laps.items()}
    ratios = [d / (s + t) for d, s, t in zip(laps["distilled"], laps["student"], laps["teacher"], strict=True)]
    print("a step of 8 × 256 tokens, V 16,384: " + ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in seconds.items()))
    print(f"distilled / (student's own step + teacher's forward pass): {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
