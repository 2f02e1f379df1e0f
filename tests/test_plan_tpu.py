"""Compiled by libtpu for TPUs that are not here: run by `make compile`, which installs it; a process of its own for each."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("libtpu", reason="libtpu is the extra `plan`")

from jaxllm import cli
from jaxllm.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from jaxllm.plan.child import ENVIRONMENT, OutOfMemory, Request, compile_step
from jaxllm.plan.collectives import SLOW_AXIS
from jaxllm.plan.compiled import Compiled
from jaxllm.plan.topology import parse
from tests.plan_programs import INNER, LAYERS, ROWS, WIDTH
from tools import plans

MODEL = ModelConfig(num_layers=4, width=256, num_heads=2, num_kv_heads=2, head_size=128, ff_width=512, vocab_size=512, max_length=2048)
DATA = DataConfig(sequence_length=2048, batch_size=32, segment_mask=False)
FEW, MANY = 48, 96
"""Layers: enough that their saved inputs do not fit in a core's own 128 MiB."""


@cache
def programs(num_slices: int) -> dict[str, Any]:
    """The programs of `plan_programs` on slices of v5e:2x4, in groups of 4 (data) × 2 (model) chips."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | ENVIRONMENT
    command = [sys.executable, "-m", "tests.plan_programs", "v5e:2x4", str(num_slices)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def seen(name: str, num_slices: int) -> list[tuple[str, str, int, int, int]]:
    result = programs(num_slices)[name]
    assert not result["unknown"]
    return [(c["kind"], *c["axes"], c["group_size"], c["operand_bytes"], c["times"]) for c in result["found"]]


ROW_BYTES = ROWS * 8 // 4 * WIDTH * 2  # a chip's rows of x on one slice, in bf16
BETWEEN = ("all-reduce", "slice", 2, WIDTH * WIDTH // 4 * 4, 1)
SCATTER = ("reduce-scatter", "data", 4, WIDTH * WIDTH * 4, 1)


@pytest.mark.parametrize(
    "name, num_slices, expected",
    [
        ("gather_in_a_scan", 1, [("all-gather", "data", 4, WIDTH * WIDTH // 4 * 2, LAYERS), ("all-reduce", "model", 2, ROW_BYTES, 1)]),
        ("ring_in_two_scans", 1, [("collective-permute", "data", 2, ROW_BYTES, LAYERS * INNER)]),
        ("gradient", 1, [SCATTER]),
        ("gradient", 2, [SCATTER, BETWEEN]),
        ("by_the_partitioner", 1, [SCATTER]),  # a fusion named all-reduce-scatter
        ("by_the_partitioner", 2, [SCATTER, BETWEEN]),
    ],
)
def test_collectives_known_by_hand(name: str, num_slices: int, expected: list[tuple]):
    assert seen(name, num_slices) == expected


def request(config: TrainConfig, topology: str, *, slices: int = 1, code: bool = False) -> Request:
    return Request("jaxllm.pretrain:experiment", config, "bfloat16", parse(topology, slices), generate_code=code)


@cache
def planned(num_layers: int, rows: int, *, slices: int = 1, code: bool = False) -> Compiled:
    model, data = replace(MODEL, num_layers=num_layers), replace(DATA, batch_size=rows)
    config = TrainConfig(model=model, data=data, mesh=MeshConfig(slice=slices, data=8 // slices, model=1))
    return compile_step(request(config, "v5e:2x4" if slices == 1 else "v5e:2x2", slices=slices, code=code))


def saved_bytes(num_layers: int, rows: int) -> int:
    """Full remat keeps each layer's input, in bf16, of a chip's rows."""
    return num_layers * rows // 8 * DATA.sequence_length * MODEL.width * 2


def test_a_steps_memory_and_its_saved_activations():
    for num_layers in (FEW, MANY):
        plan = planned(num_layers, 32)
        params = num_layers * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256) + 512 * 256 + 256
        assert plan.memory.argument_bytes == pytest.approx(3 * 4 * params / 8, rel=0.05)  # weights and two moments, and the batch
        shape = f"bf16[{num_layers},4,2048,256]"
        assert saved_bytes(num_layers, 32) in [b.num_bytes for b in plan.buffers if b.shape == shape and "run_layers" in b.where]


def test_a_program_is_as_large_with_code_as_without():
    quick, whole = planned(FEW, 32), planned(FEW, 32, code=True)
    assert whole.memory.code_bytes and quick.memory.code_bytes is None
    assert whole.memory.argument_bytes == quick.memory.argument_bytes
    assert [(c.kind, c.times, c.operand_bytes) for c in whole.collectives] == [
        (c.kind, c.times, c.operand_bytes) for c in quick.collectives
    ]


def test_only_a_gradients_shard_crosses_between_slices():
    """On 2 slices of 4 chips: each gradient's shard once, in float32; norm scales and scalars whole, padded to tiles of 8 rows."""
    plan = planned(FEW, 32, slices=2)
    kernels = FEW * (4 * 256 * 256 + 3 * 256 * 512) + 512 * 256
    crossing = sum(c.total_operand_bytes for c in plan.collectives if c.axes == (SLOW_AXIS,))
    assert kernels * 4 / 4 <= crossing <= kernels * 4 / 4 + 8 * 4 * (2 * FEW + 1) * 256 + 4096


