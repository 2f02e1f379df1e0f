"""BitNet for inference: weights of 1, 1.6 or 2 bits in bytes, products of int8 with int32 sums.

    packed = pack(params, config)                             # what a checkpoint holds
    lm = decoder(model, dot=dot(config, dot_in("float32")), reparam=unpacked(model, config))
    logits = lm.unembed(packed).logits(lm.apply(packed, tokens).hidden)

A packed projection has, in place of `kernel` [L …], the leaves

    codes         uint8    [L …]  the kernel's shape with ⌈n/k⌉ for n, the last of the dimensions that are summed over
    weight_scale  float32  [L J]  β of each group; a weight is β·W̃ (Hugging Face stores β, or 1/β: `interop/bitnet.py`)
    length        int32    [L]    n

Value i of that dimension is digit i mod k of byte i div k, least significant digit first; the digit is W̃ + 1 in base 4 (k = 4) or
base 3 (k = 5) for ternary weights, (W̃ + 1)/2 in base 2 (k = 8) for sign weights. The values that fill the last byte up are 0, which
is digit 1 (digit 0 would be -1); sign weights have no 0, and theirs are -1: they are cut off by `length` in either case.

Layers are unpacked one at a time, inside the scan over layers. The products are those of training to the last bit (`bitnet.py`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int8, UInt8

from jaxllm import tree
from jaxllm.config import BitnetConfig, ConfigError, ModelConfig
from jaxllm.config.bitnet import SITES
from jaxllm.contract import Dot, Params
from jaxllm.sharding import Axes
from jaxllm.surgery import bitnet
from jaxllm.surgery.bitnet import Reparam

RULES: tuple[tuple[str, Axes], ...] = (
    (r"layers/(attention|cross_attention)/[qkv]/codes", (None, "data", "model", None)),
    (r"layers/(attention|cross_attention)/o/codes", (None, "model", None, "data")),
    (r"layers/mlp/(gate|up)/codes", (None, "data", "model")),
    (r"layers/mlp/down/codes", (None, "model", "data")),
    (r"layers/.*/(weight_scale|length)", ()),
)
"""Sharding of packed leaves, as of the kernels: `sharding.param_specs(packed, mesh, RULES)` (without those that match nothing)."""


class Format(NamedTuple):
    """Digits in a byte."""

    base: int
    per_byte: int
    offset: int
    """Digit = (value + offset) div step."""
    step: int
    padding: int
    """The value that fills up the last byte."""


SIGNS = Format(2, 8, 1, 2, -1)
TERNARY = Format(4, 4, 1, 1, 0)
BASE3 = Format(3, 5, 1, 1, 0)


def format_of(config: BitnetConfig) -> Format:
    """How a config's weights are packed.

    Raises:
      ConfigError: kind 'none', which has nothing to pack.
    """
    if config.kind == "none":
        raise ConfigError("bitnet.kind is 'none': there is nothing to pack; choose b1 or b158")
    if config.kind == "b1":
        return SIGNS
    return BASE3 if config.packing == "base3" else TERNARY


def pack_values(values: Int8[Array, "*shape"], how: Format, axis: int = 0) -> UInt8[Array, "*shape"]:
    """Integers from -1 to 1, `how.per_byte` to a byte along `axis`: n values take ⌈n / per_byte⌉ bytes.

    >>> pack_values(jnp.array([-1, 0, 1, 1, 1], jnp.int8), TERNARY).tolist()
    [164, 86]
    """
    values = jnp.moveaxis(values, axis, 0)
    fill = -values.shape[0] % how.per_byte
    values = jnp.pad(values, [(0, fill)] + [(0, 0)] * (values.ndim - 1), constant_values=how.padding)
    digits = ((values + how.offset) // how.step).astype(jnp.uint8).reshape(-1, how.per_byte, *values.shape[1:])
    weights = jnp.array([how.base**i for i in range(how.per_byte)], jnp.uint8).reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.moveaxis((digits * weights).sum(1, dtype=jnp.uint8), 0, axis)


def unpack_values(packed: UInt8[Array, "*shape"], how: Format, length: int, axis: int = 0) -> Int8[Array, "*shape"]:
    """The inverse of `pack_values` for `length` values along `axis`.

    >>> unpack_values(jnp.array([164, 86], jnp.uint8), TERNARY, 5).tolist()
    [-1, 0, 1, 1, 1]
    """
    packed = jnp.moveaxis(packed, axis, 0)
    weights = jnp.array([how.base**i for i in range(how.per_byte)], jnp.uint8).reshape(-1, *(1,) * (packed.ndim - 1))
    digits = packed[:, None] // weights % jnp.uint8(how.base)
    values = digits.reshape(-1, *packed.shape[1:])[:length].astype(jnp.int8) * how.step - how.offset
    return jnp.moveaxis(values, 0, axis)


def packed_axis(site: str) -> int:
    """The dimension of one layer's kernel that is packed: the last that is summed over (D of q, H of o)."""
    return bitnet.num_inputs(site) - 1


def pack(params: Params, config: BitnetConfig) -> Params:
    """Params for inference with packed projections; all other leaves are the same arrays.

    Args:
      params: latent float params, or what `bitnet.quantise` gives.

    Raises:
      ConfigError: nothing to pack, packed already, or weights that are not of the config's kind.
    """
    how = format_of(config)
    _refuse_packed(params)
    kernels = [leaf for path, leaf in tree.items(params) if path.endswith("/kernel") and path[len("layers/") : -len("/kernel")] in SITES]
    if not kernels or any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in kernels):
        params = bitnet.quantise(params, config)
    elif config.kind == "b1" and any(not bool(leaf.all()) for leaf in kernels):
        raise ConfigError("bitnet.kind is b1, and these weights are ternary: 1 bit has no place for a 0; set bitnet.kind to b158")

    def small(site: str, leaves: Params) -> Params:
        kernel, rest = leaves["kernel"], {name: leaf for name, leaf in leaves.items() if name != "kernel"}
        axis = packed_axis(site)
        return {**rest, "codes": pack_values(kernel, how, axis), "length": jnp.asarray(kernel.shape[axis], jnp.int32)}

    return {**params, "layers": bitnet.map_layers(small, params["layers"])}


