"""Configs survive a trip through JSON, hash what matters, and refuse what cannot work by its name."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import config
from jaxllm.config import (
    ConfigError,
    DataConfig,
    LayerKind,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    SourceConfig,
    TrainConfig,
    config_hash,
    diff,
    from_dict,
    hashed_values,
    nearest,
    to_dict,
)

BOUNDS: dict[str, st.SearchStrategy[Any]] = {"num_heads": st.just(12), "num_kv_heads": st.sampled_from([1, 2, 3, 4, 6, 12])}
BOUNDS |= {"fraction": st.just(1.0), "head_size": st.integers(2, 64).map(lambda n: 2 * n), "held_out_fraction": st.floats(0, 0.9)}
BOUNDS |= {
    "slice": st.integers(1, 4),
    "data": st.sampled_from([-1, 1, 8]),
    "model": st.integers(1, 4),
    "sequence_length": st.integers(2, 9),
}
BOUNDS |= {name: st.floats(0, 0.9) for name in ("embedding_dropout", "attention_dropout", "residual_dropout")}

SURGERY: dict[type, list[Any]] = {
    config.LoraConfig: [config.LoraConfig(), config.LoraConfig((("layers/.*", 4, 8.0), (".*", 0, 1.0)), "sqrt_rank", 0.5, "kaiming", True)],
    config.BottleneckConfig: [config.BottleneckConfig(), config.BottleneckConfig(8, ("mlp/down",))],
    config.PrefixConfig: [config.PrefixConfig(), config.PrefixConfig(5, 16, "infix", 3, "words")],
    config.BitnetConfig: [config.BitnetConfig(), config.BitnetConfig("b158", num_groups=2)],
    config.QuantiseConfig: [config.QuantiseConfig(), config.QuantiseConfig("nf4", 16, ".*")],
    config.DistillConfig: [
        config.DistillConfig(),
        config.DistillConfig(
            (("a", 1.0), ("b", 0.5)), kind="jensen_shannon", states="mse", state_layers=((1, 2),), attention_layers=((0, 0),)
        ),
        config.DistillConfig(stored=(("c", 2.0),), tail="uniform", ce=0.5, ce_end=1.0),
    ],
}


def values(hint: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Any value of a field's type; a new field joins by itself."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if name in BOUNDS and hint in (int, float):
        return BOUNDS[name]
    if name in ("cross_attention", "noise_scale"):  # refused in parallel blocks, and without micro-batches
        return st.just(False)
    if name == "ema_decay":
        return st.none() | st.floats(0, 0.9)
    if name == "profile_steps":
        return st.none() | st.tuples(st.integers(1, 9), st.integers(9, 99))
    if hint in SURGERY:  # fields that only go together
        return st.sampled_from(SURGERY[hint])
    if dataclasses.is_dataclass(hint):
        fields = typing.get_type_hints(hint)
        return st.builds(hint, **{f.name: values(fields[f.name], f.name) for f in dataclasses.fields(hint)})
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(values(arg) for arg in args))
    if origin is tuple:
        least = 1 if name in ("sources", "layer_pattern") else 0
        return st.lists(values(args[0]), min_size=least, max_size=2).map(tuple) if args[-1] is ... else st.tuples(*map(values, args))
    simple = {int: st.integers(1, 99), float: st.floats(0.125, 100), str: st.text(max_size=5), bool: st.booleans(), type(None): st.none()}
    return simple[hint]


@settings(max_examples=10, deadline=None)
@given(value=values(TrainConfig))
def test_a_config_survives_json(value: TrainConfig):
    given_back = from_dict(TrainConfig, json.loads(json.dumps(to_dict(value))))
    assert given_back == value
    assert hash(given_back) == hash(value)  # jit takes configs as static arguments: nothing has become a list
    assert config_hash(given_back) == config_hash(value)


def test_a_config_missing_fields_takes_the_defaults():
    assert from_dict(TrainConfig, {"model": {"width": 32}}) == TrainConfig(model=ModelConfig(width=32))


def test_the_values_of_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------ hash

SAME_RUN: dict[str, Any] = {
    "num_steps": 7, "run_dir": "x", "save_every": 3, "keep_last": 9, "keep_every": 5, "log_every": 1, "eval_every": 2, "sample_every": 4,
    "eval_batches": 1, "profile_steps": (1, 2), "wandb_project": "x", "on_config_change": "accept", "mesh": MeshConfig(model=2),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME_RUN)
def test_the_hash_leaves_out_what_does_not_change_the_mathematics(name: str):
    assert getattr(TrainConfig(), name) != SAME_RUN[name]
    assert config_hash(replace(TrainConfig(), **{name: SAME_RUN[name]})) == config_hash(TrainConfig())


@pytest.mark.parametrize("name", ["num_workers", "cache_dir"])
def test_the_hash_leaves_out_how_data_is_read(name: str):
    """Neither how many processes read, nor where the tokenised corpus lies, changes a bit of a run."""
    data = replace(DataConfig(), **{name: {"num_workers": 3, "cache_dir": "elsewhere"}[name]})
    assert config_hash(TrainConfig(data=data)) == config_hash(TrainConfig())


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_hash_sees_everything_else(data: st.DataObject):
    name = data.draw(st.sampled_from([f.name for f in dataclasses.fields(TrainConfig) if f.name not in SAME_RUN]))
    value = data.draw(values(typing.get_type_hints(TrainConfig)[name], name))
    same_data = name == "data" and replace(value, num_workers=0, cache_dir="") == DataConfig()
    if value != getattr(TrainConfig(), name) and not same_data:
        assert config_hash(replace(TrainConfig(), **{name: value})) != config_hash(TrainConfig())


HASHES = {
    "7674a781": TrainConfig(),
    "4659f21b": TrainConfig(name="other", num_steps=7, model=ModelConfig(width=32, rope=RopeConfig(base=1e6)), optim=OptimConfig(lr=3e-4)),
    "328c238a": TrainConfig(data=DataConfig(sources=(SourceConfig(path="a"), SourceConfig(path="b", weight=2.0))), init_from="x"),
}


@pytest.mark.parametrize("expected", HASHES)
def test_a_run_has_the_same_hash_for_good(expected: str):
    """A run directory is found by its hash: with another one, the same command trains anew in another folder."""
    message = "every run directory gets another name: undo what changed the hash, or, if a default had to change, write the new hashes here"
    assert config_hash(HASHES[expected]) == expected, message


def test_a_default_changes_only_with_the_version_of_the_hash():
    """defaults.json holds the defaults of that version; fields that were added since are not in it."""
    then = hashed_values(from_dict(TrainConfig, json.loads((Path(__file__).parent / "defaults.json").read_text())))
    assert diff(then, hashed_values(TrainConfig())) == {}, (
        "these defaults changed, (old, new), and defaults are not in the hash: a new run would take the folder of an old one. "
        "Raise DEFAULTS_VERSION in jaxllm/config/values.py, and write the new defaults into tests/defaults.json and the hashes here"
    )


def test_a_field_that_is_added_changes_no_hash():
    newer = dataclasses.make_dataclass("Newer", [("later", int, dataclasses.field(default=3))], bases=(TrainConfig,), frozen=True)
    assert config_hash(newer(seed=5)) == config_hash(TrainConfig(seed=5))
    assert config_hash(newer(later=4)) != config_hash(TrainConfig())


def test_diff_names_what_changed():
    old, new = TrainConfig(), TrainConfig(model=ModelConfig(width=32), seed=3)
    assert diff(to_dict(old), to_dict(new)) == {"model.width": (64, 32), "seed": (0, 3)}
    assert diff({"a": 1}, {}) == {"a": (1, None)}


# -------------------------------------------------------------------------------------- derived values


def test_derived_values():
    c = ModelConfig(num_heads=12, num_kv_heads=3, layer_pattern=(LayerKind(window=2), LayerKind()))
    assert c.group_size == 4
    assert [c.kind(layer).window for layer in range(5)] == [2, None, 2, None, 2]
    assert {a: ModelConfig(activation=a).gated for a in ("swiglu", "geglu", "geglu_tanh", "reglu2", "gelu", "gelu_tanh", "relu2")} == {
        "swiglu": True, "geglu": True, "geglu_tanh": True, "reglu2": True, "gelu": False, "gelu_tanh": False, "relu2": False,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- errors


def test_an_unknown_field_gets_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown field model.num_layer of ModelConfig; did you mean 'num_layers'\?"):
        from_dict(TrainConfig, {"model": {"num_layer": 3}})
    with pytest.raises(ConfigError, match=r"model\.layer_pattern.*windo.*'window'"):
        from_dict(TrainConfig, {"model": {"layer_pattern": [{"windo": 3}]}})


def test_nearest_is_silent_about_what_is_far():
    assert nearest("zzz", ["swiglu"]) == ""


ROPE3 = RopeConfig(fraction=0.3)

REFUSED: dict[str, tuple[Any, str]] = {
    "no layers": (lambda: ModelConfig(num_layers=0), r"model.num_layers is 0"),
    "heads": (lambda: ModelConfig(num_heads=6, num_kv_heads=4), r"does not divide model.num_heads = 6; choose one of 1, 2, 3, 6"),
    "pattern": (lambda: ModelConfig(layer_pattern=()), r"layer_pattern is empty"),
    "window": (lambda: ModelConfig(layer_pattern=(LayerKind(window=0),)), r"window 0"),
    "dropout": (lambda: ModelConfig(residual_dropout=1.0), r"residual_dropout is 1.0; it must be in \[0, 1\)"),
    "odd rotation": (lambda: ModelConfig(head_size=10, rope=ROPE3), r"even number"),
    "odd rotation of a kind": (lambda: ModelConfig(head_size=10, layer_pattern=(LayerKind(rope=ROPE3),)), r"even number"),
    "row": (lambda: DataConfig(sequence_length=1), r"sequence_length is 1"),
    "batch": (lambda: DataConfig(batch_size=0), r"batch_size is 0"),
    "held out": (lambda: DataConfig(held_out_fraction=1.0), r"held_out_fraction is 1.0"),
    "sources": (lambda: DataConfig(sources=()), r"sources is empty"),
    "rate": (lambda: OptimConfig(lr=0.0), r"optim.lr is 0.0"),
    "rate that is no number": (lambda: OptimConfig(lr=float("nan")), r"optim.lr is nan"),
    "micro-batches": (lambda: OptimConfig(num_microbatches=0), r"num_microbatches is 0"),
    "mesh": (lambda: MeshConfig(data=0), r"mesh is \(1, 0, 1\)"),
    "two free axes": (lambda: MeshConfig(data=-1, model=-1), r"at most one is -1"),
    "steps": (lambda: TrainConfig(num_steps=0), r"num_steps is 0"),
    "cadence": (lambda: TrainConfig(save_every=0), r"save_every is 0"),
    "parallel block with a memory": (lambda: ModelConfig(block="parallel", cross_attention=True), r"cross_attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name(name: str):
    make, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        make()


MISSPELT = [
    (ModelConfig, "activation", "swigul", "swiglu"),
    (ModelConfig, "norm_placement", "befor", "before"),
    (ModelConfig, "position", "rotary", "rope"),
    (RopeConfig, "scaling", "lama3", "llama3"),
    (OptimConfig, "name", "adam", "adamw"),
    (SourceConfig, "kind", "json", "jsonl"),
    (TrainConfig, "precision", "bf16", "bfloat16"),
]


@pytest.mark.parametrize("cls, field, value, meant", MISSPELT)
def test_a_misspelt_choice_is_refused(cls: type, field: str, value: str, meant: str):
    """A config file is Python, which does not check a Literal: 'befor' would train a model without norms."""
    with pytest.raises(ConfigError, match=rf"{field}.*{value}.*{meant}"):
        cls(**{field: value})


def test_every_error_is_one_line():
    for make, _ in REFUSED.values():
        try:
            make()
        except ConfigError as error:
            assert "\n" not in str(error)
    assert issubclass(config.ConfigError, ValueError)
