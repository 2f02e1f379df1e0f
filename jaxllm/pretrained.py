"""A model that is ready to use: weights, config, tokenizer, chat template; out of a run directory or a converted folder.

`tools/convert.py` writes, through `save`, the same layout as training does, so that training starts from either (--init_from):

    config.json              a TrainConfig whose `model` is the architecture; stop_ids
    tokenizer/               the tokenizer itself, chat_template.jinja
    checkpoints/00000000/    the params, in the number format that they came in
    source/                  the files that came with the model, as they were; conversion.json: what was converted, and how
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxllm import checkpoint, checkpoint_slices, optim, pretrain, rundir, sharding, tree
from jaxllm.config import (
    BitnetConfig,
    ConfigError,
    DistillConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    Precision,
    QuantiseConfig,
    TrainConfig,
    config_hash,
    from_dict,
    to_dict,
)
from jaxllm.contract import LM, Params
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.files import cache_home, new_folder, path_of
from jaxllm.interop.layout import VOCAB_PATHS, leaf_shapes
from jaxllm.interop.stored import Lazy
from jaxllm.models.decoding import for_cpu
from jaxllm.models.heads import TRAINING_ONLY
from jaxllm.models.transformer import decoder
from jaxllm.surgery import adapters, bitnet, prefix

CHAT_TEMPLATE = "chat_template.jinja"
CONVERSION = "conversion.json"
ONE_DEVICE = MeshConfig(data=1)
BRANCHES = ("ema", "trainable", "frozen")
"""Of a checkpoint: averages where the run kept them."""


@dataclass(frozen=True)
class Pretrained:
    """A model with all that generating and evaluating need."""

    config: ModelConfig
    lm: LM
    params: Params
    """On the mesh, vocabulary leaves padded to its model axis; kernels in the type that they are multiplied in."""
    tokenizer: Tokenizer
    chat_template: str | None
    stop_ids: tuple[int, ...]
    """Tokens that end a text or a turn."""
    train: TrainConfig
    """What it was trained with; deltas are folded in, and a prefix is its states."""

    def for_decoding(self, mesh: Mesh, precision: Precision) -> tuple[LM, Params]:
        """The model as decoding is fastest: one-bit weights rounded once; others laid out for it on one CPU device."""
        if self.train.bitnet.kind != "none":
            return self.lm, bitnet.quantise(self.params, self.train.bitnet)
        if jax.default_backend() != "cpu" or mesh.size > 1 or self.train.bottleneck.size:
            return self.lm, self.params
        lm, params = for_cpu(self.config, self.params, precision)
        return (prefix.with_prefix(lm, self.train.prefix) if self.train.prefix.length else lm), params


class NoTokenizer:
    """Stands where a model came without a tokenizer: every use of it says so."""

    num_vocab = 0
    bos_id = eos_id = pad_id = chat_template = None
    fingerprint = "none"
    special_names = ()

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(
            f"the model in {self._folder or 'memory'} came without a tokenizer; convert it again with --tokenizer PATH "
            "(a tokenizer.json, a SentencePiece .model, or a folder with one)"
        )

    encode = encode_batch = decode = token_bytes = _refuse

    def save(self, folder: Path) -> None:
        """Nothing to write."""


# ------------------------------------------------------------------------------------------- loading


def load(folder: str | Path, *, mesh: Mesh | None = None, precision: Precision | None = None) -> Pretrained:
    """The model in a run directory, a converted folder, or one checkpoint of either; averaged weights where the run kept them.

    Args:
      mesh: None means one device.
      precision: None means float32 on CPU and bfloat16 elsewhere.

    Raises:
      ConfigError: nothing there, another library's folder (with the command that converts it), or a damaged one.
    """
    folder = path_of(folder).expanduser()
    train = train_config(folder)
    mesh = sharding.make_mesh(ONE_DEVICE) if mesh is None else mesh
    precision = _precision() if precision is None else precision
    params = _load_params(folder, train, mesh, precision if train.bitnet.kind == "none" else "float32")  # rounded, latents are others
    if train.prefix.length:
        params, _ = prefix.materialise(params, decoder(train.model, precision=precision), train.prefix)
    tokenizer, template, stop_ids = load_text(folder)
    train = _for_use(train)
    return Pretrained(train.model, pretrain.language_model(train, precision), params, tokenizer, template, stop_ids, train)


def lm_of(folder: str | Path, precision: Precision | None = None) -> LM:
    """The functions of the model that `load` loads, without its weights."""
    return pretrain.language_model(_for_use(train_config(folder)), _precision() if precision is None else precision)


def _precision() -> Precision:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _for_use(train: TrainConfig) -> TrainConfig:
    """The config of a run as its model is used: deltas folded in, a prefix that is its states, and what only training needs left out."""
    kept = prefix.materialised(train.prefix) if train.prefix.length else train.prefix
    one_bit = replace(train.bitnet, activation_scale="token", warm_start_steps=0)  # what others are in the batch changes nothing
    return replace(train, lora=LoraConfig(), prefix=kept, bitnet=one_bit, quantise=QuantiseConfig(), distill=DistillConfig(), remat="none")


def model_config(folder: str | Path) -> ModelConfig:
    """The architecture of what `load` loads: what a configuration that trains on from there has as its `model`."""
    return train_config(folder).model


def load_text(folder: Path) -> tuple[Tokenizer, str | None, tuple[int, ...]]:
    """(tokenizer, chat template, stop ids) of a run directory, a converted folder, or one checkpoint of either."""
    root = rundir.root_of(folder)
    where = root / "tokenizer"
    there = where.is_dir() and any(path.name.startswith("tokenizer.") for path in where.iterdir())
    tokenizer: Tokenizer = tokenizers.load(where) if there else NoTokenizer(root)  # type: ignore[assignment]
    template = (where / CHAT_TEMPLATE).read_text() if (where / CHAT_TEMPLATE).exists() else tokenizer.chat_template
    stop_ids = rundir.read_json(root / "config.json").get("stop_ids")
    if stop_ids is None:
        stop_ids = find_stop_ids(tokenizer, template)
    elif not isinstance(stop_ids, list) or not all(type(i) is int and i >= 0 for i in stop_ids):
        raise ConfigError(f"{root / 'config.json'} has stop_ids = {stop_ids!r}; it must be a list of token ids, e.g. [2]")
    return tokenizer, template, tuple(stop_ids)


def models_folder() -> Path:
    """Where `tools.fetch` puts models: models/ in $JAXLLM_CACHE, or in ~/.cache/jaxllm."""
    return cache_home() / "models"


def fetched(name: str) -> Path:
    """The folder of a model that `tools.fetch` brought.

    Raises:
      ConfigError: it did not yet; the command that does.
    """
    folder = models_folder() / name
    if not (folder / "checkpoints").is_dir():
        raise ConfigError(f"the model {name} is not here yet ({folder}); fetch it: python -m tools.fetch {name}")
    return folder


_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")


def find_stop_ids(tokenizer: Tokenizer, template: str | None, given: Iterable[int] = ()) -> tuple[int, ...]:
    """The ids `given`, the tokenizer's end of text, and the end of a turn where the chat template writes one of the usual ones."""
    ids = list(given)
    if tokenizer.eos_id is not None:
        ids.append(tokenizer.eos_id)
    written = [tokenizer.encode(name, special=True) for name in _END_OF_TURN if name in (template or "")]
    return tuple(dict.fromkeys(ids + [found[0] for found in written if len(found) == 1]))


