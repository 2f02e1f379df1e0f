"""The values that describe a run: frozen dataclasses, nothing else.

A config is data. It holds what a user chose; a number that follows from others is a property, with
its arithmetic in the docstring. Structure (which loss, which model functions) lives in
`experiments/`, never here. Every field is a command-line flag of the same name:
`jaxllm train configs/quickstart.py --model.num_layers 8`.

Dimension letters are those of `jaxllm/models/transformer.py`.
"""

from __future__ import annotations

from jaxllm.config.adapters import BottleneckConfig, LoraConfig, PrefixConfig, QuantiseConfig
from jaxllm.config.bitnet import BitnetConfig
from jaxllm.config.data import DataConfig, SourceConfig, TokenizerConfig
from jaxllm.config.distill import DistillConfig
from jaxllm.config.errors import ConfigError, check_choices, nearest, nearest_divisors
from jaxllm.config.model import LayerKind, ModelConfig, RopeConfig
from jaxllm.config.train import (
    NOT_HASHED,
    NOT_HASHED_DATA,
    LossConfig,
    MeshConfig,
    OptimConfig,
    Precision,
    ScheduleConfig,
    SpikeConfig,
    TrainConfig,
)
from jaxllm.config.values import chosen_values, config_hash, diff, from_dict, hashed_values, to_dict

__all__ = [
    "NOT_HASHED",
    "NOT_HASHED_DATA",
    "BitnetConfig",
    "BottleneckConfig",
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "LayerKind",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Precision",
    "PrefixConfig",
    "QuantiseConfig",
    "RopeConfig",
    "ScheduleConfig",
    "SourceConfig",
    "SpikeConfig",
    "TokenizerConfig",
    "TrainConfig",
    "check_choices",
    "chosen_values",
    "config_hash",
    "diff",
    "from_dict",
    "hashed_values",
    "nearest",
    "nearest_divisors",
    "to_dict",
]
