"""Ternary checkpoints in Hugging Face's packed BitNet layout (`quant_method` "bitnet"), read and written.

    model, config, params = read(Path(folder))        # int8 kernels; `surgery.bitnet_packed.pack(params, config)` makes them small
    lm = decoder(model, dot=bitnet_packed.dot(config, dot_in("float32")))
    write(Path(out), model, config, params)

`NAME.weight` is uint8 [out / 4, in]: row i·out/4 + r of the matrix is in bits 2i and 2i+1 of row r, as W̃ + 1 (ours, in
`surgery/bitnet_packed.py`, has neighbours along the inputs in one byte). `NAME.weight_scale` [1] is β where `linear_class` is
"autobitlinear" (microsoft/bitnet-b1.58-2B-4T) and 1/β where it is "bitlinear": the one multiplies by it, the other divides.
With `quantization_mode` "online" the checkpoint holds latent float weights and no scales.

Norms: the model class "bitnet" has an RMSNorm with a scale of its own before `o_proj` (`attn_sub_norm`) and `down_proj`
(`ffn_sub_norm`); `use_rms_norm` puts one before every projection (`NAME.rms_norm`). Ours is the leaf `scale` beside the kernel.

Source: transformers 5.23, integrations/bitnet.py, models/bitnet and quantizers/quantizer_bitnet.py
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxllm import tree
from jaxllm.config import BitnetConfig, ConfigError, ModelConfig, nearest
from jaxllm.contract import Params
from jaxllm.interop.families import config_from_hf, config_to_hf, params_from_hf, params_to_hf
from jaxllm.interop.hf import open_folder, write_folder
from jaxllm.interop.layout import leaf_shapes
from jaxllm.interop.stored import Lazy, whole

PER_BYTE = 4

NAMES = {
    "attention/q": "self_attn.q_proj", "attention/k": "self_attn.k_proj", "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj", "mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj",
}  # fmt: skip
"""Our projection -> theirs, in a layer."""
SUB_NORMS = {"attention/o": "self_attn.attn_sub_norm", "mlp/down": "mlp.ffn_sub_norm"}
"""Projection -> the norm of its input, in the model class "bitnet"."""
DEFAULTS = {
    "vocab_size": 128256, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 30, "num_attention_heads": 20,
    "num_key_value_heads": 5, "hidden_act": "relu2", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
}  # fmt: skip
"""What a key that "bitnet"'s config.json leaves out means; and rope_theta is 500,000."""


class Checkpoint(NamedTuple):
    """What a folder holds."""

    model: ModelConfig
    bitnet: BitnetConfig
    params: Params
    """As of `surgery.bitnet.quantise`: int8 kernels and `weight_scale` [L 1]; of an online checkpoint, latent float kernels."""


def unpack_rows(packed: np.ndarray) -> np.ndarray:
    """uint8 [out / 4, in] -> int8 [out, in] of -1, 0 and 1.

    Raises:
      ConfigError: a code that means nothing.

    >>> unpack_rows(np.array([[0b10100001]], np.uint8)).ravel().tolist()
    [0, -1, 1, 1]
    """
    codes = np.concatenate([packed >> 2 * i & 3 for i in range(PER_BYTE)]).astype(np.int8)
    if (codes == 3).any():
        raise ConfigError(f"a packed matrix {packed.shape} holds the code 3, and ternary weights have 0, 1 and 2; fetch it again")
    return codes - np.int8(1)


def pack_rows(codes: np.ndarray) -> np.ndarray:
    """The inverse of `unpack_rows`.

    Raises:
      ConfigError: rows that 4 does not divide, which their layer class has no room for.
    """
    if codes.shape[0] % PER_BYTE:
        raise ConfigError(f"a matrix of {codes.shape[0]} outputs cannot be packed for Hugging Face: {PER_BYTE} must divide them")
    parts = (codes + 1).astype(np.uint8).reshape(PER_BYTE, -1, *codes.shape[1:])
    return np.bitwise_or.reduce([part << 2 * i for i, part in enumerate(parts)]).astype(np.uint8)


