"""Compile a step in a process of its own, so that libtpu touches nothing else: `python -m jaxllm.plan.child REQUEST RESULT`.

    compiled = compile_step(Request(build='jaxllm.pretrain:experiment', config=config, precision='bfloat16', topology=parse('v5e-256')))

The child holds libtpu's compiler, the traced step and gigabytes of XLA; it writes one JSON file and says on its output which
stage it has reached. XLA writes its dumps into a temporary folder, which is read and removed.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.config import ConfigError, TrainConfig, from_dict, to_dict
from jaxllm.flops import TokenFlops
from jaxllm.plan.arithmetic import Buffer as Part
from jaxllm.plan.collectives import Collective, collectives
from jaxllm.plan.compiled import Buffer, Compiled, Memory
from jaxllm.plan.topology import NO_LIBTPU, Topology
from jaxllm.plan.work import Work

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # constants are made on the CPU: no TPU is looked for
    "TPU_SKIP_MDS_QUERY": "1",  # nor the cloud's metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu guards a TPU with a lock file; here there is none to guard
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_BEFORE_CODE = ".after_optimizations_after_buffer_assignment.txt"
"""Suffix of the last dump that libtpu writes before it generates code; the others that are read here are whole by then."""


class CompilerFailed(RuntimeError):
    """XLA, or the process that it ran in, could not compile the step. The message is the short of it."""


class OutOfMemory(CompilerFailed):
    """The step compiles, but not into the chip's memory."""


@dataclass(frozen=True)
class Request:
    """What to compile."""

    build: str
    """`MODULE:NAME` or `FILE.py:NAME` of (config, precision=…) -> Experiment."""
    config: TrainConfig
    precision: str
    topology: Topology
    generate_code: bool = True
    """False stops when memory is assigned: every number but the size of the code, in a small part of the time."""


def compile_step(request: Request, progress: Callable[[str, float], None] = lambda stage, seconds: None) -> Compiled:
    """The step of `request`, compiled in a child process.

    Args:
      progress: called every second with the stage and the seconds since the start.

    Raises:
      ConfigError: what `train` would refuse, or no libtpu.
      OutOfMemory: it does not fit.
      CompilerFailed: anything else.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(NO_LIBTPU)
    with tempfile.TemporaryDirectory(prefix="jaxllm-plan-") as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(_to_json(request)))
        # The parent's fake CPU devices and compilation cache are none of the child's business.
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")} | ENVIRONMENT
        command = [sys.executable, "-m", "jaxllm.plan.child", str(asked), str(answered)]
        with Path(folder, "stderr").open("w+") as errors:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            try:
                _follow(child, progress)
            finally:
                child.kill()
                child.wait()
            if not answered.exists():
                errors.seek(0)
                raise CompilerFailed(_ended(child.returncode, errors.read()))
        answer = json.loads(answered.read_text())
    if "error" in answer:
        raise {"config": ConfigError, "memory": OutOfMemory}.get(answer["error"], CompilerFailed)(answer["message"])
    return _compiled(answer)


def _follow(child: subprocess.Popen[str], progress: Callable[[str, float], None]) -> None:
    """Report the stages that the child names until its output ends."""
    start, stage = time.monotonic(), ["starting"]
    assert child.stdout is not None
    lines = child.stdout

    def read() -> None:
        for line in lines:
            if line.startswith("stage: "):
                stage[0] = line.removeprefix("stage: ").strip()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while True:
        reader.join(1.0)
        progress(stage[0], time.monotonic() - start)
        if not reader.is_alive():
            return


def _ended(status: int, errors: str) -> str:
    """Why a child left no result."""
    if status == -9:
        return "the compiler was killed, most likely for want of memory on this machine"
    lines = [line for line in errors.splitlines() if line.strip() and not re.match(r"\s*(@|\*\*\*|=== )", line)]
    fatal = [line for line in lines if re.match(r"F\d{4} ", line) or "Check failed" in line]
    return f"the compiler ended with status {status}: {short((fatal or lines or ['it said nothing'])[-1])}"


def short(message: str, limit: int = 300) -> str:
    """The first lines of an XLA error on one line.

    >>> short('INTERNAL: a\\n\\nb')
    'INTERNAL: a b'
    """
    text = " ".join(message.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# -------------------------------------------------------------------------------------------- JSON


def _to_json(request: Request) -> dict[str, Any]:
    return {**dataclasses.asdict(request), "config": to_dict(request.config), "topology": dataclasses.asdict(request.topology)}


def _from_json(values: dict[str, Any]) -> Request:
    topology = values["topology"] | {"shape": tuple(values["topology"]["shape"])}
    return Request(**{**values, "config": from_dict(TrainConfig, values["config"]), "topology": Topology(**topology)})


def _compiled(values: dict[str, Any]) -> Compiled:
    return Compiled(
        **values
        | {
            "memory": Memory(**values["memory"]),
            "buffers": [Buffer(**buffer) for buffer in values["buffers"]],
            "collectives": [Collective(**c | {"axes": tuple(c["axes"])}) for c in values["collectives"]],
            "work": Work(**values["work"] | {"notes": tuple(values["work"]["notes"])}),
            "state": [Part(**part) for part in values["state"]],
            "per_token": TokenFlops(**values["per_token"]),
            "causal_per_token": TokenFlops(**values["causal_per_token"]),
        }
    )


# --------------------------------------------------------------------------------------- the child


def main(arguments: list[str]) -> int:
    """Read a request, write a result: the Compiled, or the kind of error and a line."""
    asked, answered = map(Path, arguments)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    write = lambda values: _write(answered, values)
    try:
        request = _from_json(json.loads(asked.read_text()))
        write(_run(request, asked.parent, write))
    except ConfigError as error:
        write({"error": "config", "message": str(error)})
    except Exception as error:
        kind = "memory" if "RESOURCE_EXHAUSTED" in str(error) or "OOM" in str(error) else "compiler"
        traceback.print_exc()
        write({"error": kind, "message": f"{type(error).__name__}: {short(str(error))}" if kind == "compiler" else short(str(error))})
    return 0


def _end_with(parent: int) -> None:
    """Nobody is left to read the result: do not go on for minutes."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _write(path: Path, values: dict[str, Any]) -> None:
    half = path.with_suffix(".half")
    half.write_text(json.dumps(values))
    half.rename(path)


