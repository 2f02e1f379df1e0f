"""`python -m tools.convert peft | to-peft | merge`: adapters in Hugging Face's PEFT format as runs of ours, and back; and folded in.

    adapter_config.json  adapter_model.safetensors      what PEFT reads and writes; a named adapter in a sub-folder of its name
    jaxllm.json                                         beside them in what we write: which base, by fingerprint; PEFT ignores it

A run with adapters keeps the adapters alone, and `init_from` says where the rest lies; a PEFT adapter becomes such a run.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxllm import __version__, checkpoint, checkpoint_slices, manifest, pretrained, rundir, tree
from jaxllm.config import ConfigError, LoraConfig, MeshConfig, OptimConfig, PrefixConfig, TrainConfig, config_hash, from_dict, to_dict
from jaxllm.files import new_folder, path_of, sync
from jaxllm.interop import hf, peft
from jaxllm.interop.layout import leaf_shapes
from jaxllm.interop.stored import Lazy, whole
from jaxllm.models.transformer import decoder
from jaxllm.pretrain import ADDED
from jaxllm.surgery import adapters, prefix
from tools import hf_export

SIDECAR = "jaxllm.json"
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class FromOptions:
    """Options of `peft`."""

    adapter: str = ""
    """Which of several: the name of a sub-folder. Empty: the one in the folder itself."""
    family: str = ""
    """model_type of the base in the adapter's terms. Empty: the one that the base came from, else the first that can express it."""
    check_base: bool = True
    """Refuse an adapter that `to-peft` wrote for another base, by the fingerprint of its weights."""


@dataclass(frozen=True)
class ToOptions:
    """Options of `to-peft`."""

    adapter: str = ""
    """A name: OUT/NAME is written instead of OUT, and OUT may hold other adapters."""
    family: str = ""
    """model_type to write for. Empty: the one that the base came from, else the first that can express it."""


@dataclass(frozen=True)
class MergeOptions:
    """Options of `merge`."""

    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """The devices that will read the checkpoint: each leaf is written in the parts that they hold. They need not be here."""


class Run(NamedTuple):
    """A run and those that it began from, read leaf by leaf."""

    config: TrainConfig
    leaves: dict[str, Any]
    """Path -> leaf, out of the newest run that has it."""
    base: Path | None
    """The first without adapters; None where the run began from nothing."""
    changed: list[str]
    """Leaves other than adapters that were trained since."""


def open_run(folder: Path) -> Run:
    """The chain of `init_from` from `folder` on, until every leaf of the model is found.

    Raises:
      ConfigError: nothing there; a damaged checkpoint; a run whose parent is gone, or holds other weights than it began from.
    """
    first = _config(folder)
    leaves: dict[str, Any] = {}
    base, changed, config = None, set[str](), first
    while True:
        saved = dict(tree.items(checkpoint_slices.read(folder)[0]))
        leaves |= {path: leaf for path, leaf in saved.items() if path not in leaves}
        if not _added(config):
            base = base or folder
        elif base is None:
            changed |= {path for path in saved if _plain(path)}
        if base is not None and set(leaf_shapes(first.model)) <= set(leaves):
            return Run(first, leaves, base, sorted(changed))
        if not config.init_from:
            return Run(first, leaves, base, sorted(changed))
        parent = path_of(config.init_from).expanduser()
        if not parent.exists():
            raise ConfigError(f"the run in {folder} began from {parent}, which is not there; bring it back")
        rundir.check_parent(rundir.read_json(rundir.root_of(folder) / "config.json"), config.init_from)
        folder, config = parent, _config(parent)


def _config(folder: Path) -> TrainConfig:
    pretrained.model_config(folder)  # says what is wrong with the folder
    return from_dict(TrainConfig, checkpoint.read_meta(folder)[1]["config"])


def _added(config: TrainConfig) -> list[str]:
    """What the run has beside the model, in words."""
    kinds = {"low-rank deltas": config.lora.rules, "a prefix": config.prefix.length, "adapter layers": config.bottleneck.size}
    return [kind for kind, has in kinds.items() if has]


def _plain(path: str) -> bool:
    return re.fullmatch(ADDED, path) is None


def _family(given: str, config: TrainConfig, base: Path) -> str:
    return given or hf_export._fitting(config.model, hf_export.find_origin(base).family)


# -------------------------------------------------------------------------------------------- to ours


