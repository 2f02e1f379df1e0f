"""What a plan compiles is what `train` compiles, and what it reads off the compiler; slices by name. No libtpu is needed here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm import pretrain, sharding
from jaxllm.config import ConfigError, DataConfig, MeshConfig, ModelConfig, OptimConfig, SourceConfig, TokenizerConfig, TrainConfig
from jaxllm.data import batch as batches
from jaxllm.flops import TokenFlops
from jaxllm.plan import child, compiled
from jaxllm.plan.arithmetic import Buffer as Part
from jaxllm.plan.compiled import Compiled, Memory, Value
from jaxllm.plan.lower import batch_shapes, frozen_shapes, lowered
from jaxllm.plan.topology import FAMILIES, Topology, parse, slices
from jaxllm.plan.work import Work
from jaxllm.step import BASE, frozen_base, program

MODEL = ModelConfig(num_layers=2, width=16, num_heads=2, num_kv_heads=2, head_size=8, ff_width=32, vocab_size=259, max_length=32)
FREEZE = ((r"embed/.*", True),)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    text = tmp_path_factory.mktemp("plan") / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} of a text that is long enough to fill some rows." for i in range(200)))
    data = DataConfig(
        sources=(SourceConfig(kind="text", path=str(text), document="paragraph"),),
        tokenizer=TokenizerConfig(kind="bytes"),
        sequence_length=32,
        batch_size=8,
        cache_dir=str(text.parent / "cache"),
    )
    return TrainConfig(model=MODEL, data=data, mesh=MeshConfig(slice=2, data=2, model=2), optim=OptimConfig(freeze=FREEZE))


def without_places(text: str) -> str:
    """A program's text without what names lines of Python: who called is no part of it."""
    text = re.sub(r"(?ms)^(FileNames|FunctionNames|FileLocations|StackFrames)\n(\d+ .*?\n)+", "", text)
    return re.sub(r" ?stack_frame_id=\d+", "", text)


@pytest.fixture(scope="module")
def planned(config: TrainConfig):
    return lowered(pretrain.experiment(config, precision="float32"), jax.devices())


@pytest.fixture(scope="module")
def trained(config: TrainConfig):
    """The step as the loop runs it: on the arrays of a real state and a real batch."""
    experiment = pretrain.experiment(config, precision="float32")
    mesh = sharding.make_mesh(config.mesh)
    dataset = batches.load(config.data, seed=0)
    with jax.set_mesh(mesh):
        step, make_state, _ = program(experiment, mesh)
        state, frozen = make_state(), frozen_base(experiment, mesh)
        reading = dataset.read(batches.Position(), lambda size: sharding.host_rows(mesh, size))
        batch = batches.to_global(next(reading).batch, mesh, dataset.batch_size(0))
        reading.close()
        return step.lower(state, frozen, batch), batch, frozen, mesh


def test_the_plan_compiles_what_train_compiles(planned, trained):
    ours, theirs = (without_places(x.compile().as_text()) for x in (planned.lowered, trained[0]))
    assert ours == theirs and "all-gather" in ours


def test_a_different_step_has_a_different_text(config: TrainConfig, trained):
    other = replace(config, optim=replace(config.optim, b2=0.999))
    step = lowered(pretrain.experiment(other, precision="float32"), jax.devices())
    assert step.lowered.as_text() != trained[0].as_text()


def test_shapes_of_batch_and_frozen_weights_are_those_of_the_arrays(config: TrainConfig, trained):
    _, batch, frozen, mesh = trained
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
    experiment = pretrain.experiment(config, precision="float32")
    assert describe(batch_shapes(experiment, mesh)) == describe(batch)
    assert describe(frozen_shapes(experiment, mesh)) == describe(frozen) and set(frozen) == {BASE}
    everything = replace(experiment, config=replace(config, optim=OptimConfig()))
    assert frozen_shapes(everything, mesh) == {}


def test_frozen_weights_of_an_experiment_are_shapes_too(config: TrainConfig, trained):
    mesh = trained[3]
    experiment = pretrain.experiment(config, precision="float32")
    teacher = replace(experiment, load_frozen=lambda mesh: {"teacher": experiment.lm.init(jax.random.key(1))})
    shapes = frozen_shapes(teacher, mesh)
    assert shapes["teacher"]["layers"]["mlp"]["up"]["kernel"].sharding.spec == P(None, "data", "model")

    def missing(mesh):
        raise FileNotFoundError("teacher/params")

    with pytest.raises(ConfigError, match="cannot be planned without their file: teacher/params"):
        frozen_shapes(replace(experiment, load_frozen=missing), mesh)


# ------------------------------------------------------------------------------- what XLA says of it


