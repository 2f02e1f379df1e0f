"""A checkpoint of ours as the tensors and files of a Hugging Face folder; no tensor is read before it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxllm import checkpoint_slices, pretrained, rundir, tree
from jaxllm.config import ConfigError, ModelConfig, TrainConfig, from_dict
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.interop import bitnet as ternary
from jaxllm.interop import families, options
from jaxllm.interop.layout import leaf_shapes
from jaxllm.interop.stored import Lazy
from jaxllm.interop.vocab import resize_vocab
from jaxllm.surgery import bitnet

_DROPPED = {"auto_map", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "architectures", "model_type", "transformers_version"}
_TEXT_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json")


class Export(NamedTuple):
    """What a Hugging Face folder is made of."""

    tensors: dict[str, Lazy]
    files: dict[str, bytes]


class Origin(NamedTuple):
    """Where the weights of a run came from, however many runs ago."""

    family: str
    folder: Path | None
    """The `source` folder of the conversion."""
    trained: bool
    """Whether anything was trained since."""


def prepare(folder: Path, family: str = "", vocab_size: int | None = None, dtype: str = "keep") -> Export:
    """The params, the config and the text side of a checkpoint in a family's terms.

    Args:
      folder: a run directory, a converted folder, or one checkpoint of either.
      family: their model_type; empty for the one that the weights came from, else the first that can express the config.
      vocab_size: as for `resize_vocab`; None keeps it.
      dtype: a number format's name, or 'keep'.

    Raises:
      ConfigError: nothing there, a damaged checkpoint, or a config that the family cannot express.
    """
    train = pretrained.train_config(folder)  # before anything is hashed: it says what is wrong with the folder
    config, params = _open(folder, train)
    tokenizer, template, stop_ids = pretrained.load_text(folder)
    if vocab_size is not None:
        config, params = resize_vocab(config, params, vocab_size)
    origin = find_origin(folder)
    if train.bitnet.kind == "none":
        name = family or _fitting(config, origin.family)
        values, tensors = families.config_to_hf(name, config), families.lazy_to_hf(name, config, params)
    else:
        values, tensors = ternary.packed(config, train.bitnet, params)
        name = values["model_type"]
        if family not in ("", name):
            raise ConfigError(f"{folder} has {train.bitnet.kind} weights, which Hugging Face keeps as {name}; leave out --family")
    floats = {key: tensor for key, tensor in tensors.items() if jnp.issubdtype(tensor.dtype, jnp.floating)}
    if dtype != "keep":
        floats = {key: _cast(tensor, np.dtype(dtype)) for key, tensor in floats.items()}
        tensors = tensors | floats
    main = str(floats[_largest(floats)].dtype)
    given = rundir.read_json(origin.folder / "config.json") if origin.folder and origin.family == name else {}
    values |= {key: value for key, value in given.items() if key in options.NEUTRAL and key not in _DROPPED}
    values["torch_dtype"] = main
    for key, own in (("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id), ("pad_token_id", tokenizer.pad_id)):
        if values.get(key) is None:
            values[key] = own
    files = {"config.json": _json(values)} | _text_files(tokenizer, template, stop_ids, origin, values)
    if "README.md" not in files:
        files["README.md"] = _model_card(folder, name, tensors).encode()
    return Export(tensors, files)


def _open(folder: Path, train: TrainConfig) -> tuple[ModelConfig, tree.Tree]:
    """(config, params that are read slice by slice); whole params for a run that froze some of them, rounded ones where they are."""
    if train.bitnet.kind != "none":
        return train.model, bitnet.quantise(pretrained.load(folder, precision="float32").params, train.bitnet)
    params, _ = checkpoint_slices.read(folder)
    if set(tree.paths(params)) < set(leaf_shapes(train.model)):
        return train.model, pretrained.load(folder, precision="float32").params
    return train.model, params


def find_origin(folder: Path) -> Origin:
    """The conversion that this run's weights began with, through `init_from`."""
    seen: set[Path] = set()
    trained = False
    while folder not in seen:
        seen.add(folder)
        root = rundir.root_of(folder)
        record = rundir.read_json(root / "source" / pretrained.CONVERSION)
        if record:
            return Origin(str(record.get("family", "")), root / "source", trained)
        trained = True
        values = rundir.read_json(root / "config.json").get("config")
        before = from_dict(TrainConfig, values).init_from if values else ""
        if not before or not Path(before).exists():
            break
        folder = Path(before)
    return Origin("", None, True)


def _fitting(config: ModelConfig, first: str) -> str:
    """`first` if it can express `config`, else the first family that can."""
    order = ([first] if first in families.FAMILIES else []) + [name for name in ("llama", *families.FAMILIES) if name != first]
    reasons: dict[str, str] = {}
    for name in order:
        try:
            families.config_to_hf(name, config)
            if set(leaf_shapes(config)) <= {path for row in families.family(name).rows for path in row.ours}:
                return name
        except ConfigError as error:
            reasons.setdefault(name, str(error))
    why = reasons.get(order[0]) or next(iter(reasons.values()), "")
    raise ConfigError(f"no Hugging Face family can express this model: {why}")


def _cast(tensor: Lazy, dtype: np.dtype[Any]) -> Lazy:
    return Lazy(tensor.shape, dtype, lambda index: tensor[index].astype(dtype))


def _largest(tensors: Mapping[str, Lazy]) -> str:
    return max(tensors, key=lambda name: int(np.prod(tensors[name].shape)))


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _text_files(
    tokenizer: Tokenizer, template: str | None, stop_ids: tuple[int, ...], origin: Origin, values: Mapping[str, Any]
) -> dict[str, bytes]:
    """Tokenizer, chat template, generation config, licence and card, from the source as they were where they still hold."""
    files: dict[str, bytes] = {}
    source = {path.name: path.read_bytes() for path in origin.folder.iterdir() if path.is_file()} if origin.folder else {}
    if not isinstance(tokenizer, pretrained.NoTokenizer):
        files |= _saved(tokenizer)
    names = ("tokenizer.json", "tokenizer.model")
    same = bool(files) and all(name not in files or files[name] == source.get(name) for name in names)
    if same:
        files |= {name: source[name] for name in ("tokenizer.model", "tokenizer_config.json", *_TEXT_FILES) if name in source}
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    ids = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if values.get(key) is not None}
    if stop_ids:
        ids["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    files["generation_config.json"] = source.get("generation_config.json") or _json(ids)
    files |= {name: data for name, data in source.items() if name.startswith("LICENSE")}
    if not origin.trained and "README.md" in source:
        files["README.md"] = source["README.md"]
    return files


def _saved(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files that the tokenizer writes, and a tokenizer_config.json that transformers needs beside a SentencePiece model."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    if "tokenizer.model" in files:
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        files["tokenizer_config.json"] = _json({"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True} | named)
    return files


def _model_card(folder: Path, family: str, tensors: Mapping[str, Lazy]) -> str:
    count = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [jaxllm]\n---\n"
    return (
        f"{head}\n# {folder.resolve().name}\n\nA `{family}` model with {count:,} parameters, "
        "trained or changed with jaxllm and converted by `python -m tools.convert to-hf`.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")\n```\n\n'
        "Data, evaluation, limits and licence: to be filled in by whoever publishes it.\n"
    )