def from_peft(adapter: str, base: str, out: str, options: FromOptions) -> None:
    """A PEFT adapter as a run directory on top of `base`, which stays where it is.

    Raises:
      ConfigError: as `peft.read`; no adapter there, or a pickled one; made for another base; a base with adapters of its own; `out` exists.
    """
    folder, parent = _adapter_folder(path_of(adapter).expanduser(), options.adapter), path_of(base).expanduser().absolute()
    values = hf.read_json(folder / _CONFIG, f"{folder} has no {_CONFIG}")
    config = _config(parent)
    if own := _added(config):
        raise ConfigError(f"{base} has {' and '.join(own)} of its own, and a PEFT adapter goes on a plain model")
    fingerprint = manifest.fingerprint(parent)
    _check_base(folder, fingerprint, options.check_base, base)
    tensors = _tensors(folder)
    needed = values.get("use_dora") or any(".base_layer." in key for key in tensors)
    name = _family(options.family, config, parent)
    found = peft.read(name, config.model, values, tensors, open_run(parent).leaves if needed else {})
    lora = found.config if isinstance(found.config, LoraConfig) else LoraConfig()
    states = found.config if isinstance(found.config, PrefixConfig) else PrefixConfig()
    train = TrainConfig(
        name=path_of(out).expanduser().absolute().name,
        model=config.model,
        lora=lora,
        prefix=states,
        optim=OptimConfig(freeze=adapters.TRAIN_ONLY_LORA if lora.rules else prefix.TRAIN_ONLY_PREFIX),
        mesh=pretrained.ONE_DEVICE,
        init_from=str(parent),
    )
    source = {
        "kind": "peft", "from": adapter, "family": name, "base_model_name_or_path": values.get("base_model_name_or_path"),
        "converter": f"jaxllm {__version__}",
    }  # fmt: skip
    leaves = dict(tree.items(found.leaves))
    save_run(Path(out), train, leaves, source)
    print(f"wrote {out}: {_said(found)}, {sum(x.size for x in leaves.values()):,} parameters beside {base}")
    came, theirs = (
        rundir.read_json(rundir.root_of(parent) / "source" / pretrained.CONVERSION).get("from"),
        source["base_model_name_or_path"],
    )
    if theirs and came and theirs != came:
        print(f"the adapter says that it was made for {theirs}; the base came from {came}")