def is_ternary(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a folder that `read` reads."""
    about = values.get("quantization_config")
    return isinstance(about, Mapping) and about.get("quant_method") == "bitnet"


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a Hugging Face folder.

    Raises:
      ConfigError: not such a folder, another quantisation, a model class other than "bitnet" and "llama", a projection that is not
        packed, tensors that are missing, surplus, damaged or of another shape.
    """
    source = open_folder(folder)
    about, model_type = _quantisation(source.config, folder), source.config.get("model_type")
    values = {key: value for key, value in source.config.items() if key != "quantization_config"} | {"model_type": "llama"}
    if model_type == "bitnet":
        values = DEFAULTS | values
        if "rope_parameters" not in values:
            values.setdefault("rope_theta", 500_000.0)
    model = config_from_hf(values)
    tensors = {name: whole(tensor) for name, tensor in source.tensors.items()}
    packed, inverse = about["quantization_mode"] == "offline", about["linear_class"] == "bitlinear"
    scales = _unpack_all(tensors, model, inverse) if packed else {}
    norms, sites = _take_norms(tensors, model, model_type, about["use_rms_norm"])
    eps = float(about["rms_norm_eps"]) if about["use_rms_norm"] else model.norm_eps
    config = BitnetConfig("b158", norm="rms" if norms else "none", norm_sites=sites, norm_eps=eps, norm_scale=bool(norms))
    params = params_from_hf("llama", model, tensors)
    return Checkpoint(model, config, tree.from_items([*tree.items(params), *scales.items(), *norms.items()]))


def _quantisation(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`quantization_config` with its defaults put in."""
    about = dict(values.get("quantization_config") or {})
    if not is_ternary(values):
        what = f"quantised by '{about.get('quant_method')}'" if about else "not quantised"
        raise ConfigError(f"{folder} is {what}: its config.json has no quantization_config with quant_method 'bitnet'")
    if values.get("model_type") not in ("bitnet", "llama"):
        near = nearest(str(values.get("model_type")), ("bitnet", "llama"))
        raise ConfigError(f"{folder} has ternary weights in model_type {values.get('model_type')!r}; jaxllm reads bitnet and llama{near}")
    for key, default, allowed in (
        ("linear_class", "bitlinear", ("bitlinear", "autobitlinear")), ("quantization_mode", "offline", ("offline", "online")),
        ("use_rms_norm", False, (False, True)),
    ):  # fmt: skip
        value: Any = about.setdefault(key, default)
        if value not in allowed:
            raise ConfigError(f"{folder}: quantization_config.{key} is {value!r}; jaxllm reads {' and '.join(map(repr, allowed))}")
    if about["use_rms_norm"] and values["model_type"] == "bitnet":
        raise ConfigError(f"{folder}: quantization_config.use_rms_norm is true in model_type 'bitnet', which would normalise twice")
    return about | {"rms_norm_eps": about.get("rms_norm_eps") or 1e-6}


def _names(model: ModelConfig, theirs: str) -> list[str]:
    return [f"model.layers.{layer}.{theirs}" for layer in range(model.num_layers)]


def _unpack_all(tensors: dict[str, np.ndarray], model: ModelConfig, inverse: bool) -> dict[str, np.ndarray]:
    """Unpack every projection in place, and take the scales: path -> β [L 1]."""
    scales: dict[str, np.ndarray] = {}
    for site, theirs in NAMES.items():
        found = []
        for name in _names(model, theirs):
            if f"{name}.weight_scale" not in tensors or tensors.get(f"{name}.weight", np.empty(0)).dtype != np.uint8:
                raise ConfigError(f"{name} is not packed: jaxllm reads checkpoints in which every projection of a layer is")
            tensors[f"{name}.weight"] = unpack_rows(tensors[f"{name}.weight"])
            scale = tensors.pop(f"{name}.weight_scale").astype(np.float32).reshape(-1)
            if scale.size != 1 or not np.isfinite(scale).all() or scale[0] <= 0:
                raise ConfigError(f"{name}.weight_scale is {scale[:4].tolist()}; it must be one positive number")
            found.append(1 / scale if inverse else scale)
        scales[f"layers/{site}/weight_scale"] = np.stack(found)
    return scales


def _take_norms(
    tensors: dict[str, np.ndarray], model: ModelConfig, model_type: Any, before_each: bool
) -> tuple[dict[str, np.ndarray], str]:
    """Take the norms inside projections: (path -> scale [L, the kernel's inputs], regex of those projections)."""
    names = SUB_NORMS if model_type == "bitnet" else {site: f"{theirs}.rms_norm" for site, theirs in NAMES.items()} if before_each else {}
    norms = {}
    for site, theirs in names.items():
        missing = [name for name in _names(model, theirs) if f"{name}.weight" not in tensors]
        if missing:
            raise ConfigError(f"missing {missing[0]}.weight{nearest(missing[0], tensors)}")
        shape = _input_shape(model, site)
        scales = [tensors.pop(f"{name}.weight") for name in _names(model, theirs)]
        if any(scale.shape != (math.prod(shape),) for scale in scales):
            raise ConfigError(f"{_names(model, theirs)[0]}.weight has shape {scales[0].shape}, expected {(math.prod(shape),)}")
        norms[f"layers/{site}/scale"] = np.stack(scales).reshape(-1, *shape)
    return norms, ".*/(o|down)" if model_type == "bitnet" else ".*"


def _input_shape(model: ModelConfig, site: str) -> tuple[int, ...]:
    """Dimensions that a kernel is summed over."""
    return leaf_shapes(model)[f"layers/{site}/kernel"][1 : 3 if site.endswith("/o") else 2]


# ------------------------------------------------------------------------------------------ writing


def write(
    folder: Path,
    model: ModelConfig,
    config: BitnetConfig,
    params: Params,
    *,
    linear_class: Literal["autobitlinear", "bitlinear"] = "autobitlinear",
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a folder that transformers loads and computes as we do with a scale for each token: the inverse of `read`.

    Args:
      files: more to write: a tokenizer, a generation config.

    Raises:
      ConfigError: as `packed`; an existing folder.
    """
    values, tensors = packed(model, config, params, linear_class=linear_class)
    write_folder(folder, tensors, {**(files or {}), "config.json": json.dumps(values, indent=2).encode()})


def packed(
    model: ModelConfig, config: BitnetConfig, params: Params, *, linear_class: Literal["autobitlinear", "bitlinear"] = "autobitlinear"
) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """(config.json, tensors) of a model in their layout.

    Args:
      params: as of `surgery.bitnet.quantise` (of `surgery.bitnet_packed.unpack`, where they are packed). Sign weights are ternary too.

    Raises:
      ConfigError: a config or a model that their layout has no place for, params that are not quantised.
    """
    sites = _normed(config)
    _refuse(model, config, sites)
    leaves = dict(tree.items(params))
    if wrong := [path for site in NAMES if (path := f"layers/{site}/kernel") not in leaves or leaves[path].dtype != np.int8]:
        raise ConfigError(f"{wrong[0]} is not an int8 kernel: quantise the params first, or unpack the packed ones")
    taken = {f"layers/{site}/{name}" for site in NAMES for name in ("weight_scale", "scale")}
    plain = tree.from_items([(path, np.asarray(leaf)) for path, leaf in leaves.items() if path not in taken])
    tensors = params_to_hf("llama", model, plain)
    for site, theirs in NAMES.items():
        beta = np.asarray(leaves[f"layers/{site}/weight_scale"], np.float32)
        for layer, name in enumerate(_names(model, theirs)):
            tensors[f"{name}.weight"] = pack_rows(tensors[f"{name}.weight"])
            tensors[f"{name}.weight_scale"] = 1 / beta[layer] if linear_class == "bitlinear" else beta[layer]
    for site, theirs in sites.items():
        shape = (model.num_layers, *_input_shape(model, site))
        scale = np.asarray(leaves.get(f"layers/{site}/scale", np.ones(shape, np.float32)))
        for layer, name in enumerate(_names(model, theirs)):
            tensors[f"{name}.weight"] = scale[layer].reshape(-1)
    values = config_to_hf("llama", model)
    if sites == SUB_NORMS:
        values |= {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet"}
    values["quantization_config"] = {
        "quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline", "modules_to_not_convert": ["lm_head"],
        "use_rms_norm": len(sites) == len(NAMES), "rms_norm_eps": config.norm_eps,
    }  # fmt: skip
    return values, {name: Lazy(x.shape, x.dtype, x.__getitem__) for name, x in tensors.items()}


def _normed(config: BitnetConfig) -> dict[str, str]:
    """Projections that normalise their input -> the name of their norm."""
    sites = {site for site in NAMES if config.norm != "none" and re.fullmatch(config.norm_sites, site)}
    return dict(SUB_NORMS) if sites == set(SUB_NORMS) else {site: f"{NAMES[site]}.rms_norm" for site in NAMES if site in sites}


def _refuse(model: ModelConfig, config: BitnetConfig, sites: Mapping[str, str]) -> None:
    problem = None
    if config.kind == "none":
        problem = "bitnet.kind is 'none'"
    elif config.num_groups > 1:
        problem = f"bitnet.num_groups is {config.num_groups}, and each matrix of theirs has one scale"
    elif config.activation_bits != 8 or config.shifted_sites:
        problem = "bitnet.activation_bits must be 8 and bitnet.shifted_sites empty"
    elif sites and config.norm == "layer":
        problem = "bitnet.norm is 'layer', and theirs is 'rms'"
    elif len(sites) not in (0, len(SUB_NORMS), len(NAMES)) or (len(sites) == len(SUB_NORMS) and sites != SUB_NORMS):
        problem = f"bitnet.norm_sites '{config.norm_sites}' matches {', '.join(sites)}; theirs are none, o and down, or all"
    elif sites == SUB_NORMS and config.norm_eps != model.norm_eps:
        problem = f"bitnet.norm_eps is {config.norm_eps} and model.norm_eps {model.norm_eps}, and theirs is one number"
    if problem:
        raise ConfigError(f"this model cannot be written in Hugging Face's BitNet layout: {problem}")
