"""`python -m tools.convert kv-heads`: a checkpoint with fewer key/value heads, leaf by leaf, and how far each layer's heads moved."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import __version__, checkpoint_slices, pretrained, tree
from jaxllm.config import ConfigError, MeshConfig, ModelConfig
from jaxllm.contract import Batch
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.files import path_of
from jaxllm.interop.layout import leaf_shapes
from jaxllm.interop.stored import Lazy
from jaxllm.surgery import resize
from tools import hf_export


@dataclass(frozen=True)
class Options:
    """Options of a conversion to fewer key/value heads."""

    num_kv_heads: int | None = None
    """Key/value heads of the result: a divisor of the source's. 1 is multi-query attention."""
    how: Literal["mean", "first", "random", "svd"] = "mean"
    """What a new head is of its group of old ones: their mean, the first of them, a freshly drawn one, or (svd) the one whose linear
    images are nearest to them on the calibration text."""
    seed: int = 0
    """For --how random."""
    calibration: str = ""
    """For --how svd: a file of text (or gzip of it) like that which the model will read."""
    calibration_tokens: int = 8192
    """For --how svd: how many tokens of it; several times the model's width."""
    reach: int = 1024
    """For --how svd: rotary planes that turn by less than a radian over this many tokens count as standing still."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """The devices that will read the checkpoint: each leaf is written in the parts that they hold. They need not be here."""


def command(checkpoint: str, out: str, options: Options) -> None:
    """Write `checkpoint` with other key/value heads to `out`; no leaf is in memory whole, but for svd, which runs the model.

    Raises:
      ConfigError: as `resize.check`; nothing there, or a damaged checkpoint; `out` exists; svd without enough text.
    """
    folder = path_of(checkpoint).expanduser()
    config, params = open_params(folder)
    if options.num_kv_heads is None:
        choices = [n for n in range(1, config.num_kv_heads + 1) if config.num_kv_heads % n == 0]
        raise ConfigError(f"say how many heads: --num_kv_heads, one of {', '.join(map(str, choices))}")
    resize.check(params, config, options.num_kv_heads)
    if options.how == "svd":
        converted, new_config = by_svd(folder, params, config, options.num_kv_heads, options)
    else:
        converted, new_config = lazy(params, config, options.num_kv_heads, options.how, options.seed)
    errors = report(params, converted, config, new_config, weights=options.how != "svd")
    tokenizer, template, stop_ids = pretrained.load_text(folder)
    origin = hf_export.find_origin(folder)
    source = {
        "kind": "kv-heads", "from": str(checkpoint), "family": origin.family, "converter": f"jaxllm {__version__}",
        "num_kv_heads_before": config.num_kv_heads, "num_kv_heads": new_config.num_kv_heads,
        "how": options.how, "seed": options.seed, "relative_error": errors,
    }  # fmt: skip
    own: Tokenizer | None = None if isinstance(tokenizer, pretrained.NoTokenizer) else tokenizer
    pretrained.save(
        out,
        new_config,
        converted,
        own,
        chat_template=template,
        stop_ids=stop_ids,
        source=source,
        files=travelling(origin),
        mesh=options.mesh,
    )
    for line in table(errors):
        print(line)
    before, after = (resize.cache_bytes(c, 1, 1) for c in (config, new_config))
    print(
        f"wrote {out}: {config.num_kv_heads} -> {new_config.num_kv_heads} key/value heads ({options.how}), "
        f"{tree.count(params):,} -> {tree.count(converted):,} parameters, {before:,} -> {after:,} bytes of bfloat16 cache a token",
        flush=True,
    )


def open_params(folder: Path) -> tuple[ModelConfig, tree.Tree]:
    """(config, params that are read slice by slice); whole params for a run that froze some of them."""
    config = pretrained.model_config(folder)
    params, _ = checkpoint_slices.read(folder)
    if set(tree.paths(params)) < set(leaf_shapes(config)):
        return config, pretrained.load(folder, precision="float32").params
    return config, params


def lazy(
    params: tree.Tree, config: ModelConfig, num_kv_heads: int, how: Literal["mean", "first", "random"], seed: int = 0
) -> tuple[tree.Tree, ModelConfig]:
    """`resize.kv_heads` of leaves that are read slice by slice, as leaves that are."""
    key = jax.random.key(seed)

    def leaf(path: str, old: Any) -> Any:
        if num_kv_heads == config.num_kv_heads or not resize.has_kv_heads(path, config):
            return old
        shape = (*old.shape[:-2], num_kv_heads, old.shape[-1])
        if how == "random":
            return Lazy(shape, old.dtype, partial(_fresh, path, shape, config, key, old.dtype))
        return Lazy(shape, old.dtype, partial(_pooled, old, shape, how))

    return tree.map_with_path(leaf, params), replace(config, num_kv_heads=num_kv_heads)


def by_svd(folder: Path, params: tree.Tree, config: ModelConfig, num_kv_heads: int, options: Options) -> tuple[tree.Tree, ModelConfig]:
    """`resize.kv_heads` with how='svd' of stored leaves, in their number format; those of attention are read whole."""
    if not options.calibration:
        raise ConfigError("--how svd weighs what heads do to real text: give --calibration FILE, text like that which the model will read")
    model = pretrained.load(folder, precision="float32")
    tokens = text_rows(model.tokenizer, path_of(options.calibration).expanduser(), options.calibration_tokens, min(256, config.max_length))
    moments = resize.input_moments(model.lm, model.params, (whole_rows(tokens[i : i + 4]) for i in range(0, len(tokens), 4)))
    del model
    attention = jax.tree.map(lambda leaf: np.asarray(leaf[:]), params["layers"]["attention"])
    params = {**params, "layers": {**params["layers"], "attention": attention}}
    return resize.kv_heads(params, config, num_kv_heads, "svd", moments=moments, reach=options.reach)


def text_rows(tokenizer: Tokenizer, path: Path, num_tokens: int, length: int) -> np.ndarray:
    """The first tokens of a file as rows that do not overlap, [B length]; the last few that fill no row are left out.

    Raises:
      ConfigError: no such file, or too little text in it.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is no file of text")
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    ids = tokenizer.encode(raw[: 16 * num_tokens].decode("utf-8", errors="ignore"))
    if len(ids) < num_tokens:
        raise ConfigError(f"{path} has {len(ids):,} tokens, and {num_tokens:,} were asked for")
    num_rows = num_tokens // length
    return np.array(ids[: num_rows * length], np.int32).reshape(num_rows, length)