def train_config(folder: str | Path) -> TrainConfig:
    """The config that the checkpoint in `folder` was saved with.

    Raises:
      ConfigError: nothing there, another library's folder (with the command that converts it), or a damaged one.
    """
    folder = path_of(folder).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        raise ConfigError(f"{folder} is a GGUF file; convert it first: python -m tools.convert gguf {folder} OUT")
    if folder.is_dir() and not (folder / "checkpoints").is_dir() and "model_type" in rundir.read_json(folder / "config.json"):
        raise ConfigError(f"{folder} is a Hugging Face folder; convert it first: python -m tools.convert hf {folder} OUT")
    _, meta = checkpoint.read_meta(folder)
    try:
        return from_dict(TrainConfig, meta["config"])
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ConfigError(f"the checkpoint in {folder} does not say which model it is ({type(error).__name__}: {error})") from None


def _load_params(folder: Path, train: TrainConfig, mesh: Mesh, precision: Precision) -> Params:
    """Low-rank deltas folded in, into the rounded base where the run had one."""
    train = replace(train, quantise=QuantiseConfig())
    lm = pretrain.language_model(train, precision)
    shapes = jax.eval_shape(partial(sharding.pad_vocab, multiple=mesh.shape["model"]), lm.param_shapes)
    dtypes = tree.map_with_path(lambda path, leaf: dtype_of(path, leaf.dtype, precision), shapes)
    where = sharding.shardings(sharding.param_specs(shapes, mesh, train.mesh.rules), mesh)
    if train.lora.rules or tree.partition(shapes, partial(optim.trainable, train.optim))[1]:  # frozen leaves are where the run began
        params = pretrain.starting_params(replace(train, init_from=str(folder)), lm, mesh, BRANCHES)
        params = adapters.merge(params, train.lora) if train.lora.rules else params
        return tree.map_with_path(lambda path, leaf: leaf.astype(dtype_of(path, leaf.dtype, precision)), params)
    template = jax.tree.map(lambda s, dtype, w: jax.ShapeDtypeStruct(s.shape, dtype, sharding=w), shapes, dtypes, where)
    return checkpoint.load_params(folder, template, BRANCHES, left_out=TRAINING_ONLY).state


def dtype_of(path: str, own: Any, precision: Precision) -> Any:
    """bfloat16 for what is multiplied or looked up in bfloat16 anyway, so that no step casts it; else the decoder's own."""
    kernel, table = path.endswith("/kernel"), path.startswith("embed/")
    half = (kernel and precision != "float32") or (table and precision == "bfloat16")
    return jnp.dtype(jnp.bfloat16) if half else own


# -------------------------------------------------------------------------------------------- saving


