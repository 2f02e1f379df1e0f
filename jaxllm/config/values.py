"""Configs as plain values: to JSON and back, what differs between two, and the hash that names a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Collection
from typing import Any

from jaxllm.config.data import DataConfig
from jaxllm.config.errors import ConfigError, nearest
from jaxllm.config.train import NOT_HASHED, NOT_HASHED_DATA, TrainConfig


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values; JSON turns its tuples into lists, and `from_dict` back."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Rebuild `cls` from `to_dict`'s output, tuples and nested configs included.

    Raises:
      ConfigError: an unknown field, with the nearest known one.
    """
    hints = typing.get_type_hints(cls)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise ConfigError(f"unknown field {where}{unknown[0]} of {cls.__name__}{nearest(unknown[0], hints)}")
    return cls(**{name: _convert(hints[name], value, f"{where}{name}.") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin is tuple:
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        return tuple(_convert(h, v, where) for h, v in zip(inner, value, strict=True))
    return value


def hashed_values(config: TrainConfig) -> dict[str, Any]:
    """The part of a config, as JSON values, that changes the mathematics of a run; defaults too, so that `diff` can name both values."""
    values = json.loads(json.dumps({name: value for name, value in to_dict(config).items() if name not in NOT_HASHED}))
    for name in NOT_HASHED_DATA:
        del values["data"][name]
    return values


DEFAULTS_VERSION = 1
"""Part of every hash. Raise it when a default changes: a run of the old one is another run. A field that is added changes nothing."""


def config_hash(config: TrainConfig) -> str:
    """8 hex digits over everything that changes the mathematics of a run and differs from its default.

    >>> config_hash(TrainConfig()) == config_hash(TrainConfig(num_steps=7))
    True
    """
    values = [DEFAULTS_VERSION, chosen_values(config)]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def chosen_values(config: TrainConfig, left_out: Collection[str] = NOT_HASHED) -> dict[str, Any]:
    """Fields, nested ones too, that differ from their class's default, as JSON values; without `left_out`, and how data is read.

    Defaults are left out, so that a field that is added later changes no hash.

    >>> chosen_values(TrainConfig(seed=1, save_every=7, data=DataConfig(batch_size=4, num_workers=2)))
    {'data': {'batch_size': 4}, 'seed': 1}
    """
    usual = DataConfig()
    data = dataclasses.replace(config.data, **{name: getattr(usual, name) for name in NOT_HASHED_DATA})
    return {name: value for name, value in _chosen(dataclasses.replace(config, data=data)).items() if name not in left_out}


def _chosen(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        try:
            default = type(value)()
        except TypeError:  # a field without a default: all count
            default = None
        pairs = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return {name: _chosen(x) for name, x in pairs if default is None or x != getattr(default, name)}
    if isinstance(value, list | tuple):
        return [_chosen(x) for x in value]
    return value


def diff(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Differing values of two nested dicts of JSON values, by dotted path: {path: (old, new)}.

    >>> diff({'a': {'b': 1}}, {'a': {'b': 2}})
    {'a.b': (1, 2)}
    """
    if isinstance(old, dict) and isinstance(new, dict):
        out: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys([*old, *new]):
            out |= diff(old.get(key), new.get(key), f"{prefix}{key}.")
        return out
    return {} if old == new else {prefix[:-1]: (old, new)}