def _adapter_folder(folder: Path, name: str) -> Path:
    """The folder of that adapter."""
    inside = sorted(path.parent.name for path in folder.glob(f"*/{_CONFIG}"))
    if name and name not in inside:
        raise ConfigError(f"{folder} has no adapter '{name}'; it has {', '.join(inside) or 'no sub-folder with one'}")
    if not name and not (folder / _CONFIG).is_file():
        many = f"; it holds {', '.join(inside)}: name one with --adapter" if inside else " (adapter_config.json lies in it)"
        raise ConfigError(f"{folder} is no PEFT adapter{many}")
    return folder / name if name else folder


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """The adapter's tensors, all of them small."""
    if not (folder / _TENSORS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ConfigError(
                f"{folder / 'adapter_model.bin'} is a pickle, which can run any code when it is read, so jaxllm never reads one; where you "
                "trust it, PEFT's model.save_pretrained(OUT, safe_serialization=True) makes safetensors of it"
            )
        raise ConfigError(f"{folder} has no {_TENSORS}; fetch it again")
    tensors = {name: whole(stored) for name, stored in hf.read_header(folder / _TENSORS).items()}
    for name, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ConfigError(f"{name} holds {tensor.dtype} numbers; adapters are floating point")
    return tensors


def _check_base(folder: Path, fingerprint: str, refuse: bool, base: str) -> None:
    """Refuse an adapter that was written for other weights."""
    was = hf.read_json(folder / SIDECAR, "").get("base_fingerprint") if (folder / SIDECAR).is_file() else None
    if refuse and was not in (None, fingerprint):
        raise ConfigError(
            f"the adapter in {folder} was made for a base with the fingerprint {was}, and that of {base} is {fingerprint}; name the base "
            "that it was trained on, or say --check_base False if that was converted a second time"
        )


def save_run(out: Path, train: TrainConfig, leaves: Mapping[str, np.ndarray], source: Mapping[str, Any] = MappingProxyType({})) -> None:
    """A run directory that holds nothing but adapters, as if it had trained them for no step on top of `train.init_from`.

    Raises:
      ConfigError: `out` exists; no base there.
    """
    base = Path(train.init_from)
    fingerprint = manifest.fingerprint(base)
    root = rundir.root_of(base)
    record = {
        "name": train.name, "hash": config_hash(train), "parent": train.init_from, "parent_fingerprint": fingerprint,
        "source": dict(source), "config": to_dict(train),
    }  # fmt: skip
    if (stop_ids := rundir.read_json(root / "config.json").get("stop_ids")) is not None:
        record["stop_ids"] = stop_ids
    chunks = pretrained.chunks_on(train.mesh, leaves)
    with new_folder(out, sum(leaf.nbytes for leaf in leaves.values()) + (1 << 20)) as folder:
        if (root / "tokenizer").is_dir():
            shutil.copytree(root / "tokenizer", folder / "tokenizer")
        rundir.write_json(folder / "config.json", record)
        meta = {"config": record["config"], "source": dict(source)}
        checkpoint_slices.write(folder / "checkpoints" / "00000000", leaves, chunks, meta, train.model.vocab_size)


def _say_windows(config: TrainConfig) -> None:
    if config.prefix.length and any(kind.window for kind in config.model.layer_pattern):
        print("in layers with a window, transformers lets a prefix out of sight like any earlier token; here every token sees it")


def _said(found: peft.Adapter) -> str:
    if isinstance(found.config, PrefixConfig):
        return f"a prefix of {found.config.length}"
    kind = "DoRA" if found.config.dora else "rsLoRA" if found.config.scale == "sqrt_rank" else "LoRA"
    return f"{kind} on " + ", ".join(f"{path.removesuffix('/kernel')} (rank {rank})" for path, rank, _ in found.config.rules)


# -------------------------------------------------------------------------------------------- to PEFT


def to_peft(run: str, out: str, options: ToOptions) -> None:
    """A run's adapters as a folder that PeftModel.from_pretrained reads; low-rank deltas and a prefix as two, in sub-folders.

    Raises:
      ConfigError: as `peft.write`; a run without adapters, or one that trained more than them; `out` exists.
    """
    opened = open_run(path_of(run).expanduser())
    config, base = opened.config, opened.base
    if not _added(config):
        raise ConfigError(f"{run} has no adapters; python -m tools.convert to-hf {run} OUT writes the whole model")
    if opened.changed:
        raise ConfigError(
            f"{run} trained the model's own weights too ({', '.join(opened.changed[:3])}, …), and an adapter holds none of them; "
            f"python -m tools.convert merge {run} OUT makes a model of both"
        )
    if base is None:
        raise ConfigError(f"{run} began from random weights that were never saved, so its adapters fit no model that PEFT could load")
    if config.bitnet.kind != "none":
        raise ConfigError(f"{run} quantises its projections (bitnet.kind {config.bitnet.kind}), and PEFT's base would not")
    if config.bottleneck.size:
        raise ConfigError(f"{run} has adapter layers (bottleneck.size {config.bottleneck.size}), and PEFT has none")
    name = _family(options.family, config, base)
    made = {}
    if config.lora.rules:
        leaves = {path: leaf[:] for path, leaf in opened.leaves.items() if re.fullmatch(adapters.LEAVES, path)}
        made["lora"] = peft.write(name, config.model, peft.Adapter(config.lora, tree.from_items(list(leaves.items()))), opened.leaves)
    if config.prefix.length:
        made["prefix"] = peft.write(name, config.model, _prefix_of(run, opened))
    origin = hf_export.find_origin(base)
    record = rundir.read_json(origin.folder / pretrained.CONVERSION) if origin.folder else {}
    came = record.get("from") if record.get("kind") == "huggingface" else None  # a GGUF file is nothing that PEFT could load
    beside = {"base_fingerprint": manifest.fingerprint(base), "base": base.name, "family": name, "converter": f"jaxllm {__version__}"}
    _write(path_of(out).expanduser() / options.adapter, made, came, beside)
    _say_windows(config)


def _write(place: Path, made: Mapping[str, peft.Files], came: str | None, beside: Mapping[str, Any]) -> None:
    """One adapter in the folder itself, two in sub-folders.

    Args:
      came: what PEFT may load as the base; None where nothing is known of it.
      beside: of the base; becomes jaxllm.json.
    """
    num_bytes = sum(tensor.nbytes for files in made.values() for tensor in files.tensors.values())
    inside = {kind: kind if len(made) > 1 else "" for kind in made}
    with new_folder(place, num_bytes + (1 << 20)) as partial_folder:
        for kind, files in made.items():
            folder = partial_folder / inside[kind]
            folder.mkdir(exist_ok=True)
            _write_json(folder / _CONFIG, files.config | {"base_model_name_or_path": came})
            _write_json(folder / SIDECAR, beside)
            hf.write_file(folder / _TENSORS, files.tensors)  # type: ignore[arg-type]
    for kind, files in made.items():
        print(f"wrote {place / inside[kind]}: {files.config['peft_type']}, {len(files.tensors)} tensors, for {beside['family']} models")


def _prefix_of(run: str, opened: Run) -> peft.Adapter:
    """The run's prefix as states, whatever made them."""
    if opened.config.prefix.place == "embedding":  # the model itself makes the states
        model = pretrained.load(run, precision="float32")
        return peft.Adapter(model.train.prefix, {"prefix": model.params["prefix"]})
    own = tree.from_items([(path, jnp.asarray(leaf[:])) for path, leaf in opened.leaves.items() if path.startswith("prefix/")])
    states, config = prefix.materialise(own, decoder(opened.config.model), opened.config.prefix)
    return peft.Adapter(config, states)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    sync(path)


# ---------------------------------------------------------------------------------------------- merge


def merge(run: str, out: str, options: MergeOptions) -> None:
    """A run's low-rank deltas folded into its base, as a converted folder: the base's number format, float32 arithmetic.

    Raises:
      ConfigError: no deltas, or a prefix or adapter layers too, which no weights can hold; `out` exists.
    """
    opened = open_run(path_of(run).expanduser())
    config = opened.config
    for kind in _added(config):
        if kind != "low-rank deltas":
            raise ConfigError(f"{run} has {kind}, which cannot be folded into weights; jaxllm generate {run} uses it as it is")
    if not config.lora.rules:
        raise ConfigError(f"{run} has no low-rank deltas to fold in")
    if lost := sorted(set(leaf_shapes(config.model)) - set(opened.leaves)):
        raise ConfigError(f"{run} began from random weights that were never saved ({lost[0]}, …); there is nothing to fold its deltas into")
    folder = path_of(run).expanduser()
    tokenizer, template, stop_ids = pretrained.load_text(folder)
    origin = hf_export.find_origin(folder)
    base = opened.base or folder
    source = {
        "kind": "merge", "from": run, "family": origin.family, "base": str(base), "base_fingerprint": manifest.fingerprint(base),
        "lora": to_dict(config.lora), "converter": f"jaxllm {__version__}",
    }  # fmt: skip
    files = sorted(origin.folder.iterdir()) if origin.folder else []
    merged = folded(opened.leaves, config.lora)
    pretrained.save(
        out,
        config.model,
        tree.from_items(sorted(merged.items())),
        None if isinstance(tokenizer, pretrained.NoTokenizer) else tokenizer,
        chat_template=template,
        stop_ids=stop_ids,
        source=source,
        files=[path for path in files if path.is_file() and path.name not in ("README.md", pretrained.CONVERSION)],
        mesh=options.mesh,
    )
    count = sum(path.endswith("/lora_a") for path in opened.leaves)
    formats = sorted({str(np.dtype(leaf.dtype)) for leaf in merged.values()})
    print(
        f"wrote {out}: {count} deltas folded into {sum(int(np.prod(x.shape)) for x in merged.values()):,} parameters, {', '.join(formats)}"
    )


def folded(leaves: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """Leaves without branches, each kernel with its own folded in when it is read, a layer at a time."""
    out = {path: leaf for path, leaf in leaves.items() if _plain(path)}
    for site in (path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")):
        own = {name: leaves[f"{site}/{name}"] for name in ("kernel", "lora_a", "lora_b", "lora_m") if f"{site}/{name}" in leaves}
        kernel = own["kernel"]
        out[f"{site}/kernel"] = Lazy(tuple(kernel.shape), kernel.dtype, partial(_head if site == "unembed" else _layers, site, own, config))
    return out


def _layers(site: str, own: Mapping[str, Any], config: LoraConfig, index: tuple[slice, ...]) -> np.ndarray:
    layers = range(own["kernel"].shape[0])[index[0]]
    parts = [_merged(site, {name: leaf[i : i + 1] for name, leaf in own.items()}, config)[0][index[1:]] for i in layers]
    return np.stack(parts)


def _head(site: str, own: Mapping[str, Any], config: LoraConfig, index: tuple[slice, ...]) -> np.ndarray:
    rows = {name: leaf[:] if name == "lora_a" else leaf[index[0]] for name, leaf in own.items()}
    return np.ascontiguousarray(_merged(site, rows, config)[:, index[1]])


def _merged(site: str, own: Mapping[str, np.ndarray], config: LoraConfig) -> np.ndarray:
    params = tree.from_items([(f"{site}/{name}", jnp.asarray(leaf)) for name, leaf in own.items()])
    return np.asarray(tree.get(adapters.merge(params, config), f"{site}/kernel"))