def save(
    folder: str | Path,
    config: ModelConfig,
    params_or_leaves: tree.Tree,
    tokenizer: Tokenizer | None,
    *,
    chat_template: str | None = None,
    stop_ids: Sequence[int] = (),
    source: Mapping[str, Any],
    files: Sequence[Path] = (),
    mesh: MeshConfig = ONE_DEVICE,
    rounded: BitnetConfig | None = None,
) -> None:
    """Write a folder that `load` and --init_from read, whole or not at all; one chunk of one leaf is in memory at a time.

    Args:
      params_or_leaves: nested dict of arrays, or of `Lazy` ones; padded vocabulary rows are cut off. Kept in their number format.
      tokenizer: None where the model came without.
      source: what was converted, and how; becomes source/conversion.json.
      files: files of the source that travel along, as they are.
      mesh: the leaves are cut into chunks as they would lie on this mesh, which need not be here; -1 counts as 1.
      rounded: how the weights are rounded where they are used, if they are.

    Raises:
      ConfigError: the folder exists; leaves that do not fit the config; a number format that is not floating; a tokenizer with
        more tokens than the config; a disk that is full or may not be written.
    """
    folder = Path(folder).expanduser()
    rounded = rounded or BitnetConfig()
    leaves = _checked(config, params_or_leaves, bitnet.norm_scales(config, rounded))
    if tokenizer is not None and tokenizer.num_vocab > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.num_vocab} tokens and the model {config.vocab_size}; "
            f"--vocab_size {tokenizer.num_vocab} adds rows for the others"
        )
    train = TrainConfig(name=folder.name, model=config, bitnet=rounded, mesh=mesh)
    meta = {"config": to_dict(train), "source": dict(source)}
    record = {"name": folder.name, "hash": config_hash(train), "parent": None, "stop_ids": [int(i) for i in stop_ids]}
    chunks = chunks_on(mesh, leaves)
    num_bytes = sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves.values())
    with new_folder(folder, num_bytes + sum(path.stat().st_size for path in files) + (1 << 20)) as partial_folder:
        (partial_folder / "tokenizer").mkdir()
        (partial_folder / "source").mkdir()
        if tokenizer is not None:
            tokenizer.save(partial_folder / "tokenizer")
        if chat_template is not None:
            (partial_folder / "tokenizer" / CHAT_TEMPLATE).write_text(chat_template)
        for path in files:
            shutil.copyfile(path, partial_folder / "source" / path.name)
        (partial_folder / "source" / CONVERSION).write_text(json.dumps(dict(source), indent=1, default=str) + "\n")
        rundir.write_json(partial_folder / "config.json", record | {"config": meta["config"]})
        checkpoint_slices.write(partial_folder / "checkpoints" / "00000000", leaves, chunks, meta, config.vocab_size)


def chunks_on(mesh: MeshConfig, leaves: Mapping[str, Any]) -> dict[str, checkpoint_slices.Shape]:
    """The shape of one device's part of each leaf on that mesh, or of a part of it where it is large."""
    sizes = tuple(max(1, size) for size in (mesh.slice, mesh.data, mesh.model))
    grid = AbstractMesh(sizes, sharding.AXES)
    padded = {  # as the vocabulary will be padded when it is loaded
        path: jax.ShapeDtypeStruct((leaf.shape[0] + (-leaf.shape[0] % sizes[2] if path in VOCAB_PATHS else 0), *leaf.shape[1:]), np.int8)
        for path, leaf in leaves.items()
    }
    specs = dict(tree.items(sharding.param_specs(tree.from_items(list(padded.items())), grid, mesh.rules)))  # type: ignore[arg-type]
    chunks = {}
    for path, leaf in leaves.items():
        spec = (*specs[path], *(None,) * (len(leaf.shape) - len(specs[path])))
        shards = [sharding.axis_size(grid, axes) for axes in spec]
        chunks[path] = checkpoint_slices.chunk_shape(tuple(leaf.shape), shards, np.dtype(leaf.dtype).itemsize)
    return chunks


def _checked(config: ModelConfig, params: tree.Tree, more: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Path -> leaf, vocabulary rows beyond the config's cut off, after comparing shapes with the config's and with `more`."""
    leaves = dict(tree.items(params))
    for path in VOCAB_PATHS:
        if path in leaves and leaves[path].shape[0] > config.vocab_size:
            leaf = leaves[path]
            leaves[path] = Lazy((config.vocab_size, *leaf.shape[1:]), leaf.dtype, partial(_part, leaf))
    struct = lambda shape: np.broadcast_to(np.int8(0), shape)
    expected = tree.from_items([(path, struct(shape)) for path, shape in (leaf_shapes(config) | more).items()])
    if problems := tree.structure_diff(expected, tree.from_items([(path, struct(leaf.shape)) for path, leaf in leaves.items()])):
        raise ConfigError("the params do not fit the config: " + "; ".join(problems[:10]))
    for path, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ConfigError(f"{path} holds {np.dtype(leaf.dtype)} numbers, as quantised models do; jaxllm trains floating point numbers")
    return leaves


def _part(leaf: Any, index: tuple[slice, ...]) -> np.ndarray:
    return np.asarray(leaf[index])
