"""A frozen base in 8 or 4 bits under trained adapters (QLoRA), by the library qwix.

    W ≈ scale ⊙ value          one scale for each output and each `tile` of inputs; value int8, int4, or an index into nf4's 16 numbers

In place of a kernel lie two leaves, stacked over layers as it is:

    layers/attention/q/{values [L D N H], scales [L D/tile N H]}

A layer's kernels are written out in full just before it runs, and again on the way back where `remat` recomputes the layer: under
remat none all of them would be kept, and nothing saved. What is trained and merged is what was seen: the rounded base.

Source: arXiv:2305.14314 section 3 (without its second rounding, of the scales).
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxllm import tree
from jaxllm.config import ConfigError, QuantiseConfig, nearest
from jaxllm.contract import LM, Params

LEAVES = r"(.*/)?(values|scales)"
"""What stands in place of a kernel."""
_NUM_INPUTS = {"attention/o": 2, "cross_attention/o": 2}
"""Input dimensions of a projection's kernel, where it is not one."""


def quantise(params: Params, config: QuantiseConfig) -> Params:
    """`params` with the kernels that the pattern names in few bits.

    Raises:
      ConfigError: a pattern that matches no kernel (with the nearest paths); inputs that the tile does not divide; qwix missing.
    """
    qwix = _qwix()
    paths = chosen(params, config)

    def pairs(path: str, leaf: Any) -> list[tuple[str, Any]]:
        if path not in paths:
            return [(path, leaf)]
        axis = _tiled_axis(path)
        tile = min(config.tile, leaf.shape[axis])
        if leaf.shape[axis] % tile:
            raise ConfigError(f"quantise.tile is {tile}, which does not divide the {leaf.shape[axis]} inputs of {path}")
        others = [i for i in range(leaf.ndim) if i != axis]
        made = qwix.quantize(jnp.asarray(leaf, jnp.float32), config.kind, channelwise_axes=others, tiled_axes={axis: tile})
        site = path.removesuffix("/kernel")
        return [(f"{site}/values", made.qvalue), (f"{site}/scales", made.scale)]

    return tree.from_items([pair for path, leaf in tree.items(params) for pair in pairs(path, leaf)])


def chosen(params: Params, config: QuantiseConfig) -> set[str]:
    """Paths of the kernels that the pattern names."""
    kernels = [path for path in tree.paths(params) if path.startswith("layers/") and path.endswith("/kernel")]
    found = {path for path in kernels if re.fullmatch(config.where, path)}
    if not found:
        raise ConfigError(f"quantise.where '{config.where}' matches no kernel{nearest(config.where, kernels) or ';'} {', '.join(kernels)}")
    return found


def dequantise(params: Params, kind: str) -> Params:
    """The inverse, but for what rounding lost: kernels in float32."""
    if not isinstance(params, dict):
        return params
    if "values" in params and "scales" in params:
        rest = {name: leaf for name, leaf in params.items() if name not in ("values", "scales")}
        return {**rest, "kernel": _kernel(params["values"], params["scales"], kind)}
    return {name: dequantise(part, kind) for name, part in params.items()}


def _kernel(values: Array, scales: Array, kind: str) -> Array:
    qwix = _qwix()
    return qwix.dequantize(qwix.QArray(values, scales, None, kind))


def with_quantised(lm: LM, config: QuantiseConfig) -> LM:
    """`lm`, which was built with `dequantise` as its reparam, with kernels in few bits in its params."""
    return lm._replace(init=lambda key: quantise(lm.init(key), config))


def check_frozen(trainable: Params, config: QuantiseConfig) -> None:
    """Refuse to train rounded kernels.

    Args:
      trainable: what the optimizer would change.
    """
    if trained := [path for path in tree.paths(trainable) if re.fullmatch(LEAVES, path)]:
        raise ConfigError(
            f"quantise.kind is {config.kind} and {trained[0].rpartition('/')[0]}/kernel trains; a rounded kernel has no gradient: "
            "freeze it (--optim.freeze, as adapters.TRAIN_ONLY_LORA), or leave it out of quantise.where"
        )


def _tiled_axis(path: str) -> int:
    """The last input dimension: [L in … out …]."""
    site = path.removeprefix("layers/").removesuffix("/kernel")
    return _NUM_INPUTS.get(site, 1)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise ConfigError("quantise needs qwix, which is not installed: pip install .[quantise]") from None
    return qwix


def num_bytes(params: Params) -> int:
    """Of the params as a device keeps them: four bits are half a byte."""
    bits = lambda leaf: {"int4": 4, "uint4": 4}.get(str(leaf.dtype), 8 * leaf.dtype.itemsize)
    return sum(leaf.size * bits(leaf) for leaf in jax.tree.leaves(params)) // 8
