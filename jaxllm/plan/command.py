"""`jaxllm plan`: what a run would take on a machine that is not here.

A TPU slice is planned by its own compiler (`tpu.py`), GPUs by arithmetic (`gpus.py`); `--search` tries many configurations.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

from jaxllm import chips, tree
from jaxllm.config import ConfigError, DataConfig, ModelConfig, TrainConfig, nearest
from jaxllm.files import write_atomic
from jaxllm.plan import gpus, links, lower, search, show, topology, tpu
from jaxllm.plan.child import CompilerFailed, OutOfMemory
from jaxllm.plan.gpus import Cluster
from jaxllm.plan.result import Plan, what_makes_room
from jaxllm.plan.topology import Topology

type Build = Callable[..., Any]
"""(config, precision=…) -> step.Experiment"""

USAGE = """usage: jaxllm plan TARGET --topology CHIP:AxB[xC] [--slices N] | --gpus CHIP:PER_HOSTxHOSTS [--FLAG VALUE …]

What one training step takes on machines that are not here: memory, work, traffic, time. TARGET is what `jaxllm train` takes; its
fields are flags here too. A TPU slice needs libtpu's compiler, which runs anywhere: pip install 'jaxllm[plan]'.

  --topology v4:12x16x16   chips along each side of a slice, or a cloud's name, v5p-128
  --slices 2               so many slices, joined by the data-centre network
  --gpus h100:8x16         16 hosts of 8; by arithmetic
  --tokens 780e9           length of the run, for days and chip hours; default: the target's num_steps
  --search                 try meshes, remat policies and micro-batches, and rank those that fit
  --code False             stop before code is generated: all but its size, several times sooner (a search always does)
  --json FILE              write the plan, every figure with its unit and how it was had"""


@dataclass(frozen=True)
class Options:
    """What `jaxllm plan` takes besides the fields of the configuration."""

    topology: str = ""
    """A TPU slice: CHIP:AxB[xC] in chips, or what the cloud calls it."""
    slices: int = 1
    """How many of them."""
    gpus: str = ""
    """CHIP:PER_HOSTxHOSTS."""
    tokens: float = 0.0
    """Tokens of the whole run; 0 means num_steps batches."""
    search: bool = False
    """Try meshes, remat policies and micro-batches."""
    plans: int = 8
    """How many configurations a search plans in full."""
    code: bool = True
    """Whether to generate code: False leaves out nothing but its size, and takes a part of the time."""
    json: str = ""
    """A file for the plan."""

    def __post_init__(self) -> None:
        if not 0 <= self.tokens < math.inf or self.plans < 1:
            raise ConfigError(f"--tokens is {self.tokens:g} and --plans {self.plans}; tokens are finite and at least 0, plans at least 1")
        if self.json and (Path(self.json).is_dir() or not Path(self.json).absolute().parent.is_dir()):
            raise ConfigError(f"--json {self.json} is a folder or in none that exists; name a file in one that does")

    def machine(self) -> Topology | Cluster:
        """The machine that is asked for."""
        if bool(self.topology) == bool(self.gpus):
            raise ConfigError("give one machine: --topology v5e:16x16 for a TPU slice, or --gpus h100:8x16")
        if self.gpus and self.slices != 1:
            raise ConfigError(f"--slices {self.slices} are TPU slices; --gpus {self.gpus} counts hosts: --gpus CHIP:PER_HOSTxHOSTS")
        return topology.parse(self.topology, self.slices) if self.topology else gpus.parse(self.gpus)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words of `Options`, words of the configuration).

    Raises:
      ConfigError: an option of neither that is nearest to one of `Options`.
    """
    names = {field.name for field in fields(Options)}
    own: list[str] = []
    others: list[str] = []
    target = others
    for word in words:
        if word.startswith("--"):
            target = own if word[2:].partition("=")[0].replace("-", "_") in names else others
        target.append(word)
    for word in others:
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and "." not in name and not hasattr(TrainConfig(), name) and name != "help" and nearest(name, names):
            raise ConfigError(f"no option --{name}{nearest(name, names)} `jaxllm plan --help` lists them")
    return own, others


