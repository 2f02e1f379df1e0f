"""Students that experiments cut out of a teacher: scored once, pruned once, then trained from it.

Sources: arXiv:2408.11796, arXiv:2407.14679; the surgery itself is jaxllm/surgery/prune.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from jaxllm import manifest, pretrained
from jaxllm.config import DistillConfig, TrainConfig
from jaxllm.data import batch as batches
from jaxllm.data.position import Position
from jaxllm.files import cache_home, path_of
from jaxllm.study import Run
from jaxllm.surgery import importance, prune
from jaxllm.surgery.importance import Scores
from jaxllm.surgery.shapes import Shape

type How = Literal["importance", "random", "scratch"]

CALIBRATION_ROWS = 64


def shaped(config: TrainConfig, shape: Shape) -> TrainConfig:
    """`config` whose model has that shape."""
    return replace(config, model=replace(config.model, **shape._asdict()))


def scores_of(teacher: Path, config: TrainConfig) -> Scores:
    """Importance in the teacher, on the first rows of the arm's own text; computed once for each teacher and text."""
    dataset = batches.load(config.data, seed=0)
    fingerprint = manifest.fingerprint(teacher)
    rows_of = hashlib.sha256(repr((dataset.fingerprint, config.data)).encode()).hexdigest()
    kept = cache_home() / "scores" / f"{fingerprint}-{rows_of[:8]}.npz"
    if kept.exists():
        return importance.load(kept, fingerprint)
    model = pretrained.load(teacher, precision="float32")
    size = config.data.batch_size
    items = dataset.read(Position(), lambda size: np.arange(size))
    rows = [next(items).batch for _ in range(-(-CALIBRATION_ROWS // size))]
    scores = importance.measure(model.lm, model.params, rows, fingerprint=fingerprint)
    kept.parent.mkdir(parents=True, exist_ok=True)
    importance.save(kept, scores)
    return scores


def pruned(teacher: Path, folder: Path, config: TrainConfig, how: How) -> str:
    """The teacher in the shape of `config.model`, as a folder that training starts from; made once."""
    if not (folder / "checkpoints").is_dir():
        model = pretrained.load(teacher, precision="float32")
        scores = importance.random(model.config, config.seed) if how == "random" else scores_of(teacher, config)
        params, new = prune.prune(model.params, model.config, scores, Shape.of(config.model))
        pretrained.save(
            folder, new, params, model.tokenizer, chat_template=model.chat_template, stop_ids=model.stop_ids,
            source={"kind": "prune", "from": str(teacher), "scores": how, "after": Shape.of(new)._asdict()},
        )  # fmt: skip
    return str(folder)


def student(how: How, source: str, teacher: str) -> Callable[[Run], TrainConfig]:
    """An `Arm.prepare`: weights cut out of one model, or fresh ones, that learn from another, or from the text.

    Args:
      source, teacher: an arm that is needed, or a folder. No teacher: the text alone.
    """

    def prepare(run: Run) -> TrainConfig:
        assert run.config is not None
        folder = lambda name: run.needs[name].run_dir if name in run.needs else path_of(name)
        start = "" if how == "scratch" else pruned(folder(source), run.run_dir.with_name(f"{run.run_dir.name}-start"), run.config, how)
        return replace(run.config, init_from=start, distill=DistillConfig(teachers=((str(folder(teacher)), 1.0),) if teacher else ()))

    return prepare
