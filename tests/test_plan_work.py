"""Work counted on jaxprs: every rule on a program whose answer is known by hand. Tracing only, nothing is compiled."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jaxllm import pretrain
from jaxllm.config import DataConfig, LayerKind, LossConfig, ModelConfig, OptimConfig, TrainConfig
from jaxllm.flops import REMAT, of_token, utilisation, visible_keys
from jaxllm.models import stack
from jaxllm.plan import gpus, kernels
from jaxllm.plan.work import Work, count


def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def work(f, *args, **options) -> Work:
    return count(jax.make_jaxpr(f)(*args), **options)


# --------------------------------------------------------------------------------------------- rules


def test_matmuls_in_a_scan_count_as_often_as_they_run():
    layers = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    assert work(layers, array(4, 8), array(5, 8, 8)).flops == 5 * 2 * 4 * 8 * 8


def test_scans_in_scans_multiply():
    inner = lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x @ x, x)
    assert work(lambda x: jax.lax.fori_loop(0, 7, lambda _, x: inner(x), x), array(4, 4)).flops == 3 * 7 * 2 * 4**3


def test_a_batched_product_and_a_product_over_two_dimensions():
    assert work(lambda a, b: jnp.einsum("BTNH,BSNH->BNTS", a, b), array(2, 3, 4, 5), array(2, 7, 4, 5)).flops == 2 * 2 * 4 * 3 * 7 * 5
    assert work(lambda a, b: jnp.einsum("BTD,BTF->DF", a, b), array(2, 3, 4), array(2, 3, 5)).flops == 2 * 6 * 4 * 5


def test_a_convolution():
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert work(conv, array(2, 10, 10, 3), array(3, 3, 3, 7)).flops == 2 * (2 * 8 * 8 * 7) * (3 * 3 * 3)
    grouped = lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=6)
    assert work(grouped, array(1, 9, 6), array(4, 1, 6)).flops == 2 * (6 * 6) * 4


def test_the_gradient_of_a_matmul_is_three_of_it():
    loss = lambda w, x: jnp.sum((x @ w) ** 2)
    assert work(jax.grad(loss, (0, 1)), array(8, 16), array(4, 8)).flops == 3 * 2 * 4 * 8 * 16
    assert work(jax.grad(loss), array(8, 16), array(4, 8)).flops == 2 * 2 * 4 * 8 * 16, "no gradient of x, no product for it"


def test_what_checkpoint_recomputes_counts_twice_and_is_named():
    def train(block):
        return jax.value_and_grad(lambda w, x: jnp.sum(block(w, x)), (0, 1))

    def block(w, x):
        return jnp.sin(x @ w) @ w

    once = 2 * 4 * 8 * 8
    plain = work(train(block), array(8, 8), array(4, 8))
    assert plain.flops == 3 * 2 * once and plain.recomputed_flops == 0
    remat = work(train(jax.checkpoint(block)), array(8, 8), array(4, 8))
    assert remat.flops == 7 * once, "the first product again; the second one's result is in nobody's gradient"
    assert remat.recomputed_flops == once


def test_what_nobody_reads_is_not_work():
    assert work(lambda x: (x @ x, x + 1)[1], array(4, 4)).flops == 0
    unread = lambda x: jax.lax.scan(lambda c, _: ((c[0] + 1, c[1] @ c[1]), None), (x, x), None, length=3)[0][0]
    assert work(unread, array(4, 4)).flops == 0


def test_a_while_loop_counts_its_trips_where_they_are_written_down():
    start = lambda x, n: jax.lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] @ s[1]), (2, x))[1]
    assert work(lambda x: start(x, 9), array(4, 4)).flops == 7 * 2 * 4**3
    assert (
        work(lambda x: jax.lax.while_loop(lambda s: s[0] <= 9, lambda s: (s[0] + 1, s[1] @ s[1]), (2, x))[1], array(4, 4)).flops == 8 * 128
    )
    unknown = work(lambda x, n: start(x, n), array(4, 4), array(dtype="int32"))
    assert unknown.flops == 2 * 4**3 and "unknown length" in unknown.notes[0]


def test_a_branch_counts_as_its_most_expensive_side_and_says_so():
    either = lambda p, x: jax.lax.cond(p, lambda x: x @ x, lambda x: x @ x @ x, x)
    found = work(either, array(dtype="bool"), array(4, 4))
    assert found.flops == 2 * 2 * 4**3 and "most expensive" in found.notes[0]
    assert not work(lambda p, x: jax.lax.cond(p, lambda x: x @ x, lambda x: x.T @ x, x), array(dtype="bool"), array(4, 4)).notes


def test_calls_are_entered():
    @jax.custom_vjp
    def double(x):
        return x @ x

    double.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x + x @ g,))
    once = 2 * 4**3
    assert work(lambda x: jax.jit(double)(x), array(4, 4)).flops == once
    assert work(jax.value_and_grad(lambda x: double(jax.jit(double)(x)).sum()), array(4, 4)).flops == 6 * once
    assert work(lambda x: jax.nn.relu(jax.jit(lambda x: x @ x)(x)), array(4, 4)).flops == once
    shared = jax.jit(lambda x: x @ x)
    assert work(lambda x: shared(shared(x)), array(4, 4)).flops == 2 * once, "one body, entered twice"


def mesh_of(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.parametrize(("axes", "shards"), [({"a"}, 2), ({"a", "b"}, 8)])
def test_a_shard_counts_as_often_as_there_are_shards(axes, shards):
    with jax.sharding.use_abstract_mesh(mesh_of(a=2, b=4)):
        f = jax.shard_map(lambda x, w: x @ w, in_specs=(P(tuple(axes)), P()), out_specs=P(tuple(axes)), axis_names=axes)
        found = work(f, array(16, 8), array(8, 8))
    assert found.flops == 2 * 16 * 8 * 8, "every shard has its rows"
    with jax.sharding.use_abstract_mesh(mesh_of(a=2, b=4)):
        whole = jax.shard_map(lambda w: w @ w, in_specs=P(), out_specs=P(), axis_names=axes, check_vma=False)
        assert work(whole, array(8, 8)).flops == shards * 2 * 8**3, "every shard does the same"


def matmul_kernel(x, y, out):
    out[...] = x[...] @ y[...]


def causal_kernel(x, y, out):
    @pl.when(pl.program_id(0) > 0)
    def _():
        out[...] = x[...] @ y[...]


def test_a_kernel_is_its_body_on_its_grid_or_the_formula_of_its_name():
    def run(kernel):
        block = pl.BlockSpec((2, 4), lambda i: (i, 0))
        call = pl.pallas_call(
            kernel, out_shape=array(8, 4), grid=(4,), in_specs=[block, pl.BlockSpec((4, 4), lambda i: (0, 0))], out_specs=block,
            name="rows",
        )  # fmt: skip
        return lambda x, y: jax.lax.fori_loop(0, 3, lambda _, x: call(x, y), x)

    args = array(8, 4), array(4, 4)
    whole = 3 * 2 * 8 * 4 * 4
    assert (found := work(run(matmul_kernel), *args)).kernel_flops == whole and found.product_flops == 0
    assert (found := work(run(causal_kernel), *args)).kernel_flops == whole and "kernel rows: a branch" in found.notes[0]
    assert work(run(causal_kernel), *args, kernels={"ro.*": lambda _, whole, __: whole * 3 // 4}).flops == whole * 3 // 4
    assert work(run(matmul_kernel), *args, kernels={"other": lambda *_: 0}).flops == whole


def test_splash_attention_counts_the_blocks_that_its_mask_shows():
    """4 × 4 blocks of a causal row: 10 run. Forward 2 products, backward 4 for keys and values and 3 for queries."""
    masks = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((512, 512)) for _ in range(2)])
    kernel = splash_attention_kernel.make_splash_mha(masks, head_shards=1, q_seq_shards=1)
    layer = lambda x, _: (jax.vmap(kernel)(x, x, x), None)
    loss = lambda q: jax.lax.scan(layer, q, None, length=3)[0].astype(jnp.float32).sum()
    found = work(jax.value_and_grad(loss), array(5, 2, 512, 128, dtype="bfloat16"), kernels=kernels.attention())
    assert found.kernel_flops == 3 * (2 + 4 + 3) * (2 * 5 * 2 * 512 * 512 * 128) * 10 // 16 and not found.notes


def test_a_formula_sees_constants_wherever_they_are_written():
    """At the top, handed down through a loop; in the body of a backward pass, which brings its own; as the result of a call."""
    table = np.arange(4.0, dtype=np.float32)
    found: list[object] = []

    @jax.custom_vjp
    def double(x):
        return x * 2

    double.defvjp(lambda x: (x * 2, None), lambda _, g: (jnp.arctan2(g, table),))
    kernel = {"atan2": lambda equation, whole, constants: found.append(constants[1]) or 1}
    backward = jax.grad(lambda x: jax.lax.scan(lambda x, _: (double(x), None), x, None, length=3)[0].sum())
    assert count(jax.jit(backward).trace(array(4)).jaxpr, kernels=kernel).kernel_flops == 3
    forward = lambda x: jax.lax.scan(lambda x, _: (jnp.arctan2(x, table), None), x, None, length=5)[0]
    assert count(jax.jit(forward).trace(array(4)).jaxpr, kernels=kernel).kernel_flops == 5
    handed = lambda x: forward_with(x, jax.lax.optimization_barrier(jax.jit(lambda: jnp.asarray(table))()))  # as MaxText hands its masks
    forward_with = lambda x, table: jax.lax.scan(lambda x, _: (jnp.arctan2(x, table), None), x, None, length=7)[0]
    assert count(jax.jit(handed).trace(array(4)).jaxpr, kernels=kernel).kernel_flops == 7
    assert found and all(np.array_equal(seen, table) for seen in found)


def test_formula_of_cudnn():
    formulas = kernels.attention(visible=0.5)
    shapes = [SimpleNamespace(aval=array(2, 16, 4, 8)), SimpleNamespace(aval=array(2, 32, 2, 8))]
    equation = SimpleNamespace(invars=shapes, params={"layout": 0})
    one = 2 * 2 * 4 * 16 * 32 * 8
    assert formulas[r"dot_product_attention_fwd(_wrapper)?"](equation, 0, []) == 2 * one / 2
    assert formulas[r"dot_product_attention_bwd(_wrapper)?"](equation, 0, []) == 5 * one / 2


# ----------------------------------------------------------------------------------------------- laws


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 40), width=st.integers(1, 9), depth=st.integers(1, 3))
def test_a_scan_is_its_body_times_its_length(n: int, width: int, depth: int):
    def body(x):
        for _ in range(depth):
            x = jnp.tanh(x @ x)
        return x

    once = work(body, array(width, width))
    scan = work(lambda x: jax.lax.scan(lambda x, _: (body(x), None), x, None, length=n)[0], array(width, width))
    assert (scan.flops, scan.other_flops, scan.hbm_bytes) == (n * once.flops, n * once.other_flops, n * once.hbm_bytes)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=3, max_size=3), rows=st.integers(1, 5))
def test_vmap_and_jit_change_nothing_but_the_number_of_rows(sizes: list[int], rows: int):
    a, b, c = sizes
    f = lambda x, y: x @ y
    assert work(jax.vmap(f), array(rows, a, b), array(rows, b, c)).flops == rows * work(jax.jit(f), array(a, b), array(b, c)).flops


# ---------------------------------------------------------------------------------------- the memory


def test_bytes_of_a_matmul_of_a_fused_epilogue_and_of_a_chain():
    x, w = array(4, 8), array(8, 16)
    assert work(lambda x, w: x @ w, x, w).hbm_bytes == 4 * (32 + 128 + 64)
    assert work(lambda x, w: jnp.tanh(x @ w) * 2, x, w).hbm_bytes == 4 * (32 + 128 + 64), "the epilogue is free"
    assert work(lambda x: jnp.tanh(x * 2) + x, x).hbm_bytes == 4 * (32 + 32), "one pass"
    # tanh(x) is read by the product and by the sum that waits for it: one pass before, which writes it, and one after.
    chain = lambda x: (y := jnp.tanh(x)) + y @ y
    assert work(chain, array(4, 4)).hbm_bytes == 64 * (2 + 3 - 1 + 2) - 64, "x, tanh x; read once by the product, once by the sum; the sum"


def test_bytes_of_views_slices_and_loops():
    assert work(lambda x, w: x.astype(jnp.bfloat16) @ w.T, array(4, 8), array(16, 8, dtype="bfloat16")).hbm_bytes == 2 * (32 + 128 + 64)
    rows = lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, 2) * 2
    assert work(rows, array(1000, 8), array(dtype="int32")).hbm_bytes == pytest.approx(2 * 2 * 8 * 4, abs=16)
    put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, 3, 0)
    assert work(put, array(1000, 8), array(2, 8)).hbm_bytes == 2 * 2 * 8 * 4
    layers = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    assert work(layers, array(4, 8), array(3, 8, 8)).hbm_bytes == 3 * 4 * (32 + 64 + 32)


def test_bytes_of_a_gathered_weight():
    x, w = array(64, 8), array(8, 16)
    mesh = {"slice": 1, "data": 4, "model": 2}
    found = work(lambda w, x: x @ w, w, x, from_batch=[False, True], mesh=mesh).hbm_bytes
    assert found == 4 * (64 * 8 / 8 + 2 * 8 * 16 / 2 + 64 * 16 / 8), (
        "all chips share rows; the weight is written and read by each row of chips"
    )
    gradient = work(lambda x, g: x.T @ g, x, array(64, 16), from_batch=[True, True], mesh=mesh).hbm_bytes
    assert gradient == 4 * (64 * 8 / 8 + 64 * 16 / 8 + 8 * 16 / 2), "each group of 2 makes its own sum"


# ------------------------------------------------------------------------------------------ the model


MODEL = ModelConfig(num_layers=6, width=64, num_heads=4, num_kv_heads=2, head_size=16, ff_width=256, vocab_size=64, tied_embeddings=False)
CONFIG = TrainConfig(
    model=MODEL, data=DataConfig(sequence_length=32, batch_size=8), loss=LossConfig(chunk=16), precision="float32", remat="none"
)
TOKENS = 8 * 32


@cache
def traced(config: TrainConfig, mesh: tuple[int, int, int] = (1, 1, 1)) -> gpus.Traced:
    return gpus.trace(pretrain.experiment(config, precision="float32"), dict(zip(("slice", "data", "model"), mesh, strict=True)))


def test_every_remat_policy_says_what_it_keeps():
    assert REMAT.keys() == stack.REMAT.keys() | {"none"} == set(get_args(get_type_hints(TrainConfig)["remat"]))


@pytest.mark.parametrize("remat", REMAT)
def test_executed_work_of_a_train_step_is_what_arithmetic_says(remat):
    """Short rows are dense, so attention is T × T. A table is looked up, not multiplied: 6N counts it, the step does not."""
    found = traced(replace(CONFIG, remat=remat))
    expected = of_token(MODEL, found.num_params, 32, remat=remat).executed - 6 * 64 * 64
    norms = 6 * 64 * (2 * 6 + 1)  # of the parameters, those that multiply nothing
    assert found.work.flops == pytest.approx(TOKENS * (expected - norms), rel=1e-12)
    if remat == "full":
        ratio = found.work.flops / (6 * found.num_params * TOKENS)
        assert 1.2 < ratio < 8 / 6 + 0.1, "about 8N for 6N"


def test_frozen_leaves_and_other_models_count_alike_in_a_plan_and_in_a_run():
    """Feed-forward kernels are frozen, and a teacher takes 1e5: 6N + 12LHT, less 2 for each frozen parameter, and the teacher's."""
    experiment = pretrain.experiment(
        replace(CONFIG, remat="full", optim=OptimConfig(freeze=((r"layers/mlp/.*", True),))), precision="float32"
    )
    plan = gpus.plan(replace(experiment, other_flops_per_token=1e5), gpus.parse("h100:1"), "float32")
    frozen = 6 * 3 * 64 * 256
    attention = 12 * 6 * 64 * 32
    assert plan.roofline.model_flops == TOKENS * (6 * plan.num_params - 2 * frozen + attention + 1e5)
    counted = of_token(MODEL, plan.num_params, 32, num_frozen=frozen, others=1e5, remat="full")
    plain = of_token(MODEL, plan.num_params, 32, remat="full")
    assert counted.recomputed == plain.recomputed < plain.forward, "a teacher is not computed again, frozen leaves are"


