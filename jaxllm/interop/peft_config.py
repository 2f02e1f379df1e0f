"""PEFT's adapter_config.json: what of it is covered, which modules it names, and how ours is written.

A key that changes the mathematics is read or refused; one that is unknown is refused where it is set to anything, and otherwise ignored,
as newer versions write every option that they know.

Source: peft 0.21 (`tuners/lora/config.py`, `tuners/prefix_tuning/config.py`, `check_target_module_exists` in `tuners/tuners_utils.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.config import ConfigError, LoraConfig, ModelConfig, PrefixConfig, nearest
from jaxllm.interop.kinds import CHANCE, COUNT, FLAG, OBJECT, POSITIVE, SIZE, TEXT, Kind, Reader, either, list_of, or_null, said

_WITHIN = "adapter_config."
_NO_EFFECT = {"peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
_LORA_NO_EFFECT = {  # on training, on memory, on how A and B began
    "fan_in_fan_out",  # the layout of the weight, which the family's table knows; A and B are the same either way
    "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
}  # fmt: skip
_PREFIX_NO_EFFECT = {"encoder_hidden_size", "prefix_projection", "init_weights"}  # the MLP is gone: its output is what was saved
_INIT = Kind(
    "true, false, 'gaussian', 'eva' or 'orthogonal': the others change the base's own weights, and PEFT's save_pretrained(FOLDER, "
    "path_initial_model_for_weight_conversion=...) makes a plain adapter of them",
    lambda x: isinstance(x, str | bool) and x in (True, False, "gaussian", "eva", "orthogonal"),
)


class Target(NamedTuple):
    """What one module has."""

    rank: int
    alpha: float

    def of_rank_before(self, rank: int, config: LoraConfig) -> Target:
        """The same scale, where alpha was that of another rank.

        >>> Target(8, 16.0).of_rank_before(4, LoraConfig())
        Target(rank=8, alpha=32.0)
        """
        if rank == self.rank:
            return self
        return self._replace(alpha=self.alpha * (self.rank / rank) ** (1.0 if config.scale == "rank" else 0.5))


def scale(target: Target, config: LoraConfig) -> float:
    """alpha / R, or alpha / √R."""
    return target.alpha / (target.rank if config.scale == "rank" else target.rank**0.5)


# ---------------------------------------------------------------------------------------- reading

_NAMES = or_null(either(TEXT, list_of(TEXT)))
_LAYERS = or_null(either(COUNT, list_of(COUNT)))
_TASK = Kind("CAUSAL_LM, or null", lambda x: x in (None, "CAUSAL_LM"))
FOLD = "fold it in with PEFT's merge_and_unload(), and convert the result: python -m tools.convert hf FOLDER OUT"


def read_lora(
    values: Mapping[str, Any], names: Sequence[str], head: Collection[str], held: Collection[str]
) -> tuple[LoraConfig, dict[str, Target]]:
    """(our config without rules, module name -> rank and alpha of each that the adapter is on).

    Args:
      values: the content of adapter_config.json.
      names: those of all linear maps of the base.
      head: that of the output head, which 'all-linear' leaves out.
      held: those that the file has tensors for, which are meant where target_modules is null.

    Raises:
      ConfigError: an option that is not covered, or unknown and set; a value of another type; targets that match nothing.
    """
    theirs = Reader(values, _WITHIN)
    config = LoraConfig(
        scale="sqrt_rank" if theirs.take("use_rslora", FLAG, False) else "rank",
        dropout=float(theirs.take("lora_dropout", CHANCE, 0.0)),
        init="gaussian" if theirs.take("init_lora_weights", _INIT, True) == "gaussian" else "kaiming",
        dora=theirs.take("use_dora", FLAG, False),
    )
    if (bias := theirs.take("bias", TEXT, "none")) != "none":
        raise ConfigError(f"the adapter trains biases too (bias = '{bias}'), and only 'none' is covered; {FOLD}")
    chosen = _chosen(theirs, names, head, held)
    rank, alpha = theirs.take("r", SIZE, 8), theirs.take("lora_alpha", POSITIVE, 8)
    ranks, alphas = _by_pattern(theirs, "rank_pattern", SIZE, rank), _by_pattern(theirs, "alpha_pattern", POSITIVE, alpha)
    _check_surplus(theirs, _LORA_NO_EFFECT)
    return config, {name: Target(ranks(name), float(alphas(name))) for name in chosen}


def read_prefix(values: Mapping[str, Any], model: ModelConfig) -> PrefixConfig:
    """Ours, of a PREFIX_TUNING adapter.

    Raises:
      ConfigError: an option that is not covered, or unknown and set; a value of another type; sizes of another base.
    """
    theirs = Reader(values, _WITHIN)
    expected = {
        "num_layers": model.num_layers, "num_attention_heads": model.num_kv_heads, "token_dim": model.num_kv_heads * model.head_size,
        "num_transformer_submodules": 1,
    }  # fmt: skip
    for key, ours in expected.items():
        given = theirs.take(key, or_null(SIZE), None)
        if given not in (None, ours):
            raise ConfigError(f"the adapter's {key} is {given}, and this base has {ours}: it was made for another base")
    length = theirs.take("num_virtual_tokens", SIZE)
    _check_surplus(theirs, _PREFIX_NO_EFFECT)
    return PrefixConfig(length=length)


def _chosen(theirs: Reader, names: Sequence[str], head: Collection[str], held: Collection[str]) -> list[str]:
    """Those of `names` that the adapter is on."""
    wanted = theirs.take("target_modules", _NAMES, None)
    if wanted is None:
        matches: Callable[[str], bool] = lambda name: name in held
    elif isinstance(wanted, str) and wanted.lower() == "all-linear":
        matches = lambda name: name not in head
    else:
        matches = _matcher(wanted, "target_modules")
    excluded = _matcher(theirs.take("exclude_modules", _NAMES, None) or [], "exclude_modules")
    in_layers = _in_layers(theirs, isinstance(wanted, str))
    chosen = [name for name in names if matches(name) and not excluded(name) and in_layers(name)]
    if not chosen:
        ends = sorted({name.rpartition(".")[2] for name in names})
        near = nearest(wanted[0], ends) if isinstance(wanted, list) and wanted else ""
        raise ConfigError(f"target_modules {said(wanted)} matches no linear map of the base, which has {', '.join(ends)}{near}")
    return chosen


def _in_layers(theirs: Reader, by_regex: bool) -> Callable[[str], bool]:
    """Whether a module is in one of layers_to_transform."""
    given, patterns = theirs.take("layers_to_transform", _LAYERS, None), theirs.take("layers_pattern", _NAMES, None) or r"[^.]*"
    if given in (None, []):
        return lambda name: True
    if by_regex:
        raise ConfigError("layers_to_transform goes with a list of target_modules, and these are one regular expression")
    wanted = given if isinstance(given, list) else [given]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    compiled = [_compiled(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", "layers_pattern") for pattern in patterns]

    def matches(name: str) -> bool:
        found = next((match for pattern in compiled if (match := pattern.match(name))), None)
        return found is not None and int(found["layer"]) in wanted

    return matches


def _matcher(wanted: str | Sequence[str], key: str) -> Callable[[str], bool]:
    """A regular expression matches the whole name; of a list, a name matches itself and what ends with it."""
    if isinstance(wanted, str):
        pattern = _compiled(wanted, key)
        return lambda name: pattern.fullmatch(name) is not None
    return lambda name: any(name == end or name.endswith(f".{end}") for end in wanted)


def _by_pattern(theirs: Reader, key: str, kind: Kind, default: Any) -> Callable[[str], Any]:
    """A module's number: that of the first pattern which its name ends with, else the default."""
    given = Reader(theirs.take(key, or_null(OBJECT), None) or {}, f"{_WITHIN}{key}.")
    patterns = [(_compiled(rf"(.*\.)?({pattern})$", key), given.take(pattern, kind)) for pattern in given.values]
    return lambda name: next((value for pattern, value in patterns if pattern.match(name)), default)


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{key} has '{pattern}', which is not a regular expression: {error}") from None