def test_a_model_that_cannot_fit_says_so():
    large = replace(MODEL, width=8192, ff_width=32768, num_heads=64, num_kv_heads=64)
    config = TrainConfig(model=large, data=replace(DATA, batch_size=8), mesh=MeshConfig(data=1))
    with pytest.raises(OutOfMemory, match=r"exceeds|exhausted|memory"):
        compile_step(request(config, "v5e-1"))


def test_a_search_compiles_ranks_and_leaves_out_what_does_not_compile(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The command, on 16 chips: 2 heads let `model` be 1 or 2."""
    config = tmp_path / "configs" / "small.py"
    config.parent.mkdir()
    config.write_text(f"from jaxllm.config import *\nconfig = {TrainConfig(model=MODEL, data=replace(DATA, batch_size=64))!r}\n")
    out = tmp_path / "plan.json"
    assert cli.main(["plan", str(config), "--topology", "v5e:4x4", "--search", "--plans", "3", "--json", str(out)]) == 0
    printed = capsys.readouterr()
    ranked = json.loads(out.read_text())
    assert len(ranked) + printed.err.count("left out") == 3 and all(plan["fits"] for plan in ranked)
    assert len({plan["flags"] for plan in ranked}) == len(ranked) >= 2 and {
        plan["mesh"]["data"] * plan["mesh"]["model"] for plan in ranked
    } == {16}
    seconds = [
        next(f["value"] for f in p["sections"]["time of a step, at least"] if f["name"] == "a step, all overlapping") for p in ranked
    ]
    assert seconds == sorted(seconds)
    first = printed.out.splitlines()[1]
    assert first.startswith("yes") and first.endswith(ranked[0]["flags"])


def test_a_step_too_large_for_the_chip_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "configs" / "large.py"
    config.parent.mkdir()
    large = replace(MODEL, width=8192, ff_width=32768, num_heads=64, num_kv_heads=64)
    config.write_text(f"from jaxllm.config import *\nconfig = {TrainConfig(model=large, data=replace(DATA, batch_size=8))!r}\n")
    assert cli.main(["plan", str(config), "--topology", "v5e-1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and re.fullmatch(r"does not fit: .*(?i:hbm).*; what makes room: .*more chips.*", lines[0])


def test_the_smallest_paper_preset_plans_on_the_machine_of_its_paper():
    """`make plans` is all of them."""
    known = [paper for paper in plans.papers() if "--topology" in paper.machine]
    if not known:
        pytest.skip("no experiment names a TPU for a paper preset")
    row = plans.plan(min(known, key=size))
    assert row.ok and row.plan["fits"], row.message


def size(paper: plans.Paper) -> int:
    """Parameters of the preset's model, about."""
    model = cli.load_target(paper.target)[0].model
    return model.num_layers * model.width * (4 * model.num_heads * model.head_size + 3 * model.ff_width) + model.vocab_size * model.width


def test_compile_time_does_not_grow_with_the_number_of_layers():
    """The program's text is the measure: it is the same but for the numbers in it."""
    few, many = (planned(n, 32) for n in (FEW, MANY))
    assert [(c.kind, c.axes) for c in few.collectives] == [(c.kind, c.axes) for c in many.collectives]
    assert math.isclose(sum(c.times for c in many.collectives), 2 * sum(c.times for c in few.collectives), rel_tol=0.1)
