"""Chips, links, roofline, the arithmetic of memory and traffic, plans for GPUs, the search, and what is printed."""

from __future__ import annotations

import io
import json
import math
from dataclasses import fields, replace
from functools import cache, partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import chips, pretrain, sharding
from jaxllm.chips import GIB
from jaxllm.config import ConfigError, DataConfig, LossConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from jaxllm.plan import arithmetic, command, gpus, links, lower, search, show
from jaxllm.plan.arithmetic import Buffer
from jaxllm.plan.child import CompilerFailed, OutOfMemory
from jaxllm.plan.links import Collective
from jaxllm.plan.result import Plan, what_would_fit
from jaxllm.plan.roofline import roofline
from jaxllm.plan.work import Work
from jaxllm.step import Experiment

# --------------------------------------------------------------------------------------------- chips


def test_every_figure_of_a_chip_has_a_source():
    for chip in chips.CHIPS:
        numbers = {f.name for f in fields(chip)} - {"name", "device_kind", "sources"}
        assert chip.sources.keys() == numbers and all(chip.sources.values()), chip.name
        assert all(math.isfinite(getattr(chip, name)) and getattr(chip, name) >= (name != "torus_dims") for name in numbers)


def test_chips_by_name():
    assert chips.find("V5E").name == "v5e" and chips.find("a100-80").memory_bytes == 80 * GIB and chips.find("ironwood").name == "v7"
    assert len({chip.name for chip in chips.CHIPS}) == len(chips.CHIPS)
    with pytest.raises(ConfigError, match=r"no chip 'v5x'; did you mean 'v5\w'\?; chips: v4, v5e, v5p"):
        chips.find("v5x")


# --------------------------------------------------------------------------------------------- links


V4, H100 = chips.find("v4"), chips.find("h100")


def test_an_all_gather_of_known_size_on_a_ring():
    cost = links.torus(V4, (4, 4, 4), (True,) * 3, {"slice": 1, "data": 16, "model": 4})
    assert cost(Collective("all-gather", ("model",), 8e9)) == pytest.approx({"links model": 3 / 4 * 8e9 / (2 * 45e9)})
    assert cost(Collective("all-gather", ("data",), 8e9)) == pytest.approx({"links data": 15 / 16 * 8e9 / (4 * 45e9)}), "two dimensions"
    assert cost(Collective("all-reduce", ("model",), 8e9, count=5)) == pytest.approx({"links model": 5 * 2 * 3 / 4 * 8e9 / 90e9})
    assert cost(Collective("collective-permute", ("model",), 9e9)) == {"links model": 9e9 / 45e9}
    assert cost(Collective("all-to-all", ("model",), 9e9)) == pytest.approx({"links model": 4 * 9e9 / (8 * 45e9)})
    line = links.torus(V4, (2, 2, 4), (False,) * 3, {"data": 4, "model": 4})
    assert line(Collective("all-gather", ("data",), 8e9)) == pytest.approx({"links data": 3 / 4 * 8e9 / 45e9}), "no ring: one way"


def test_a_stage_of_a_sum_uses_the_links_of_one_dimension():
    """Scattered over rows of a 4 x 4 torus and then over columns: 3/4 of all, then 3/4 of a quarter, on two links of the four."""
    mesh = {"slice": 1, "data": 16, "model": 4}
    cost = links.torus(V4, (4, 4, 4), (True,) * 3, mesh)
    stages = [Collective("reduce-scatter", ("data",), 8e9, group=4), Collective("reduce-scatter", ("data",), 2e9, group=4)]
    assert sum(cost(c)["links data"] for c in stages) == pytest.approx(15 / 16 * 8e9 / (2 * 45e9))
    assert sum(c.moved_bytes(arithmetic.group_size(c, mesh)) for c in stages) == pytest.approx(15 / 16 * 8e9)


def test_what_crosses_slices_is_one_shard():
    cost = links.torus(V4, (4, 4, 4), (True,) * 3, {"slice": 2, "data": 16, "model": 4})
    assert cost(Collective("all-reduce", ("slice",), 1e9)) == pytest.approx({"network": 1e9 / (25e9 / 4)})
    both = cost(Collective("all-reduce", ("data", "slice"), 16e9))
    assert both == pytest.approx({"links data": 2 * 15 / 16 * 16e9 / 180e9, "network": 1e9 / (25e9 / 4)})