def unpack(packed: Params, config: BitnetConfig) -> Params:
    """The inverse of `pack`: int8 kernels W̃ with `weight_scale` beside them, as `bitnet.quantise` gives them.

    Raises:
      ConfigError: params that are not packed, or packed in another format.
    """
    how = format_of(config)

    def large(site: str, leaves: Params) -> Params:
        if "codes" not in leaves:
            raise ConfigError(
                f"layers/{site} is not packed: it has {', '.join(leaves)}, and a packed projection has codes, weight_scale, length"
            )
        length, axis = int(leaves["length"][0]), packed_axis(site) + 1
        given, expected = leaves["codes"].shape[axis], math.ceil(length / how.per_byte)
        if given != expected:
            raise ConfigError(
                f"layers/{site} has {given} bytes for {length} values, and bitnet.kind '{config.kind}' with bitnet.packing "
                f"'{config.packing}' takes {expected}; give the config that it was packed with"
            )
        rest = {name: leaf for name, leaf in leaves.items() if name not in ("codes", "length")}
        return {**rest, "kernel": unpack_values(leaves["codes"], how, length, axis)}

    return {**packed, "layers": bitnet.map_projections(large, packed["layers"])}


def unpacked(model: ModelConfig, config: BitnetConfig) -> Reparam:
    """`reparam` of `decoder` for packed params: one layer's int8 kernels, in the shapes of `model`."""
    how, shapes = format_of(config), bitnet.kernel_shapes(model)

    def large(site: str, leaves: Params) -> Params:
        axis = packed_axis(site)
        kernel = unpack_values(leaves["codes"], how, shapes[site][axis], axis)
        if kernel.shape != shapes[site]:
            raise ConfigError(
                f"layers/{site}/codes of one layer is {leaves['codes'].shape}, which is {kernel.shape} unpacked, and the model has "
                f"{shapes[site]}; use the model and the bitnet config that it was packed with"
            )
        return {"kernel": kernel, **{name: leaf for name, leaf in leaves.items() if name not in ("codes", "length")}}

    return lambda layer: bitnet.map_projections(large, layer)


def dot(config: BitnetConfig, inner: Dot) -> Dot:
    """`dot` of `decoder` for int8 kernels: int8 products with int32 sums, then scales. The head goes to `inner`."""
    return bitnet.dot(config, lambda site, spec, x, leaves: (_integers if site in SITES else inner)(site, spec, x, leaves))


def _integers(site: str, spec: str, x: Array, leaves: Params) -> Array:
    """An einsum of integers of at most 8 bits; x holds them as floats."""
    return jnp.einsum(spec, x.astype(jnp.int8), leaves["kernel"], preferred_element_type=jnp.int32).astype(jnp.float32)


def _refuse_packed(params: Params) -> None:
    packed = [path for path in tree.paths(params) if path.endswith("/codes")]
    if packed:
        raise ConfigError(f"these params are packed already ({packed[0]}); unpack them first: bitnet_packed.unpack(params, config)")


# ------------------------------------------------------------------------------------------ sizes


class Size(NamedTuple):
    """One projection, or a total, over all layers."""

    path: str
    num_params: int
    packed_bytes: int
    """Codes, scales and lengths."""

    @property
    def bfloat16_bytes(self) -> int:
        """What it takes at 2 bytes each."""
        return 2 * self.num_params

    @property
    def ratio(self) -> float:
        """bf16 over packed."""
        return self.bfloat16_bytes / self.packed_bytes


def sizes(packed: Params) -> list[Size]:
    """What each packed projection takes, then all of them ('projections'), then the model with its leaves as they are stored ('model').

    Raises:
      ConfigError: params that are not packed.
    """
    rows: list[Size] = []
    for site in SITES:
        leaves: Any = packed["layers"]
        for name in site.split("/"):
            leaves = leaves.get(name, {})
        if "codes" in leaves:
            codes, axis = leaves["codes"], packed_axis(site) + 1
            count = math.prod(codes.shape) // codes.shape[axis] * int(leaves["length"][0])
            num_bytes = sum(tree.num_bytes(leaves[name]) for name in ("codes", "weight_scale", "length"))
            rows.append(Size(f"layers/{site}", count, num_bytes))
    if not rows:
        raise ConfigError("these params are not packed; pack them first: bitnet_packed.pack(params, config)")
    all_rows = Size("projections", sum(row.num_params for row in rows), sum(row.packed_bytes for row in rows))
    rest = [leaf for path, leaf in tree.items(packed) if path.rpartition("/")[2] not in ("codes", "weight_scale", "length")]
    whole = Size("model", all_rows.num_params + sum(leaf.size for leaf in rest), all_rows.packed_bytes + tree.num_bytes(rest))
    return [*rows, all_rows, whole]


def size_report(packed: Params) -> str:
    """A table of `sizes`: path, parameters, bytes in bf16, bytes packed, and their ratio."""
    lines = [
        (row.path, f"{row.num_params:,}", f"{row.bfloat16_bytes:,}", f"{row.packed_bytes:,}", f"{row.ratio:.2f}") for row in sizes(packed)
    ]
    lines.insert(0, ("", "parameters", "bytes in bf16", "bytes packed", "ratio"))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(f"{line[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
                     for line in lines)  # fmt: skip
