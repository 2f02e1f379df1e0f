"""PEFT's adapters as ours, and back: adapter_config.json and adapter_model.safetensors against low-rank leaves and prefix states.

    base_model.model.<module>.lora_A.weight [R in]      .lora_B.weight [out R]      .lora_magnitude_vector [out]
    prompt_embeddings [P 2·L·K·H]                       layer after layer, its keys before its values

Modules are named, and their outputs ordered, as the family's table has it (`families/`): B is a kernel whose input is R, and the
magnitudes are one whose input is 1, so the layout that reads a module's weight reads them as well. A is [R in] for PEFT even
where the weight is a Conv1D's [in, out].

A fused module (GPT-2's c_attn) has one A. What PEFT trained on it is one A for each of q, k and v, and B cut by rows. What we
trained on q and v alone becomes A = [A_q; A_v] of rank R_q + R_v, and B with their blocks and zeros elsewhere; read again, rows
of A whose column of B is zero throughout a part are none of that part's.

Our leaves are stacked over layers. Where PEFT adapts some layers only, the others have A = B = 0, whose gradients are 0 too.

Source: peft 0.21 (`tuners/lora/layer.py`, `tuners/prefix_tuning`, `utils/save_and_load.py`); arXiv:2106.09685, arXiv:2101.00190.
Letters: L layers, K key/value heads, H head size, P prefix length, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxllm import tree
from jaxllm.config import ConfigError, LoraConfig, ModelConfig, PrefixConfig, nearest
from jaxllm.contract import Params
from jaxllm.interop.families import config_to_hf, family
from jaxllm.interop.layout import LINEAR, Layout, Row, applicable, leaf_shapes
from jaxllm.interop.peft_config import FOLD, Target, lora_values, prefix_values, read_lora, read_prefix, scale
from jaxllm.interop.stored import Shape, Sliced

PREFIX_KEY = "prompt_embeddings"
_START = "base_model.model."
_A, _B, _M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


class Adapter(NamedTuple):
    """What is trained beside a base, and how it enters: a `LoraConfig` or a `PrefixConfig`."""

    config: LoraConfig | PrefixConfig
    leaves: Params
    """Low-rank leaves beside the kernels' paths (`surgery/adapters.py`), or `prefix/{keys, values}` (`surgery/prefix.py`); float32."""


