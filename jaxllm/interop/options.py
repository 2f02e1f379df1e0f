"""Their config.json and our ModelConfig, option by option, both ways.

An `Option` takes some of their keys out of a dict and gives some of our fields, and writes them back.
What no option took is an error: a key that we do not know may change the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from jaxllm.config import ConfigError, LayerKind, ModelConfig, RopeConfig, nearest
from jaxllm.interop.kinds import (
    ANYTHING,
    DEPTH,
    FLAG,
    FROM_ZERO,
    OBJECT,
    POSITIVE,
    SHARE,
    SIZE,
    TEXT,
    Kind,
    Reader,
    list_of,
    one_of,
    only,
    or_null,
    said,
)  # fmt: skip

type Values = dict[str, Any]


class Option(NamedTuple):
    """Some keys of theirs and some fields of ours."""

    read: Callable[[Reader], Values]
    """Takes its keys; gives our fields."""
    write: Callable[[ModelConfig], Values]
    """Their keys for our fields."""


NEUTRAL = {
    "transformers_version", "transformers.js_config", "architectures", "model_type", "auto_map", "dtype", "torch_dtype", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "_name_or_path", "name_or_path", "tokenizer_class", "tokenizer_name",
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "classifier_dropout", "classifier_bias",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "torchscript", "attn_implementation",
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "cache_implementation", "hybrid_cache",
    "task_specific_params", "do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "num_beams",
    "repetition_penalty", "gradient_checkpointing", "pretraining_tp", "verbose", "min_length", "early_stopping", "num_beam_groups",
    "diversity_penalty", "typical_p", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "prefix", "sep_token_id",
    "decoder_start_token_id", "tf_legacy_loss", "use_bfloat16", "output_past", "_num_labels", "custom_pipelines", "max_sequence_length",
    "unsloth_fixed", "unsloth_version", "_commit_hash",
}  # fmt: skip
"""Keys that say nothing about the decoder's mathematics: token ids, types, files, classification heads, sampling."""

TRAINING_ONLY = ("init", "init_std", "embedding_dropout", "attention_dropout", "residual_dropout")
"""Our fields that no converted model's output depends on; a family need not have a place for them."""


def plain(theirs: str, *ours: str, kind: Kind, default: tuple[Any, ...] = ()) -> Option:
    """One key of theirs for one or more fields of ours, which it sets alike.

    Args:
      default: empty, or the one value that an absent key means.
    """
    return Option(
        lambda reader: dict.fromkeys(ours, reader.take(theirs, kind, *default)), lambda config: {theirs: getattr(config, ours[0])}
    )


def size(theirs: str, *ours: str, kind: Kind = SIZE) -> Option:
    """A whole number that must be given."""
    return plain(theirs, *ours, kind=kind)


def number(theirs: str, *ours: str, default: float | None, kind: Kind = FROM_ZERO) -> Option:
    """A float (JSON may write it as an integer), or null where `kind` has it, with the value that an absent key means."""
    own = plain(theirs, *ours, kind=kind, default=(default,))

    def read(reader: Reader) -> Values:
        return {name: None if value is None else float(value) for name, value in own.read(reader).items()}

    return Option(read, own.write)


def flag(theirs: str, *ours: str, default: bool) -> Option:
    """True or false, with the value that an absent key means."""
    return plain(theirs, *ours, kind=FLAG, default=(default,))


def option(theirs: str, *ours: str, default: Any, spellings: Mapping[Any, Any]) -> Option:
    """One of several words for one or more fields of ours, which it sets alike.

    Args:
      default: what an absent key means.
      spellings: their value -> ours; the first of several with one meaning is written.
    """

    def read(reader: Reader) -> Values:
        return dict.fromkeys(ours, spellings[reader.take(theirs, one_of(spellings), default)])

    def write(config: ModelConfig) -> Values:
        value = getattr(config, ours[0])
        return {theirs: next((theirs for theirs, our in spellings.items() if our == value), None)}

    return Option(read, write)


def always(**keys: Any) -> Option:
    """Keys of which one value is covered, which changes nothing: `always(clip_qkv=None)`. Others are refused; none is written."""

    def read(theirs: Reader) -> Values:
        for key, value in keys.items():
            theirs.take(key, only(value), None)
        return {}

    return Option(read, lambda config: {})