def test_a_group_within_a_host_and_one_across():
    cost = links.switch(H100, {"slice": 1, "data": 8, "model": 4}, 8)
    assert cost(Collective("all-gather", ("model",), 9e9)) == pytest.approx({"links": 3 / 4 * 9e9 / 450e9})
    # Each host has two of the eight members: an exchange between two, then half of the bytes between four hosts.
    assert cost(Collective("all-gather", ("data",), 9e9)) == pytest.approx({"links": 1 / 2 * 9e9 / 450e9, "network": 3 / 4 * 4.5e9 / 50e9})


@pytest.mark.parametrize(
    ("shape", "mesh", "lies"),
    [
        ((12, 16, 16), {"data": 256, "model": 12}, {"data": [16, 16], "model": [12]}),
        ((16, 16), {"data": 256, "model": 1}, {"data": [16, 16], "model": []}),
        ((4, 4, 4), {"data": 4, "model": 16}, {"data": [4], "model": [4, 4]}),
        ((16, 16), {"data": 64, "model": 4}, {"data": [16, 4], "model": [4]}),
    ],
)
def test_axes_lie_on_whole_dimensions_of_a_torus_where_they_can(shape, mesh, lies):
    found = links.place(shape, (True,) * len(shape), mesh)
    assert {axis: [length for length, _ in pieces] for axis, pieces in found.items()} == lies
    for axis, pieces in found.items():
        assert math.prod(length for length, _ in pieces) == mesh[axis]
    if mesh == {"data": 64, "model": 4}:
        assert found["model"] == [(4, False)], "a part of a ring is none"


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 64), num_bytes=st.floats(1, 1e12))
def test_a_reduction_is_a_scatter_and_a_gather(size: int, num_bytes: float):
    moved = {kind: Collective(kind, (), num_bytes).moved_bytes(size) for kind in links.KINDS}
    assert moved["all-reduce"] == pytest.approx(moved["all-gather"] + moved["reduce-scatter"])
    assert moved["all-gather"] < num_bytes


# ------------------------------------------------------------------------------------------ roofline


def test_the_slowest_part_binds():
    work = Work(product_flops=64 * 275 * 10**12, hbm_bytes=600e9)
    gather = Collective("all-gather", ("data",), 1.8e11 * 16 / 15)
    cost = links.torus(V4, (4, 4, 4), (True,) * 3, {"slice": 1, "data": 16, "model": 4})
    line = roofline(V4, 64, work, [gather], cost, tokens_per_step=1000, model_flops=work.flops * 0.75)
    assert line.terms == pytest.approx({"compute": 1.0, "memory": 0.5, "links data": 1.0})
    assert (line.seconds, line.serial_seconds) == pytest.approx((1.0, 2.5))
    assert (line.tokens_per_second, line.mfu, line.hfu) == pytest.approx((1000, 0.75, 1.0))
    assert (line.days(86_400_000), line.chip_hours(86_400_000)) == pytest.approx((1.0, 24 * 64))
    slower = roofline(V4, 64, work, [gather, gather], cost, tokens_per_step=1000, model_flops=work.flops * 0.75)
    assert slower.binding == "links data" and slower.mfu == pytest.approx(0.75 / 2)


# ---------------------------------------------------------------------------------------- arithmetic


MODEL = ModelConfig(num_layers=6, width=64, num_heads=4, num_kv_heads=2, head_size=16, ff_width=256, vocab_size=128, tied_embeddings=False)
CONFIG = TrainConfig(
    model=MODEL, data=DataConfig(sequence_length=32, batch_size=16), loss=LossConfig(chunk=16), precision="bfloat16", num_steps=1000
)


def experiment(config: TrainConfig) -> Experiment:
    return pretrain.experiment(config, precision="bfloat16")


@cache
def saved_by_the_step(remat: str, block: str) -> int:
    """Bytes that the scan over layers stacks for the backward pass: read off the traced step."""
    config = replace(CONFIG, remat=remat, model=replace(MODEL, block=block))
    lm = experiment(config).lm
    params = jax.eval_shape(lambda: lm.init(jax.random.key(0)))
    rows = jax.ShapeDtypeStruct((16, 32), np.int32)
    trained = jax.make_jaxpr(jax.grad(lambda p, x: lm.apply(p, x).hidden.astype("float32").sum()))(params, rows)
    forward = next(e for e in trained.jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 6)
    kept = [v.aval for v in forward.outvars if v.aval.shape[:3] == (6, 16, 32)]
    return sum(aval.size * aval.dtype.itemsize for aval in kept if aval.memory_space != jax.memory.Space.Host)