class Files(NamedTuple):
    """The content of a PEFT folder."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read(
    model_type: str,
    model: ModelConfig,
    values: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    base: Mapping[str, Sliced] | None = None,
) -> Adapter:
    """Our leaves and config out of a PEFT adapter on a model of that family.

    Args:
      model_type, model: the base.
      values: the content of adapter_config.json.
      tensors: those of adapter_model.safetensors.
      base: path -> kernel of the base; needed where DoRA leaves out some layers, whose magnitudes are the kernel's norms, and where PEFT
        wrote the head itself beside its branch.

    Raises:
      ConfigError: another kind of adapter; an option that is unknown or not covered, by name; targets that match nothing; missing and
        surplus tensors with the nearest names; other shapes, which are those of another base.
    """
    kind = values.get("peft_type")
    if kind == "PREFIX_TUNING":
        return _read_prefix(model, values, tensors)
    if kind != "LORA":
        raise ConfigError(f"the adapter's peft_type is {kind!r}; LORA and PREFIX_TUNING are covered")
    modules = _modules(model_type, model)
    names = [name for module in modules for name in module.names(model.num_layers)]
    head = {name for module in modules if module.sites == ("unembed",) for name in module.names(model.num_layers)}
    held = {key.removeprefix(_START).removesuffix(_A) for key in tensors if key.endswith(_A)}
    config, adapted = read_lora(values, names, head, held)
    if config.dora and head & set(adapted):
        raise ConfigError(f"a DoRA adapter on the output head ({min(head)}) is not covered")
    tensors = _without_copies(tensors, head & set(adapted), base or {})
    _check_tensors(modules, model, adapted, config, tensors)
    rules: list[tuple[str, int, float]] = []
    leaves: list[tuple[str, np.ndarray]] = []
    for module in modules:
        own = [adapted.get(name) for name in module.names(model.num_layers)]
        if any(own):
            for site, rank, alpha, parts in _read_module(module, module.names(model.num_layers), own, config, tensors, base or {}):
                rules.append((f"{site}/kernel", rank, alpha))
                leaves += [(f"{site}/{name}", leaf) for name, leaf in parts.items()]
    return Adapter(replace(config, rules=tuple(rules)), tree.from_items(sorted(leaves)))


def write(model_type: str, model: ModelConfig, adapter: Adapter, base: Mapping[str, Sliced] | None = None) -> Files:
    """The adapter as PEFT's config and tensors: the inverse of `read`.

    Args:
      model_type, model: the base.
      base: path -> kernel of the base; needed for DoRA on a part of a fused module, as the other parts' magnitudes are the kernel's norms.

    Raises:
      ConfigError: leaves that the family has no module for, or whose rule is missing; a prefix that PEFT cannot express.
    """
    if isinstance(adapter.config, PrefixConfig):
        return _write_prefix(model, adapter.config, adapter.leaves)
    modules, leaves = _modules(model_type, model), dict(tree.items(adapter.leaves))
    sites = {path.rpartition("/")[0] for path in leaves}
    if homeless := sites - {site for module in modules for site in module.sites}:
        raise ConfigError(f"a {model_type} model has no module for the adapter's {', '.join(sorted(homeless))}")
    tensors: dict[str, np.ndarray] = {}
    adapted: dict[str, Target] = {}
    for name, module in zip(_short(modules), modules, strict=True):
        if sites & set(module.sites):
            adapted[name] = _write_module(module, model, adapter.config, leaves, base or {}, tensors)
    conv = any(module.is_conv for module in modules if sites & set(module.sites))
    return Files(lora_values(adapter.config, adapted, conv), tensors)


# ---------------------------------------------------------------------------------------- modules


class _Module(NamedTuple):
    """One of their linear maps, which may be several of ours."""

    row: Row
    sites: tuple[str, ...]
    """Paths of our projections."""
    layout: Layout
    kernels: list[Shape]
    """Of one layer, [*in *out]."""

    def names(self, num_layers: int) -> list[str]:
        """Their names, in layer order."""
        return [name.removesuffix(".weight") for name in self.row.names(num_layers)]

    @property
    def num_in(self) -> int:
        """Input dimensions of our kernels: heads and their size for the output projection."""
        return 2 if self.sites[0].endswith("/o") else 1

    @property
    def is_conv(self) -> bool:
        """Whether their weight is [in, out]."""
        return self.layout.shape(self.with_input(0))[0] == 0

    def with_input(self, size: int) -> list[Shape]:
        """Our kernels' shapes, had they `size` inputs."""
        return [(*(1,) * (self.num_in - 1), size, *kernel[self.num_in :]) for kernel in self.kernels]

    def sizes(self) -> tuple[int, int]:
        """(inputs, outputs) of their linear map."""
        return math.prod(self.kernels[0][: self.num_in]), sum(math.prod(kernel[self.num_in :]) for kernel in self.kernels)

    def cut(self, theirs: np.ndarray) -> list[np.ndarray]:
        """[out R] -> [R *out] of each of our projections."""
        shapes = self.with_input(theirs.shape[1])
        views = self.layout.views(theirs.T if self.is_conv else theirs, shapes)
        return [view.reshape(shape[self.num_in - 1 :]) for view, shape in zip(views, shapes, strict=True)]

    def fuse(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `cut`."""
        shapes = self.with_input(parts[0].shape[0])
        theirs = np.zeros(self.layout.shape(shapes), np.float32)
        for view, part, shape in zip(self.layout.views(theirs, shapes), parts, shapes, strict=True):
            view[...] = part.reshape(shape)
        return np.ascontiguousarray(theirs.T) if self.is_conv else theirs


def _modules(model_type: str, model: ModelConfig) -> list[_Module]:
    """Every linear map of the family, out of its table."""
    config_to_hf(model_type, model)  # or a leaf that the family does not have would get a name that nobody reads
    found = []
    for row, shapes in applicable(family(model_type).rows, leaf_shapes(model)):
        if all(path.endswith("/kernel") for path in row.ours):
            sites = tuple(path.removesuffix("/kernel") for path in row.ours)
            head = sites == ("unembed",)  # ours is [V D], as theirs
            found.append(_Module(row, sites, LINEAR if head else row.layout, [shapes[0][::-1]] if head else shapes))
    return found


def _short(modules: Sequence[_Module]) -> list[str]:
    """Each module's name from the first part on that no other module's name ends with: q_proj, attn.c_proj."""
    full = [module.row.theirs.removesuffix(".weight").split(".") for module in modules]

    def shortest(name: list[str]) -> str:
        lengths = range(1, len(name) + 1)
        return ".".join(next(name[-n:] for n in lengths if sum(other[-n:] == name[-n:] for other in full) == 1))

    return [shortest(name) for name in full]


# -------------------------------------------------------------------------------------------- LoRA


def _without_copies(tensors: Mapping[str, np.ndarray], heads: set[str], base: Mapping[str, Sliced]) -> dict[str, np.ndarray]:
    """Without the head's own weights, which PEFT writes too where the head has a branch; they must be the base's."""
    copies = {f"{_START}{name}.base_layer.weight" for name in heads} & set(tensors)
    for key in copies:
        if "unembed/kernel" not in base:
            raise ConfigError(f"the adapter has a copy of the base's head, {key}, and the base's weights were not given to compare")
        ours, theirs = np.asarray(base["unembed/kernel"][:]), tensors[key]
        as_theirs, as_ours = ours.astype(theirs.dtype), theirs.astype(ours.dtype)  # one of the two loses nothing
        if not (np.array_equal(as_theirs, theirs) or np.array_equal(ours, as_ours)):
            raise ConfigError(f"the adapter holds another output head ({key} {theirs.shape}) than the base ({ours.shape}); {FOLD}")
    return {key: tensor for key, tensor in tensors.items() if key not in copies}


def _check_tensors(
    modules: Sequence[_Module], model: ModelConfig, adapted: Mapping[str, Target], config: LoraConfig, tensors: Mapping[str, np.ndarray]
) -> None:
    """Refuse a file that does not hold what its config says."""
    expected: dict[str, Shape] = {}
    for module in modules:
        num_in, num_out = module.sizes()
        for name in module.names(model.num_layers):
            if name in adapted:
                rank = adapted[name].rank
                expected |= {f"{_START}{name}{_A}": (rank, num_in), f"{_START}{name}{_B}": (num_out, rank)}
                expected |= {f"{_START}{name}{_M}": (num_out,)} if config.dora else {}
    whole = [key for key in tensors if key not in expected and ".lora_" not in key]
    if whole:
        raise ConfigError(
            f"the adapter holds weights of the model itself ({_few(whole)}), as with modules_to_save or a resized vocabulary, which is not "
            f"covered; {FOLD}"
        )
    if embedded := [key for key in tensors if ".lora_embedding_" in key]:
        raise ConfigError(f"the adapter changes the embedding ({_few(embedded)}), and low-rank deltas here are on linear maps only")
    missing = [key for key in expected if key not in tensors]
    surplus = [key for key in tensors if key not in expected]
    problems = [f"missing {key} {expected[key]}{nearest(key, surplus)}" for key in missing]
    problems += [f"surplus {key} {tensors[key].shape}{nearest(key, missing)}" for key in surplus]
    problems += [f"{key} has shape {tensors[key].shape}, expected {shape}"
                 for key, shape in expected.items() if key in tensors and tensors[key].shape != shape]  # fmt: skip
    if problems:
        more = [f"and {len(problems) - 6} more"] if len(problems) > 6 else []
        raise ConfigError("the adapter does not fit its config and this base: " + "; ".join(problems[:6] + more))


def _read_module(
    module: _Module,
    names: Sequence[str],
    own: Sequence[Target | None],
    config: LoraConfig,
    tensors: Mapping[str, np.ndarray],
    base: Mapping[str, Sliced],
) -> list[tuple[str, int, float, dict[str, np.ndarray]]]:
    """(path, rank, alpha, leaves) of each of our projections that the module adapts.

    Args:
      own: rank and alpha in each layer; None where PEFT leaves the layer alone.
    """
    first = next(target for target in own if target)
    whole = Target(max(target.rank for target in own if target), first.alpha).of_rank_before(first.rank, config)
    a = np.zeros((len(names), module.sizes()[0], whole.rank), np.float32)
    bs = [np.zeros((len(names), *shape[module.num_in - 1 :]), np.float32) for shape in module.with_input(whole.rank)]
    ms = [np.zeros((len(names), *kernel[module.num_in :]), np.float32) for kernel in module.kernels] if config.dora else []
    for i, (name, target) in enumerate(zip(names, own, strict=True)):
        if target is not None:
            ratio = scale(target, config) / scale(whole, config)
            a[i, :, : target.rank] = tensors[f"{_START}{name}{_A}"].T
            for b, part in zip(bs, module.cut(tensors[f"{_START}{name}{_B}"]), strict=True):
                b[i, : target.rank] = part.astype(np.float32) * np.float32(ratio)
        if config.dora:
            parts = module.cut(tensors[f"{_START}{name}{_M}"][:, None]) if target else [norms(base, site, i)[None] for site in module.sites]
            for m, part in zip(ms, parts, strict=True):
                m[i] = part[0]
    kept = _kept(bs, config.dora)
    found = []
    for j, (site, kernel, b, keep) in enumerate(zip(module.sites, module.kernels, bs, kept, strict=True)):
        if not (rank := int(keep.sum())):
            continue
        full = min(math.prod(kernel[: module.num_in]), math.prod(kernel[module.num_in :]))
        if rank > full:
            raise ConfigError(f"the adapter gives {site} rank {rank}, and the matrix itself has rank {full} at most; {FOLD}")
        leaves = {"lora_a": a[..., keep].reshape(len(names), *kernel[: module.num_in], rank), "lora_b": np.ascontiguousarray(b[:, keep])}
        leaves |= {"lora_m": ms[j]} if config.dora else {}
        if site == "unembed":  # neither stacked nor, as its kernel is not, [in, out]
            leaves = {"lora_a": leaves["lora_a"][0], "lora_b": np.ascontiguousarray(leaves["lora_b"][0].T)}
        found.append((site, rank, Target(rank, whole.alpha).of_rank_before(whole.rank, config).alpha, leaves))
    return found


def _kept(bs: Sequence[np.ndarray], dora: bool) -> list[np.ndarray]:
    """Which rows of the shared A each part uses: those whose column of its B is not zero in all layers; all, where B is zero itself."""
    used = [(b != 0).any(axis=(0, *range(2, b.ndim))) for b in bs]
    if len(bs) == 1 or not any(mask.any() for mask in used):
        return [np.ones_like(mask) for mask in used]
    return [np.ones_like(mask) if dora and not mask.any() else mask for mask in used]  # DoRA's magnitude acts without a delta too


def _write_module(
    module: _Module,
    model: ModelConfig,
    config: LoraConfig,
    leaves: Mapping[str, np.ndarray],
    base: Mapping[str, Sliced],
    tensors: dict[str, np.ndarray],
) -> Target:
    """Put the module's tensors of every layer into `tensors`; its rank and alpha."""
    held = {site: _stacked(leaves, site, module, model) for site in module.sites if f"{site}/lora_a" in leaves}
    own = {site: _target(config, site, parts[0].shape[-1]) for site, parts in held.items()}
    a_of, first = [parts[0] for parts in held.values()], next(iter(own.values()))
    shared = len(set(own.values())) == 1 and all(np.array_equal(a_of[0], a) for a in a_of)
    rank = first.rank if shared else sum(target.rank for target in own.values())
    whole = Target(rank, first.alpha).of_rank_before(first.rank, config)
    num_layers = len(a_of[0])
    a = a_of[0] if shared else np.concatenate(a_of, axis=-1)
    bs, start = [np.zeros((num_layers, *shape[module.num_in - 1 :]), np.float32) for shape in module.with_input(rank)], 0
    for b, site in zip(bs, module.sites, strict=True):
        if site in held:
            size = own[site].rank
            b[:, start : start + size] = held[site][1] * np.float32(scale(own[site], config) / scale(whole, config))
            start += 0 if shared else size
    for i, name in enumerate(module.names(model.num_layers)):
        tensors[f"{_START}{name}{_A}"] = np.ascontiguousarray(a[i].T)
        tensors[f"{_START}{name}{_B}"] = module.fuse([b[i] for b in bs])
        if config.dora:
            m = [leaves[f"{site}/lora_m"][i] if site in held else norms(base, site, i) for site in module.sites]
            tensors[f"{_START}{name}{_M}"] = module.fuse([part[None] for part in m])[:, 0]
    return whole


def _stacked(leaves: Mapping[str, np.ndarray], site: str, module: _Module, model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """(A [L in R], B [L R *out]) of one projection, after comparing them with the kernel's shape."""
    a, b = (np.asarray(leaves[f"{site}/lora_{x}"], np.float32) for x in "ab")
    if site == "unembed":
        a, b = a[None], b[: model.vocab_size].T[None]  # rows that pad the vocabulary are cut off
    kernel, num_layers = module.kernels[module.sites.index(site)], len(module.names(model.num_layers))
    want = (num_layers, *kernel[: module.num_in]), (num_layers, a.shape[-1], *kernel[module.num_in :])
    if (a.shape[:-1], b.shape) != want:
        raise ConfigError(f"the adapter's {site} has A {a.shape} and B {b.shape}, which do not fit the base's kernel {kernel}")
    return a.reshape(num_layers, -1, a.shape[-1]), b


def _target(config: LoraConfig, site: str, rank: int) -> Target:
    ruled = tree.match([(pattern, (rank, alpha)) for pattern, rank, alpha in config.rules], f"{site}/kernel")
    if ruled is None or ruled[0] != rank:
        raise ConfigError(f"the adapter's {site} has rank {rank}, and lora.rules gives it {ruled[0] if ruled else 'none'}")
    return Target(rank, ruled[1])


def norms(base: Mapping[str, Sliced], site: str, layer: int) -> np.ndarray:
    """‖W‖ of each output of a kernel of the base, in one layer: the magnitudes with which DoRA does nothing.

    Raises:
      ConfigError: the base's kernels were not given.
    """
    path = f"{site}/kernel"
    if path not in base:
        raise ConfigError(f"this DoRA adapter needs the norms of {path} in the base, and the base's weights were not given")
    kernel = np.asarray(base[path][layer : layer + 1])[0].astype(np.float32)
    return np.sqrt(np.square(kernel).sum(tuple(range(2 if site.endswith("/o") else 1))))


# ------------------------------------------------------------------------------------------ prefix


def _read_prefix(model: ModelConfig, values: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Adapter:
    config = read_prefix(values, model)
    if set(tensors) != {PREFIX_KEY}:
        raise ConfigError(f"a prefix is one tensor, {PREFIX_KEY}; the adapter has {_few(sorted(tensors)) or 'none'}")
    length = config.length
    shape = (length, model.num_layers, 2, model.num_kv_heads, model.head_size)
    flat = tensors[PREFIX_KEY]
    if flat.shape != (length, math.prod(shape[1:])):
        raise ConfigError(
            f"{PREFIX_KEY} has shape {flat.shape}; {length} states of keys and values in {model.num_layers} layers of this base, "
            f"{model.num_kv_heads} heads of {model.head_size}, are {(length, math.prod(shape[1:]))}: it was made for another base"
        )
    states = flat.astype(np.float32).reshape(shape).transpose(2, 1, 0, 3, 4)  # [2 L P K H]
    leaves = {"prefix": {"keys": np.ascontiguousarray(states[0]), "values": np.ascontiguousarray(states[1])}}
    return Adapter(config, leaves)


def _write_prefix(model: ModelConfig, config: PrefixConfig, leaves: Params) -> Files:
    own = leaves.get("prefix", {})
    if set(own) != {"keys", "values"}:
        raise ConfigError(f"a prefix is written as its states; prefix.materialise makes them of {_few(sorted(own)) or 'nothing'}")
    if config.place == "infix":
        raise ConfigError("PEFT has no infix: its prefix is seen by every token; train with prefix.place 'before'")
    if not config.shift_positions:
        raise ConfigError("PEFT's text starts at the position after the prefix, and prefix.shift_positions is False; train with True")
    states = np.stack([np.asarray(own[name], np.float32) for name in ("keys", "values")])  # [2 L P K H]
    if states.shape != (2, model.num_layers, config.length, model.num_kv_heads, model.head_size):
        raise ConfigError(f"the prefix has states {states.shape[1:]} (layers, length, heads, head size), which do not fit the base")
    flat = np.ascontiguousarray(states.transpose(2, 1, 0, 3, 4)).reshape(config.length, -1)
    return Files(prefix_values(config, model), {PREFIX_KEY: flat})


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