def whole_rows(tokens: np.ndarray) -> Batch:
    """Rows without padding, each one document."""
    ids, ones = jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Batch(ids, jnp.roll(ids, -1, 1), ones.astype(jnp.float32), ones, positions)


def _pooled(old: Any, shape: tuple[int, ...], how: Any, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a pooled leaf: the groups of old heads that its heads are made of are read, no more."""
    *lead, heads, inner = index
    group = old.shape[-2] // shape[-2]
    part = np.asarray(old[(*lead, slice(heads.start * group, heads.stop * group), inner)])
    return np.ascontiguousarray(resize.pool(part, heads.stop - heads.start, how))


def _fresh(path: str, shape: tuple[int, ...], config: ModelConfig, key: jax.Array, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a fresh leaf, drawn a layer at a time."""
    layers = range(shape[0])[index[0]]
    parts = [np.asarray(resize.fresh(path, shape[1:], config, key, layer)[index[1:]]) for layer in layers]
    return np.stack(parts).astype(dtype) if parts else np.empty([part.stop - part.start for part in index], dtype)


def travelling(origin: hf_export.Origin) -> list[Path]:
    """The source's files that still hold: not its card, whose numbers are another model's."""
    dropped = {"README.md", pretrained.CONVERSION}
    return sorted(path for path in origin.folder.iterdir() if path.is_file() and path.name not in dropped) if origin.folder else []


# ------------------------------------------------------------------------------------------- report


def report(before: tree.Tree, after: tree.Tree, config: ModelConfig, new_config: ModelConfig, *, weights: bool) -> dict[str, list[float]]:
    """What -> its relative error in each layer, the root of Σ |difference|² / Σ |old|², over all old heads i or query heads n.

        k, v       W[i] − W'[i // r]                       each head against the one that takes its place
        scores     Q_n K_iᵀ − Q'_n K'ᵀ                     what a query and a key at the same position make of their inputs
        outputs    V_i O_n − V' O'_n                       what a value adds to the residual stream

    Args:
      weights: leave k and v out where new heads are in another basis.
    """
    out: dict[str, list[float]] = {}
    for site in [site for site in ("attention", "cross_attention") if site in before["layers"]]:
        for layer in range(config.num_layers):
            old, new = (_layer(params, site, layer, config.num_heads) for params in (before, after))
            errors = {name: _distance(old[name], new[name]) for name in "kv"} if weights else {}
            errors["scores"] = _product_distance((old["q"], old["k"]), (new["q"], new["k"]))
            errors["outputs"] = _product_distance((old["v"], old["o"]), (new["v"], new["o"]))
            for name, error in errors.items():
                out.setdefault(f"{site}/{name}", []).append(error)
    return out


def _layer(params: tree.Tree, site: str, layer: int, num_heads: int) -> dict[str, np.ndarray]:
    """q, k, v and o of one layer, [D N H] each in float64: keys and values once for every query head that reads them."""
    leaves = {name: np.asarray(params["layers"][site][name]["kernel"][layer : layer + 1])[0].astype(np.float64) for name in "qkvo"}
    leaves["o"] = np.moveaxis(leaves["o"], -1, 0)
    return {name: np.repeat(leaf, num_heads // leaf.shape[1], axis=1) for name, leaf in leaves.items()}


def _distance(old: np.ndarray, new: np.ndarray) -> float:
    return float(np.linalg.norm(old - new) / max(float(np.linalg.norm(old)), 1e-30))


def _product_distance(old: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray]) -> float:
    """The same of A_n B_nᵀ, from inner products [N H H] alone: ⟨A Bᵀ, C Dᵀ⟩ = Σ (AᵀC) ∘ (BᵀD)."""

    def inner(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
        left, right = (np.einsum("DNH,DNI->NHI", x, y, optimize=True) for x, y in zip(a, b, strict=True))
        return float((left * right).sum())

    size = inner(old, old)
    return float(np.sqrt(max(size - 2 * inner(old, new) + inner(new, new), 0.0) / max(size, 1e-30)))


def table(errors: Mapping[str, list[float]]) -> list[str]:
    """A line for each layer."""
    names = [name.removeprefix("attention/") for name in errors]
    lines = ["layer" + "".join(f"{name:>16}" for name in names) + "   (relative errors)"]
    rows = zip(*errors.values(), strict=True)
    return lines + [f"{layer:5}" + "".join(f"{value:16.4f}" for value in row) for layer, row in enumerate(rows)]