def test_bytes_of_a_program_known_by_hand():
    """sin(x) of 1,000 floats, x donated: 4,000 bytes in, 4,000 out in the same place."""
    f = jax.jit(jnp.sin, donate_argnums=0).lower(jax.ShapeDtypeStruct((1000,), jnp.float32)).compile()
    memory = compiled.analysed(f)
    assert (memory.argument_bytes, memory.output_bytes, memory.alias_bytes) == (4000, 4000, 4000)
    assert memory.total_bytes == 4000 + memory.temp_bytes + (memory.code_bytes or 0)


def test_bytes_per_chip_are_those_of_a_shard():
    mesh = sharding.make_mesh(MeshConfig(data=4, model=2))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("data", "model")))
    memory = compiled.analysed(jax.jit(lambda x: x + 1).lower(x).compile())
    assert memory.argument_bytes == memory.output_bytes == 64 * 32 * 4 // 8


ASSIGNMENT = """BufferAssignment:
allocation 0: size 64, page 0, parameter 0, shape |f32[16]| at ShapeIndex {}, maybe-live-out:
 value: <1 param @0> (size=64,offset=0): f32[16]{0:T(128)}
allocation 1: size 32, page 0, output shape is |f32[8]|, maybe-live-out:
 value: <2 add.1 @0> (size=32,offset=0): f32[8]{0:T(128)}
allocation 2: size 900, page 0, preallocated-temp:
 value: <3 small @0> (size=100,offset=0): f32[25]{0:T(128)}
 value: <4 fusion.1{1} @0> (size=400,offset=0): f32[100]{0:T(128)}
 value: <5 beside{} (phi) @0> (size=300,offset=600): f32[75]{0:T(128)}
 value: <6 overlap @0> (size=350,offset=300): f32[87]{0:T(128)}
allocation 3: size 5000, color 1, page 0, preallocated-temp:
 value: <7 vmem @1> (size=5000,offset=0): f32[1250]{0:T(128)S(1)}
"""

PROGRAM = """HloModule jit_f

FileNames
1 "/venv/lib/python3.12/site-packages/jax/_src/nn/functions.py"
2 "somewhere/jaxllm/models/layers.py"

FunctionNames
1 "silu"
2 "FeedForward.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=84 end_line=84 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

ENTRY %main (param: f32[16]) -> f32[16] {
  %param = f32[16]{0} parameter(0)
  %fusion.1 = (f32[2], f32[100]) fusion(%param), calls=%x, metadata={op_name="jit(step)/transpose(jvp())/mul" stack_frame_id=2}
  ROOT %beside = f32[75]{0:T(128)} sine(%param), metadata={op_name="jit(step)/jvp()/sin"}
}
"""


def test_the_largest_buffers_and_the_code_that_makes_them():
    found = compiled.allocations(ASSIGNMENT)
    assert [(a.kind, a.num_bytes, a.color) for a in found] == [("parameter", 64, 0), ("output", 32, 0), ("temp", 900, 0), ("temp", 5000, 1)]
    assert found[2].values[1] == Value("fusion.1", 0, 400, "f32[100]")
    assert compiled.assigned(found) == Memory(64, 32, 0, 900, None) and compiled.assigned(found).total_bytes == 996
    first, second = compiled.largest(found, PROGRAM)  # `small` and `overlap` share a place with a larger one
    assert (first.num_bytes, first.phase, first.where) == (400, "backward", "jaxllm/models/layers.py:84 FeedForward.__call__")
    assert (second.num_bytes, second.phase, second.where) == (300, "forward", "")


def test_a_result_survives_json():
    buffer = compiled.Buffer(1, "f32[1]", "jit(f)/x", "jaxllm/step.py:1 f", "forward")
    collective = compiled.Collective("all-gather", "%a", 1, 2, 2, ("data",), 3, "")
    work, state = Work(product_flops=5, notes=("a bound",)), [Part("parameters", 4)]
    made = Compiled(
        Memory(1, 2, 3, 4, None), [buffer], [collective], [], {"data": 2}, ["note"], {"compile": 1.0}, {"jax": "0"}, work, 7, state,
        TokenFlops(2.0, 4.0, 1.0, 0.5), TokenFlops(2.0, 3.0, 1.0, 0.5),
    )  # fmt: skip
    assert child._compiled(json.loads(json.dumps(asdict(made)))) == made
    request = child.Request("jaxllm.pretrain:experiment", TrainConfig(model=MODEL), "bfloat16", parse("v4:4x4x4", 2), False)
    assert child._from_json(json.loads(json.dumps(child._to_json(request)))) == request


# ------------------------------------------------------------------------------------- the child