def _stage(name: str) -> None:
    print(f"stage: {name}", flush=True)


def _run(request: Request, folder: Path, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    import jax

    from jaxllm import tree
    from jaxllm.plan import arithmetic, compiled, kernels, topology
    from jaxllm.plan.lower import lowered, token_flops
    from jaxllm.plan.work import count

    start = time.monotonic()
    _stage("tracing")
    experiment = load(request.build)(request.config, precision=request.precision)
    step = lowered(experiment, topology.devices(request.topology))
    seconds = {"lower": time.monotonic() - start}
    _stage("counting")
    is_state = [False] * len(jax.tree.leaves((step.state, step.frozen)))
    is_batch = [True] * (len(step.jaxpr.in_avals) - len(is_state))
    work = count(step.jaxpr, from_batch=is_state + is_batch, mesh=dict(step.mesh.shape), kernels=kernels.attention())
    params = experiment.lm.param_shapes
    versions = {name: importlib.import_module(name).__version__ for name in ("jax", "jaxlib", "libtpu")}
    mesh = dict(step.mesh.shape)
    dumps = folder / "dumps"
    dumps.mkdir()

    def result(executable: Any) -> dict[str, Any]:
        program = compiled.dumped(dumps, ".after_optimizations.txt") or executable.as_text()
        assigned = compiled.allocations(compiled.dumped(dumps, "after_optimizations-buffer-assignment.txt") or "")
        found, unknown = collectives(program, mesh)
        made = Compiled(
            memory=compiled.measured(executable, assigned),
            buffers=compiled.largest(assigned, program),
            collectives=found,
            unknown_loops=unknown,
            mesh=mesh,
            notes=step.notes,
            seconds=seconds | {"compile": time.monotonic() - begun},
            versions=versions,
            work=work,
            num_params=tree.count(params),
            state=arithmetic.state_buffers(step.state, step.frozen),
            per_token=token_flops(experiment),
            causal_per_token=token_flops(experiment, causal=True),
        )
        return dataclasses.asdict(made)

    def stop_when_assigned() -> None:
        """Wait for memory to be assigned, write what is known, and end this process in the middle of generating code."""
        while not list(dumps.glob(f"*{_BEFORE_CODE}")):
            time.sleep(0.2)
        try:
            write(result(None))
        except Exception:
            traceback.print_exc()
            return  # the compiler goes on, and answers in its own time
        os._exit(0)

    begun = time.monotonic()
    _stage("compiling")
    if not request.generate_code:
        threading.Thread(target=stop_when_assigned, daemon=True).start()
    options: dict[str, Any] = {"xla_dump_to": str(dumps), **compiler_options(versions["libtpu"], mesh)}
    executable = step.lowered.compile(compiler_options=options)
    _stage("reading")
    return result(executable)


def compiler_options(libtpu: str, mesh: dict[str, int]) -> dict[str, Any]:
    """What this mesh needs of this libtpu beyond its defaults.

    >>> compiler_options('0.0.50.1', {'model': 12})
    {}
    """
    version = tuple(int(n) for n in re.findall(r"\d+", libtpu)[:3])
    if mesh["model"] % 3 == 0 and version >= (0, 0, 51):
        # 0.0.51 ends with "AllReduce fusion with 3 sized replica_groups"; 0.0.50.1 compiles the same step, and its sums over `data`
        # and `model` are then reduce-scatters: without the fusion they are whole all-reduces, 1.4 times the bytes for PaLM-540B.
        return {"xla_tpu_enable_all_reduce_scatter_fusion": False}
    return {}


def load(build: str) -> Callable[..., Any]:
    """The function that `MODULE:NAME` or `FILE.py:NAME` names."""
    place, _, name = build.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    path = Path(place).resolve()
    sys.path.insert(0, str(path.parent.parent))  # as `jaxllm train FILE.py` does: configs import each other
    return getattr(importlib.import_module(f"{path.parent.name}.{path.stem}"), name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