@pytest.mark.parametrize("block", ["serial", "parallel"])
@pytest.mark.parametrize("remat", ["full", "dots", "minimal", "offload", "offload_inputs"])
def test_saved_activations_are_what_the_step_saves(remat, block):
    config = replace(CONFIG, remat=remat, model=replace(MODEL, block=block))
    state = [Buffer(arithmetic.PARAMETERS, 0)]
    [saved] = [b for b in arithmetic.memory(config, search.ONE_CHIP, "bfloat16", state) if b.name == "saved activations"]
    assert saved.num_bytes == saved_by_the_step(remat, block)


def test_one_saved_activation_by_hand():
    """remat full keeps one layer input: 2 rows x 32 tokens x 64/2 numbers of 2 bytes, for each of 6 layers."""
    found = arithmetic.memory(CONFIG, {"slice": 2, "data": 4, "model": 2}, "bfloat16", [Buffer(arithmetic.PARAMETERS, 1000)])
    by_name = {buffer.name: buffer.num_bytes for buffer in found}
    assert by_name["saved activations"] == 6 * 2 * 32 * 32 * 2
    assert by_name["gradients"] == 1000
    micro = arithmetic.memory(replace(CONFIG, optim=OptimConfig(num_microbatches=2)), {"slice": 2, "data": 4, "model": 2}, "bfloat16",
                              [Buffer(arithmetic.PARAMETERS, 1000)])  # fmt: skip
    by_name = {buffer.name: buffer.num_bytes for buffer in micro}
    assert by_name["saved activations"] == 6 * 1 * 32 * 32 * 2 and by_name["gradients"] == 2000


def test_bytes_between_slices_are_one_copy_of_the_gradient_shard():
    mesh = {"slice": 2, "data": 4, "model": 2}
    found = arithmetic.collectives(CONFIG, mesh, "bfloat16", num_params=8_000_000)
    [across] = [c for c in found if "slice" in c.axes]
    assert across.moved_bytes(2) == 4 * 8_000_000 / 8
    alone = arithmetic.collectives(CONFIG, search.ONE_CHIP, "bfloat16", num_params=8_000_000)
    assert not alone


def test_gathered_bytes_do_not_depend_on_the_number_of_chips():
    """Weak scaling: what fully sharded data parallel sends per chip tends to a constant, twice the weights and once the gradient."""
    sent = []
    for shards in (16, 64, 256, 1024):
        mesh, config = {"slice": 1, "data": shards, "model": 1}, replace(CONFIG, data=replace(CONFIG.data, batch_size=shards))
        found = arithmetic.collectives(config, mesh, "bfloat16", num_params=10)
        sent.append(sum(c.moved_bytes(arithmetic.group_size(c, mesh)) for c in found) / ((shards - 1) / shards))
    assert sent == pytest.approx([sent[0]] * 4)


# ---------------------------------------------------------------------------------------------- GPUs


@cache
def gpu_plan(data: int = 8, model: int = 2, remat: str = "full", text: str = "h100:8x2") -> Plan:
    config = replace(CONFIG, mesh=MeshConfig(data=data, model=model), remat=remat)  # type: ignore[arg-type]
    return gpus.plan(experiment(config), gpus.parse(text), "bfloat16", "tiny")


def test_a_plan_for_gpus_says_that_nothing_was_compiled():
    plan = gpu_plan()
    assert plan.fits and plan.mesh == {"slice": 1, "data": 8, "model": 2} and plan.num_chips == 16
    assert {figure.how for group in show.sections(plan).values() for figure in group} == {"modelled", "counted", "published"}
    text = show.table(plan)
    assert "modelled, not compiled" in text and text.endswith("fits in 80 GiB") and "compiled  " not in text
    state = {b.name: b.num_bytes for b in plan.memory}
    assert state["optimizer"] == pytest.approx(2 * state["parameters"], abs=64), "AdamW"
    assert plan.num_params * 4 / 16 <= state["parameters"] < plan.num_params * 4 / 16 + 4 * 64 * 14, "norms are on every chip"


def test_what_is_printed_is_also_written():
    plan = gpu_plan()
    plain = json.loads(json.dumps(show.to_json(plan), allow_nan=False))
    assert plain["fits"] is True and plain["num_params"] == plan.num_params and plain["binding"] == plan.roofline.binding
    names = {title: {f["name"]: f for f in group} for title, group in plain["sections"].items()}
    assert names["work of a step"]["products, all chips"] == {
        "name": "products, all chips", "value": plan.work.flops, "unit": "FLOP", "how": "counted",
        "note": f"{plan.work.flops / 512:.4g} FLOP per token",
    }  # fmt: skip
    assert names["the whole run, at best"]["MFU"]["value"] == plan.roofline.mfu
    assert set(names["the whole run, at best"]) == {"tokens/s", "MFU", "MFU, causal", "HFU", "days", "chip hours"}