def test_without_libtpu_the_fix_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(child.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxllm\[plan\]'"):
        child.compile_step(child.Request("jaxllm.pretrain:experiment", TrainConfig(), "bfloat16", parse("v5e:2x4")))


@pytest.fixture
def child_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Puts a script in the child's place."""

    def install(script: str) -> child.Request:
        monkeypatch.setattr(child.importlib.util, "find_spec", lambda name: True)
        start = subprocess.Popen
        monkeypatch.setattr(child.subprocess, "Popen", lambda command, **rest: start([sys.executable, "-c", script, *command[3:]], **rest))
        return child.Request("jaxllm.pretrain:experiment", TrainConfig(), "bfloat16", parse("v5e:2x4"))

    return install


@pytest.mark.parametrize(
    "script, kind, message",
    [
        ("import os; os.kill(os.getpid(), 9)", child.CompilerFailed, "killed, most likely for want of memory"),
        (
            "import sys; print('F0101 a.cc:1] Check failed: x\\n   @ 0x1', file=sys.stderr); sys.exit(6)",
            child.CompilerFailed,
            "Check failed: x",
        ),
        ("import sys, json; json.dump({'error': 'config', 'message': 'no'}, open(sys.argv[2], 'w'))", ConfigError, "^no$"),
        ("import sys, json; json.dump({'error': 'memory', 'message': 'big'}, open(sys.argv[2], 'w'))", child.OutOfMemory, "^big$"),
    ],
)
def test_what_a_child_that_fails_says(child_that, script: str, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        child.compile_step(child_that(script))


def test_stages_are_reported(child_that):
    seen = []
    script = (
        "import sys, json, time; print('stage: compiling', flush=True); time.sleep(1.2);"
        "json.dump({'error': 'config', 'message': ''}, open(sys.argv[2], 'w'))"
    )
    with pytest.raises(ConfigError):
        child.compile_step(child_that(script), lambda stage, seconds: seen.append((stage, seconds)))
    assert seen[0][0] == "compiling" and 0.9 < seen[0][1] < 10


def test_the_child_refuses_as_train_does(tmp_path: Path):
    """The real child, up to what needs no libtpu: a file that is an experiment's, and the mistake in its config."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.py").write_text(
        "from jaxllm.config import ConfigError\ndef build(config, *, precision):\n    raise ConfigError(f'no {precision}')\n"
    )
    request = child.Request(str(tmp_path / "experiments" / "mine.py") + ":build", TrainConfig(), "float32", parse("v5e:2x4"))
    asked, answered = tmp_path / "asked.json", tmp_path / "answered.json"
    asked.write_text(json.dumps(child._to_json(request)))
    subprocess.run([sys.executable, "-m", "jaxllm.plan.child", asked, answered], check=True, env=os.environ | child.ENVIRONMENT)
    assert json.loads(answered.read_text()) == {"error": "config", "message": "no float32"}


# -------------------------------------------------------------------------------------- topologies


@pytest.mark.parametrize(
    "text, name, chips",
    [
        ("v4:12x16x16", "v4:12x16x16", 3072),
        ("v4:16x12x16", "v4:12x16x16", 3072),
        ("v4-6144", "v4:12x16x16", 3072),
        ("v5e:8x16", "v5e:8x16", 128),
        ("v5e-256", "v5e:16x16", 256),
        ("v5e-1", "v5e:1x1", 1),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-12288", "v5p:16x16x24", 6144),
        ("v6e:4x8", "v6e:4x8", 32),
    ],
)
def test_slices_by_shape_and_by_the_clouds_name(text: str, name: str, chips: int):
    assert parse(text).name == name and parse(text).num_chips == chips and parse(text, 3).num_chips == 3 * chips


@pytest.mark.parametrize(
    "text, message",
    [
        ("v9:2x2", "names the chip 'v9'.*chips: v4, v5e, v5p, v6e"),
        ("v5", "neither CHIP:AxB.*nor CHIP-NUMBER"),
        ("v5e:3x5", "no v5e slice of 3x5 chips; nearest: .*v5e:4x4.*; slices go from v5e:1x1 to v5e:16x16"),
        ("v5e-100", r"no v5e-100 \(v5e counts chips\); nearest: .*v5e:8x16"),
        ("v5p-100", r"v5p counts TensorCores, two per chip\); nearest: .*v5p:4x4x4"),
        ("v4:32x32x32", "slices go from v4:2x2x1 to v4:12x16x16"),
    ],
)
def test_slices_that_do_not_exist(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parse(text)
    with pytest.raises(ConfigError, match="--slices is 0"):
        parse("v5e-256", 0)


def test_every_slice_of_every_family_parses_to_itself():
    for chip in FAMILIES:
        for shape in slices(chip):
            assert parse(Topology(chip, shape).name).shape == shape
    assert Topology("v5e", (8, 16)).wraps == (False, True) and Topology("v5e", (4, 4)).wraps == (False, False)
    assert Topology("v4", (4, 4, 8)).wraps == (True,) * 3 and Topology("v4", (2, 4, 4)).wraps == (False,) * 3
