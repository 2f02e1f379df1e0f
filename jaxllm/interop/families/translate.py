"""Their configs and tensors as ours, and back, for every family of the table.

Nothing here reads a file or casts a number: tensors in, tensors out, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.config import ConfigError, ModelConfig, diff, to_dict
from jaxllm.contract import Params
from jaxllm.interop import options
from jaxllm.interop.families.table import FAMILIES, family
from jaxllm.interop.kinds import TEXT, Reader
from jaxllm.interop.layout import lazy_rows, lazy_tensors, read_rows, write_rows
from jaxllm.interop.stored import Lazy, Stored


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The content of a config.json (of transformers 4 or 5) as a `ModelConfig`.

    Raises:
      ConfigError: another family, or an option of it that is missing, unknown or not covered, by name.

    >>> config_from_hf({'model_type': 'gpt2', 'n_layer': 2, 'n_embd': 64, 'n_head': 4, 'n_positions': 32, 'vocab_size': 9}).ff_width
    256
    """
    if "model_type" not in values:
        raise ConfigError(f"the Hugging Face config has no 'model_type'; families are {', '.join(FAMILIES)}")
    chosen = family(Reader(values).take("model_type", TEXT))
    return options.read_options(chosen.options, values, chosen.model_type)


def config_to_hf(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json: the inverse of `config_from_hf`, up to `options.TRAINING_ONLY`. Token ids are null.

    Raises:
      ConfigError: the family has no place for a field of `config`, which is named.
    """
    chosen, config = family(model_type), options.canonical(config)
    head = {"architectures": [chosen.architecture], "model_type": model_type}
    values = head | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | options.write_options(chosen.options, config)
    back = config_from_hf(values)
    lost = diff(to_dict(config), to_dict(options.canonical(back)))
    for name, (ours, theirs) in lost.items():
        if name not in options.TRAINING_ONLY:
            raise ConfigError(f"family '{model_type}' cannot express model.{name} = {ours!r}; it would be read back as {theirs!r}")
    return values


def params_from_hf(model_type: str, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Our params out of their tensors by name, in their number format; names may lack the family's prefix.

    Masks and rotary frequencies of older checkpoints are left out, and so is a second copy of a tied head.

    Raises:
      ConfigError: a config that the family cannot express; missing and surplus tensors with the nearest names; other shapes;
        a tied head that is not the embedding.
    """
    config_to_hf(model_type, config)  # or a leaf that the family does not have would get a name that nobody reads
    chosen = family(model_type)
    return read_rows(chosen.rows, config, tensors, chosen.prefix)


def params_to_hf(model_type: str, config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Their tensors by name: the inverse of `params_from_hf`. Rows that pad the vocabulary are cut off.

    Raises:
      ConfigError: a config that the family cannot express; leaves that are missing, surplus or of another shape than `config` says.
    """
    config_to_hf(model_type, config)
    return write_rows(family(model_type).rows, config, params)


def lazy_from_hf(model_type: str, config: ModelConfig, tensors: Mapping[str, Stored]) -> Params:
    """`params_from_hf` without reading: every leaf is a `Lazy` array, which reads of their tensors what a slice of it needs.

    Raises:
      ConfigError: as `params_from_hf`.
    """
    config_to_hf(model_type, config)
    chosen = family(model_type)
    return lazy_rows(chosen.rows, config, tensors, chosen.prefix)


def lazy_to_hf(model_type: str, config: ModelConfig, params: Params) -> dict[str, Lazy]:
    """`params_to_hf` without reading: their tensors by name, each made of our leaves when it is read.

    Raises:
      ConfigError: as `params_to_hf`.
    """
    config_to_hf(model_type, config)
    return lazy_tensors(family(model_type).rows, config, params)