def test_a_plan_that_does_not_fit_says_what_would():
    plan = gpu_plan()
    large = replace(plan, memory=[Buffer("parameters", 10 * GIB), Buffer("saved activations", 100 * GIB)])
    assert not large.fits
    line = what_would_fit(replace(large, config=replace(plan.config, remat="dots")))
    assert "110.0 GiB of 80 GiB" in line and "30.0 GiB too much" in line and line.index("--remat full") < line.index("bfloat16")
    state = replace(plan, memory=[Buffer("parameters", 200 * GIB)])
    assert "80 chips or more" in what_would_fit(state), "16 chips × 200 GiB / 80 GiB, twice"
    assert show.table(large).splitlines()[-1].startswith("does not fit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100", "write CHIP:GPUS_PER_HOSTxHOSTS"),
        ("h100:0x2", "write CHIP:GPUS_PER_HOSTxHOSTS"),
        ("h10:8x2", r"no chip 'h10'; did you mean 'h100'\?"),
        ("v5e:8x2", "--topology v5e"),
        ("h100:16x2", "at most 8"),
    ],
)
def test_gpus_that_are_none_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        gpus.parse(text)


def test_slices_are_for_tpus():
    with pytest.raises(ConfigError, match=r"--slices 2 are TPU slices; --gpus h100:8x2 counts hosts"):
        command.Options(gpus="h100:8x2", slices=2).machine()


@pytest.mark.parametrize("sizes", [(1, 3, 4), (1, -1, 3), (3, -1, 1)])
def test_a_mesh_that_does_not_fill_the_chips_is_refused_with_the_nearest_that_do(sizes):
    with pytest.raises(ConfigError, match=r"does not multiply to 16 chips; nearest that do: \(") as error:
        gpus.mesh_sizes(MeshConfig(*sizes), 16)
    near = str(error.value).split("nearest that do: (")[1].split(")")[0]
    assert math.prod(int(n) for n in near.split(",")) == 16
    if sizes == (1, 3, 4):
        assert near == "1, 4, 4"


# -------------------------------------------------------------------------------------------- search


def test_candidates_divide_the_batch_the_model_and_the_chips():
    found = list(search.candidates(CONFIG, 16, num_slices=2))
    meshes = {(c.mesh.slice, c.mesh.data, c.mesh.model) for c in found}
    assert meshes == {(2, 8, 1), (2, 4, 2), (2, 2, 4)}, "4 heads"
    assert {c.optim.num_microbatches for c in found if c.mesh.model == 4} == {1, 2, 4}
    assert {c.remat for c in found} == set(search.REMAT)
    for config in found:
        sizes = gpus.mesh_sizes(config.mesh, 16)
        sharding.check_batch(config.data, config.optim, gpu_mesh(sizes))


def test_a_search_offers_what_updates_and_ramp_allow():
    """16 rows in 2 updates on one chip: at most 8 micro-batches; and a ramp from 4 rows wants micro-batches of 4 rows over both updates."""
    base, said = replace(CONFIG, mesh=MeshConfig(data=1)), list[TrainConfig]()
    build = lambda config, precision: replace(experiment(config), updates_per_batch=2)

    def plan(made: Experiment, *args: object) -> Plan:
        said.append(made.config)
        sharding.check_batch(made.config.data, made.config.optim, gpu_mesh(search.ONE_CHIP), 2)
        return fake(made.config, 1, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.gpus, "plan", plan)
        options = command.Options(gpus="h100:1", search=True, plans=1000)
        assert command.run(options, base, build, "", "tiny", io.StringIO()) == 0
    assert {config.optim.num_microbatches for config in said} == {1, 2, 4, 8}
    ramped = replace(base, data=replace(base.data, batch_ramp=((5, 4),)))
    found = search.candidates(ramped, 1, updates_per_batch=2)
    assert {config.optim.num_microbatches for config in found} == {4, 8}