def _check_surplus(theirs: Reader, neutral: set[str]) -> None:
    theirs.take("task_type", _TASK, None)
    if saved := theirs.take("modules_to_save", _NAMES, None):
        raise ConfigError(f"the adapter retrained whole modules (modules_to_save = {said(saved)}), which is not covered; {FOLD}")
    for key in theirs.surplus(neutral | _NO_EFFECT):
        if (value := theirs.values[key]) not in (False, "", [], {}):  # 0 too
            raise ConfigError(f"the adapter's '{key}' = {said(value)} is not covered{nearest(key, theirs.taken - {key})}")


# ---------------------------------------------------------------------------------------- writing

_COMMON = {
    "task_type": "CAUSAL_LM", "auto_mapping": None, "base_model_name_or_path": None, "revision": None, "inference_mode": True,
    "modules_to_save": None,
}  # fmt: skip


def lora_values(config: LoraConfig, adapted: Mapping[str, Target], conv: bool) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
      adapted: rank and alpha by the shortest name that says which modules are meant.
      conv: whether some of them keep their weights as [in, out].
    """
    ranks, alphas = (Counter(target[i] for target in adapted.values()).most_common(1)[0][0] for i in (0, 1))
    plain = lambda number: int(number) if float(number).is_integer() else number
    return _COMMON | {
        "peft_type": "LORA", "r": ranks, "lora_alpha": plain(alphas), "target_modules": list(adapted),
        "rank_pattern": {name: target.rank for name, target in adapted.items() if target.rank != ranks},
        "alpha_pattern": {name: plain(target.alpha) for name, target in adapted.items() if target.alpha != alphas},
        "use_rslora": config.scale == "sqrt_rank", "use_dora": config.dora, "lora_dropout": config.dropout, "bias": "none",
        "fan_in_fan_out": conv, "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip


def prefix_values(config: PrefixConfig, model: ModelConfig) -> dict[str, Any]:
    """The content of adapter_config.json. With fewer key/value heads than query heads, a token's width is that of the former."""
    width = model.num_kv_heads * model.head_size
    return _COMMON | {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": config.length, "token_dim": width, "num_layers": model.num_layers,
        "num_attention_heads": model.num_kv_heads, "num_transformer_submodules": 1, "encoder_hidden_size": width,
        "prefix_projection": False, "init_weights": None,
    }  # fmt: skip