def ignored(*keys: str, kind: Kind = ANYTHING) -> Option:
    """Keys that this family's model does not look at."""

    def read(theirs: Reader) -> Values:
        for key in keys:
            theirs.take(key, kind, None)
        return {}

    return Option(read, lambda config: {})


def fixed(**ours: Any) -> Option:
    """Fields of ours that the whole family shares, with no key of theirs."""
    return Option(lambda theirs: dict(ours), lambda config: {})


# ----------------------------------------------------------------------------------------- heads


def width_and_heads(theirs: Reader, width: str = "hidden_size", heads: str = "num_attention_heads") -> tuple[int, int]:
    """(D, N), with D >= N."""
    D, N = theirs.take(width, SIZE), theirs.take(heads, SIZE)
    if D < N:
        raise ConfigError(f"'{width}' = {D} is less than '{heads}' = {N}; every head needs a number at least")
    return D, N


def equal_heads(width: str, heads: str) -> Option:
    """K = N and H = D / N, with no key of their own."""

    def read(theirs: Reader) -> Values:
        D, N = width_and_heads(theirs, width, heads)
        if D % N:
            raise ConfigError(f"'{width}' = {D} is not a multiple of '{heads}' = {N}")
        return {"num_kv_heads": N, "head_size": D // N}

    return Option(read, lambda config: {})


def grouped_heads(default_kv_heads: int | None = None, default_head_size: int | None = None) -> Option:
    """`num_key_value_heads`, by default N, and `head_dim`, by default D / N unless the family has a number."""

    def read(theirs: Reader) -> Values:
        D, N = width_and_heads(theirs)
        kv_heads = theirs.take("num_key_value_heads", or_null(SIZE), default_kv_heads) or N
        size = theirs.take("head_dim", or_null(SIZE), default_head_size)
        if N % kv_heads:
            raise ConfigError(f"'num_key_value_heads' = {kv_heads} does not divide 'num_attention_heads' = {N}")
        return {"num_kv_heads": kv_heads, "head_size": size or D // N}

    return Option(read, lambda config: {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_size})


# ------------------------------------------------------------------------------------------ rope

_SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_ROPE_FIELDS = {  # ours -> (theirs, whether it must be given)
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
        "original_max_length": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", "attention_factor": "attention_factor",
        "original_max_length": "original_max_position_embeddings",
    },
}  # fmt: skip


def read_rope(
    params: Reader, *, max_length: int, head_size: int, partial: bool = False, scalings: Sequence[str] = tuple(_SCALINGS)
) -> RopeConfig:
    """A `rope_parameters` object (or a `rope_scaling` one with its base put in) as ours. Null is as good as absent.

    Raises:
      ConfigError: a scaling or a setting of it that we do not have.
    """
    names = or_null(one_of(scalings))
    older = params.take("type", names, None)
    kind = params.take("rope_type", names, None) or older or "default"
    scaling: Any = _SCALINGS[kind]
    base = float(params.take("rope_theta", POSITIVE))
    fraction = float(params.take("partial_rotary_factor", or_null(SHARE), None) or 1.0)
    if fraction != 1.0 and not partial:
        raise ConfigError(f"'partial_rotary_factor' is {fraction}; this family rotates whole heads")
    rotated = int(head_size * fraction)  # theirs rounds down, ours to the nearest
    fraction = fraction if round(head_size * fraction) == rotated else rotated / head_size
    known = _ROPE_FIELDS.get(scaling, {})
    kinds = {ours: or_null(SIZE if ours == "original_max_length" else POSITIVE) for ours in known}
    given: Values = {ours: params.take(theirs, kinds[ours], None) for ours, theirs in known.items()}
    given = {ours: value if ours == "original_max_length" else float(value) for ours, value in given.items() if value is not None}
    if "original_max_length" in known:
        given.setdefault("original_max_length", max_length)
    if scaling in ("linear", "llama3") and "factor" not in given:
        raise ConfigError(f"RoPE scaling '{kind}' has no 'factor'")
    if scaling == "llama3" and not given.get("low_freq_factor", 1e30) < given.get("high_freq_factor", 0.0):
        raise ConfigError("RoPE scaling 'llama3' needs 'low_freq_factor' and 'high_freq_factor', the second above the first")
    if scaling == "yarn":
        given.setdefault("factor", max_length / given["original_max_length"])
        params.take("truncate", only(True), None)
    for key in params.surplus():
        raise ConfigError(f"'{params.within}{key}' = {said(params.values[key])} of RoPE scaling '{kind}' is not covered")
    return RopeConfig(base=base, fraction=fraction, scaling=scaling, **given)


def write_rope(rope: RopeConfig) -> Values | None:
    """The `rope_scaling` dict of ours; None without scaling."""
    if rope.scaling not in _ROPE_FIELDS:
        return None
    values = {theirs: getattr(rope, ours) for ours, theirs in _ROPE_FIELDS[rope.scaling].items()}
    return {"rope_type": rope.scaling} | {key: value for key, value in values.items() if value is not None}


def rope(
    *,
    base_key: str = "rope_theta",
    base: float = 10_000.0,
    fraction_key: str | None = None,
    fraction: float = 1.0,
    scalings: Sequence[str] = tuple(_SCALINGS),
) -> Option:
    """RoPE for all layers: `rope_parameters` (transformers 5), or base and `rope_scaling` as separate keys, which are also written.

    Args:
      base_key, base: their name of the base beside `rope_scaling`, and its default.
      fraction_key, fraction: the same for the rotated share of each head; a family without it rotates whole heads.
      scalings: their names that this family's model knows.
    """

    def read(theirs: Reader) -> Values:
        beside = {} if fraction_key is None else {"partial_rotary_factor": theirs.take(fraction_key, SHARE, fraction)}
        params = _rope_reader(theirs, base_key, base, beside)
        D, N = width_and_heads(theirs)
        size = theirs.look("head_dim", or_null(SIZE), None) or D // N
        max_length = theirs.take("max_position_embeddings", SIZE)
        return {"rope": read_rope(params, max_length=max_length, head_size=size, partial=fraction_key is not None, scalings=scalings)}

    def write(config: ModelConfig) -> Values:
        out = {base_key: config.rope.base, "rope_scaling": write_rope(config.rope)}
        return out | ({} if fraction_key is None else {fraction_key: config.rope.fraction})

    return Option(read, write)


def _rope_reader(theirs: Reader, base_key: str, base: float, beside: Values) -> Reader:
    """Their RoPE settings in one place, with `rope_theta` and what stands `beside` them put in."""
    scaling, modern = (theirs.take(key, or_null(OBJECT), None) for key in ("rope_scaling", "rope_parameters"))
    inner = Reader(scaling or modern or {}, "rope_scaling." if scaling else "rope_parameters.")
    separate, theta = theirs.take(base_key, or_null(POSITIVE), None), inner.look("rope_theta", or_null(POSITIVE), None)
    if theta is not None and separate is not None and theta != separate:
        raise ConfigError(f"'{base_key}' is {separate}, and the RoPE parameters have 'rope_theta' = {theta}; remove one")
    given = {"rope_theta": next((value for value in (theta, separate) if value is not None), base)}
    return Reader(beside | dict(inner.values) | given, inner.within)


# ---------------------------------------------------------------------------------------- layers


def shortest_pattern(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest tuple whose repetition begins with `kinds`.

    >>> a, b = LayerKind(), LayerKind(window=4)
    >>> shortest_pattern([a, b, a, b, a]) == (a, b)
    True
    """
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return tuple(kinds[:period])
    raise AssertionError("kinds is empty")


def one_window(default: int | None) -> Option:
    """Every layer has the window `sliding_window`, or none has."""

    def read(theirs: Reader) -> Values:
        return {"layer_pattern": (LayerKind(window=theirs.take("sliding_window", or_null(SIZE), default)),)}

    return Option(read, lambda config: {"sliding_window": config.kind(0).window})


def typed_layers(
    slides: Callable[[Reader, int], bool],
    local_rope: Callable[[Reader], RopeConfig | None] = lambda theirs: None,
    *,
    switch: str | None = None,
) -> Option:
    """`layer_types` says which layers have the window `sliding_window`, by default those that `slides`.

    Args:
      local_rope: RoPE of the layers with a window, if it is not the model's.
      switch: a key without which no layer has a window.
    """

    def read(theirs: Reader) -> Values:
        window = theirs.take("sliding_window", or_null(SIZE), 4096)
        if switch is not None and not theirs.take(switch, or_null(FLAG), False):
            window = None
        depth = theirs.take("num_hidden_layers", DEPTH)
        default = ["sliding_attention" if slides(theirs, i) else "full_attention" for i in range(depth)]
        types = theirs.take("layer_types", or_null(list_of(TEXT)), None) or default
        kinds = {"sliding_attention": LayerKind(window, local_rope(theirs)), "full_attention": LayerKind()}
        unknown = next((kind for kind in types if kind not in kinds), None)
        if unknown is not None:
            raise ConfigError(f"'layer_types' has {unknown!r}; jaxllm covers {', '.join(kinds)}{nearest(str(unknown), kinds)}")
        if len(types) != depth:
            raise ConfigError(f"'layer_types' has {len(types)} entries, and 'num_hidden_layers' is {depth}")
        return {"layer_pattern": shortest_pattern([kinds[kind] for kind in types])}

    def write(config: ModelConfig) -> Values:
        windows = [config.kind(i).window for i in range(config.num_layers)]
        types = ["full_attention" if window is None else "sliding_attention" for window in windows]
        window = next((w for w in windows if w is not None), None)
        return {"sliding_window": window, "layer_types": types} | ({} if switch is None else {switch: window is not None})

    return Option(read, write)


# ------------------------------------------------------------------------------------- the whole


def read_options(options: Sequence[Option], values: Mapping[str, Any], family: str) -> ModelConfig:
    """Their config as ours; every key must be taken by an option, be neutral, or be null.

    Raises:
      ConfigError: names the key that is missing, not covered, or has a value that is not.
    """
    theirs = Reader(values)
    ours: Values = {}
    for part in options:
        ours |= part.read(theirs)
    for key in theirs.surplus(NEUTRAL):
        raise ConfigError(
            f"'{key}' = {said(values[key])} of a Hugging Face {family} config is not covered{nearest(key, theirs.taken - {key})}"
        )
    try:
        return ModelConfig(**ours)
    except ConfigError as error:
        raise ConfigError(f"the Hugging Face {family} config is of no model that can be: {error}") from None


def write_options(options: Sequence[Option], config: ModelConfig) -> Values:
    """Our config as theirs."""
    out: Values = {}
    for part in options:
        out |= part.write(config)
    return out


def canonical(config: ModelConfig) -> ModelConfig:
    """The same function of the params in one spelling: settings without effect reset, no number that says what None says."""
    base = canonical_rope(config.rope, config.head_size)
    positions = config.position == "rope"
    kinds = []
    for layer in range(config.num_layers):
        kind = config.kind(layer)
        own = canonical_rope(kind.rope, config.head_size) if kind.rope is not None and positions else None
        kinds.append(LayerKind(kind.window, None if own == base else own))
    return replace(
        config,
        rope=base if positions else RopeConfig(),
        layer_pattern=shortest_pattern(kinds),
        attention_scale=None if config.attention_scale == config.head_size**-0.5 else config.attention_scale,
        parallel_norms=config.parallel_norms if config.block == "parallel" else 1,
        memory_width=config.memory_width if config.cross_attention else None,
    )


def canonical_rope(rope: RopeConfig, head_size: int) -> RopeConfig:
    """`rope` with the settings of other scalings reset; `ntk` as the larger base that it is; factors that follow written out."""
    if rope.scaling == "ntk":
        rotated = round(head_size * rope.fraction)
        return RopeConfig(base=rope.base * rope.factor ** (rotated / (rotated - 2)), fraction=rope.fraction)
    used = {"base", "fraction", "scaling", *_ROPE_FIELDS.get(rope.scaling, {})}
    return RopeConfig(**{f.name: getattr(rope, f.name) for f in fields(rope) if f.name in used})