def test_recomputed_work_is_the_difference_between_two_policies():
    none, full = traced(CONFIG), traced(replace(CONFIG, remat="full"))
    assert none.work.recomputed_flops == 0
    assert full.work.recomputed_flops == full.work.flops - none.work.flops > 0


def test_micro_batches_and_sharding_do_the_same_work():
    plain = traced(CONFIG).work
    micro = traced(replace(CONFIG, optim=replace(CONFIG.optim, num_microbatches=4))).work
    sharded = traced(CONFIG, (2, 2, 2)).work
    assert plain.flops == micro.flops == sharded.flops
    assert micro.hbm_bytes > plain.hbm_bytes, "weights are read once for each micro-batch"
    assert plain.hbm_bytes / 8 < sharded.hbm_bytes < plain.hbm_bytes


def test_palm_540b_as_published():
    """arXiv:2204.02311: 46.2 % MFU at 238.3K tokens/s on 6144 chips of 275 TFLOP/s, 45.7 % without attention."""
    palm = ModelConfig(num_layers=118, width=18432, num_heads=48, num_kv_heads=1, head_size=256, ff_width=73728, vocab_size=256_000)
    peak = 6144 * 275e12
    flops = of_token(palm, 540.35e9, 2048).model
    assert utilisation(238.3e3 * flops, 1.0, peak) == pytest.approx(0.4623, abs=5e-5)
    assert utilisation(238.3e3 * of_token(palm, 540.35e9, 0).model, 1.0, peak) == pytest.approx(0.4573, abs=5e-5)
    assert of_token(palm, 540.35e9, 2048, causal=True).model == 6 * 540.35e9 + 12 * 118 * 12288 * 1024.5


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 30), window=st.none() | st.integers(1, 40))
def test_visible_keys_are_what_a_mask_shows(length: int, window: int | None):
    seen = sum(0 <= i - j < (window or length) for i in range(length) for j in range(length))
    assert visible_keys(length, window) == pytest.approx(seen / length)


def test_windows_count_where_attention_is_counted_causally():
    model = replace(MODEL, layer_pattern=(LayerKind(window=8), LayerKind()))
    assert of_token(model, 0, 32).model == 12 * 64 * 6 * 32
    assert of_token(model, 0, 32, causal=True).model == pytest.approx(12 * 64 * 3 * (visible_keys(32) + visible_keys(32, 8)))
