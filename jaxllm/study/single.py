"""One run of the loop in this process: the configuration checked, its precision chosen, its experiment built, trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxllm import loop, optim, pretrain, rundir, sharding, tree
from jaxllm.config import Precision, TrainConfig
from jaxllm.step import Experiment
from jaxllm.study.values import Build


class Trained(NamedTuple):
    """How a run ended."""

    exit_code: int
    """0, or 128 + the signal that stopped it."""
    precision: str
    num_trained: int
    """Parameters that the optimizer moves."""
    results: dict[str, Any]
    """What `results.json` holds; {} for a run that is not complete."""
    run_dir: Any


def train(
    config: TrainConfig,
    build: Build | None = None,
    say: Callable[[str], None] = print,
    precision: tuple[Precision, str] | None = None,
) -> Trained:
    """Train `config`, or resume it, with the experiment that `build` makes of it.

    Args:
      build: (config, precision=…) -> Experiment; None means `pretrain.experiment`.
      precision: (precision, why); None means `pretrain.choose_precision`.

    Raises:
      ConfigError, TrainingFailed: as `loop.run`.
    """
    # The loop asks this again; here it comes before the choice of a precision, which may compile a matmul to time it.
    sharding.check_fit(config.model, config.data, config.optim, sharding.make_mesh(config.mesh))
    chosen, why = precision or pretrain.choose_precision(config)
    say(f"precision: {chosen} ({why})")
    experiment = (build or pretrain.experiment)(config, precision=chosen)
    ending = loop.run(experiment, chosen, say=say, more_environment={"precision_because": why})
    results = {} if ending.exit_code else rundir.read_json(ending.run_dir / "results.json")
    return Trained(ending.exit_code, chosen, num_trained(experiment), results, ending.run_dir)


def num_trained(experiment: Experiment) -> int:
    """Parameters that the optimizer moves."""
    shapes = experiment.lm.param_shapes
    return tree.count(optim.split(experiment.config.optim, shapes)[0])