def for_model(name: str, model: ModelConfig, num_chips: int) -> TrainConfig:
    """A recipe for a model that comes without one: AdamW, and one row of at most 4,096 tokens per chip."""
    length = min(model.max_length, 4096)
    return TrainConfig(name=name, model=model, data=DataConfig(sequence_length=length, batch_size=num_chips))


def run(options: Options, config: TrainConfig, build: Build, build_name: str, target: str, out: TextIO | None = None) -> int:
    """Plan, print, and write; returns 0, or 1 where nothing fits or the compiler fails.

    Args:
      build_name: `MODULE:NAME` or `FILE.py:NAME` of `build`, for the compiler's own process.
      out: None means standard output.

    Raises:
      ConfigError: a machine that does not exist, a mesh that does not fill it, or what `train` would refuse.
    """
    machine, out = options.machine(), out or sys.stdout
    precision = "bfloat16" if config.precision == "auto" else config.precision
    if isinstance(machine, Topology) and config.mesh.slice == 1:
        config = replace(config, mesh=replace(config.mesh, slice=machine.num_slices))
    if options.tokens:
        per_step = config.data.batch_size * config.data.sequence_length
        config = replace(config, num_steps=max(round(options.tokens / per_step), 1))
    say = lambda line: print(line, file=sys.stderr, flush=True)

    def evaluate(config: TrainConfig) -> Plan:
        if isinstance(machine, Cluster):
            return gpus.plan(build(config, precision=precision), machine, precision, target)
        # A search compares memory, work and traffic; the code of each candidate would take most of its time.
        code = options.code and not options.search
        return tpu.plan(config, build_name, machine, precision, target, progress(sys.stderr), generate_code=code)

    try:
        if options.search:
            plans = _search(config, build, precision, machine, evaluate, options.plans, say)
            print(f"{show.ranking(plans)}\n", file=out)
        else:
            plans = [evaluate(config)]
    except OutOfMemory as error:
        print(f"does not fit: {error}; what makes room: {what_makes_room(config)}", file=out)
        return 1
    except CompilerFailed as error:
        say(f"{error}; another mesh may compile: --search tries them")
        return 1
    print(show.table(plans[0]), file=out)
    if options.json:
        found = [show.to_json(plan) for plan in plans]
        write_atomic(Path(options.json), (json.dumps(found if options.search else found[0], indent=1) + "\n").encode())
    return 0 if plans[0].fits else 1


def _search(
    config: TrainConfig,
    build: Build,
    precision: str,
    machine: Topology | Cluster,
    evaluate: Callable[[TrainConfig], Plan],
    max_plans: int,
    say: Callable[[str], None],
) -> list[Plan]:
    chip = machine.chip if isinstance(machine, Cluster) else chips.find(machine.chip)
    num_slices = 1 if isinstance(machine, Cluster) else machine.num_slices
    experiment = build(replace(config, mesh=replace(config.mesh, slice=1, data=1, model=1)), precision=precision)
    found = search.candidates(config, machine.num_chips, num_slices, updates_per_batch=experiment.updates_per_batch)
    whole = gpus.trace(experiment, search.ONE_CHIP)
    num_trained = tree.count(whole.state.trainable)

    def links_of(mesh: Mapping[str, int]) -> links.Links:
        if isinstance(machine, Cluster):
            return links.switch(chip, mesh, machine.gpus_per_host)
        return links.torus(chip, machine.shape, machine.wraps, mesh)

    def compiled(config: TrainConfig) -> Plan:
        try:
            return evaluate(config)
        except CompilerFailed as error:
            raise ConfigError(str(error)) from error

    executed = lambda config: lower.token_flops(replace(experiment, config=config)).executed
    estimate = search.estimator(gpus.state_of(whole), num_trained, executed, precision, chip, links_of)
    margin = 1.0 if isinstance(machine, Cluster) else 1.5
    return search.search(found, estimate, compiled, chip.memory_bytes, margin=margin, max_plans=max_plans, say=say)


def progress(out: TextIO) -> Callable[[str, float], None]:
    """Says what the compiler is at: redrawn in place on a terminal, one line for each stage elsewhere."""
    seen: list[str] = []

    def draw(stage: str, seconds: float) -> None:
        if out.isatty():
            out.write(f"\r\x1b[K{stage} {seconds:4.0f} s")
            out.flush()
        elif stage not in seen:
            seen.append(stage)
            print(f"{stage} …", file=out, flush=True)

    return draw
