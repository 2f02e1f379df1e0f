"""Loss spikes: when a loss is one, and which batches to skip after rewinding.

PaLM restarted about 100 steps before each spike and skipped 200–500 batches that covered it; the same
batches did no harm from another checkpoint. Source: arXiv:2204.02311 section 5.1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from jaxllm.config import SpikeConfig

MAX_RESTARTS = 5
"""Rewinds to one step, each with more batches skipped, after which the batches are not to blame."""


def robust_z(recent: Sequence[float], loss: float) -> float:
    """(loss − median) / (1.4826 · median absolute deviation) of the recent losses.

    1.4826 makes the deviation that of a normal distribution. Where the recent losses hardly differ, a
    thousandth of their median stands in, so that a flat stretch does not make noise a spike.

    >>> round(robust_z([1.0, 2.0, 3.0, 4.0, 5.0], 9.0), 3)
    4.047
    """
    values = np.asarray(recent, np.float64)
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - middle)))
    return (loss - middle) / max(spread, 1e-3 * abs(middle), 1e-12)


def is_spike(config: SpikeConfig, recent: Collection[float], loss: float) -> bool:
    """Whether `loss` is a spike after the losses of the last `config.window` steps (fewer: never)."""
    if not config.enabled or len(recent) < config.window:
        return False
    return not math.isfinite(loss) or robust_z(list(recent)[-config.window :], loss) > config.threshold


def skip_range(config: SpikeConfig, first_batch: int, spike_batch: int) -> tuple[int, int]:
    """[first, last) ids to skip: `skip_batches` from the restart on, or around the spike where that would not cover it.

    >>> skip_range(SpikeConfig(skip_batches=4), 10, 12)
    (10, 14)
    >>> skip_range(SpikeConfig(skip_batches=4), 10, 20)
    (18, 22)
    """
    if first_batch + config.skip_batches > spike_batch:
        return first_batch, first_batch + config.skip_batches
    start = spike_batch - config.skip_batches // 2
    return start, start + config.skip_batches


def restart_step(config: SpikeConfig, saved: Sequence[int], spike_step: int) -> int | None:
    """The newest saved step at least `rewind_steps` before the spike, else the oldest before it; None without any."""
    before = [step for step in saved if step < spike_step]
    early = [step for step in before if step <= spike_step - config.rewind_steps]
    return max(early) if early else min(before, default=None)