def gpu_mesh(sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def fake(config: TrainConfig, gib: float, seconds: float) -> Plan:
    plan = gpu_plan()
    line = replace(plan.roofline, terms={"compute": seconds})
    return replace(plan, config=config, memory=[Buffer("temporaries", int(gib * GIB))], roofline=line)


def test_a_search_compiles_the_most_promising_and_ranks_what_fits():
    """Estimates are wrong on purpose: 'none' is said to fit and does not; 'dots' is said not to, and is the best that does."""
    said = {"none": (70, 1.0), "minimal": (200, 0.5), "dots": (100, 2.0), "full": (10, 4.0)}
    true = {"none": (90, 1.0), "dots": (79, 2.0), "full": (9, 4.0)}
    planned: list[str] = []

    def evaluate(config: TrainConfig) -> Plan:
        planned.append(config.remat)
        return fake(config, *true[config.remat])

    estimate = lambda config: search.Estimate(said[config.remat][0] * GIB, said[config.remat][1])
    found = [replace(CONFIG, remat=remat) for remat in search.REMAT]  # type: ignore[arg-type]
    ranked = search.search(iter(found), estimate, evaluate, 80 * GIB, max_plans=4)
    assert sorted(planned) == ["dots", "full", "none"], "'minimal' needs more than 1.5 times what there is"
    assert [plan.config.remat for plan in ranked] == ["dots", "full", "none"] and [plan.fits for plan in ranked] == [True, True, False]
    lines = show.ranking(ranked).splitlines()
    assert lines[1].startswith("yes") and "--remat dots" in lines[1] and lines[3].startswith("no")
    planned.clear()
    search.search(iter(found), estimate, evaluate, 80 * GIB, max_plans=1, margin=1.0)
    assert planned == ["none"]


def test_a_search_that_finds_nothing_says_what_comes_nearest():
    estimate = lambda config: search.Estimate((200 if config.remat == "full" else 400) * GIB, 1.0)
    with pytest.raises(ConfigError, match=r"none of 4 configurations fits: the smallest, .*--remat full .*needs about 200.0 GiB of 80 GiB"):
        search.search((replace(CONFIG, remat=r) for r in search.REMAT), estimate, lambda c: fake(c, 1, 1), 80 * GIB)
    with pytest.raises(ConfigError, match="no mesh divides"):
        search.search(iter(()), estimate, lambda c: fake(c, 1, 1), 80 * GIB)


def test_a_candidate_that_is_refused_is_left_out_with_its_reason():
    said: list[str] = []

    def evaluate(config: TrainConfig) -> Plan:
        if config.remat == "none":
            raise ConfigError("does not lie on this torus")
        return fake(config, 1, 1)

    estimate = lambda config: search.Estimate(GIB, 1.0)
    plans = search.search((replace(CONFIG, remat=r) for r in ("none", "full")), estimate, evaluate, 80 * GIB, say=said.append)
    assert len(plans) == 1 and any("left out: does not lie on this torus" in line for line in said)


def test_a_search_whose_every_candidate_is_refused_says_so():
    def evaluate(config: TrainConfig) -> Plan:
        raise ConfigError("does not lie on this torus")

    estimate = lambda config: search.Estimate(GIB, 1.0)
    with pytest.raises(ConfigError, match="none of the 1 most promising configurations compiled"):
        search.search(iter([CONFIG]), estimate, evaluate, 80 * GIB)


@pytest.mark.parametrize("failure", [OutOfMemory("Used 20G of 15.75G hbm"), CompilerFailed("INTERNAL: no")])
def test_a_step_that_does_not_compile_is_one_line_and_status_1(failure, capsys, monkeypatch):
    def refuse(*args: object, **options: object) -> Plan:
        raise failure

    monkeypatch.setattr(command.tpu, "plan", refuse)
    assert command.run(command.Options(topology="v5e:4x4"), CONFIG, experiment, "", "tiny", out := io.StringIO()) == 1
    if isinstance(failure, OutOfMemory):
        assert out.getvalue().startswith(
            "does not fit: Used 20G of 15.75G hbm; what makes room: --optim.num_microbatches 2, --mesh.model 2"
        )
    else:
        assert capsys.readouterr().err == "INTERNAL: no; another mesh may compile: --search tries them\n"


def test_the_usual_estimate_agrees_with_the_plan_and_prefers_less_recomputation():
    plan, cluster = gpu_plan(), gpus.parse("h100:8x2")
    traced = gpus.trace(experiment(CONFIG), search.ONE_CHIP)
    state = gpus.state_of(traced)
    flops = lambda config: lower.token_flops(experiment(config)).executed
    links_of = partial(links.switch, cluster.chip, chips_per_host=8)
    estimate = search.estimator(state, traced.num_params, flops, "bfloat16", cluster.chip, links_of)
    full = estimate(plan.config)
    assert full.num_bytes == pytest.approx(plan.memory_bytes, rel=0.2), "norms are on every chip"
    assert estimate(replace(plan.config, remat="none")).seconds < full.seconds
