"""What a model carries beside its decoder for training alone. Letters: see `transformer.py`; P maps, E another model's width."""

from __future__ import annotations

import jax
from jaxtyping import Array

from jaxllm.contract import LM, Params

TRAINING_ONLY = r"projections/.*"
"""Leaves that end with the training: no model is loaded with them, and none is exported."""


def with_projections(lm: LM, num: int, width: int) -> LM:
    """`lm` with `num` linear maps from its width D to `width` E beside its params: projections/kernel [P D E]."""

    def init(key: Array) -> Params:
        key, own = jax.random.split(key)
        shape = (num, lm.config.width, width)
        return {**lm.init(key), "projections": {"kernel": jax.random.normal(own, shape) * lm.config.width**-0.5}}

    return lm._replace(init=init)
