"""BitNet: projections with sign or ternary weights and 8-bit inputs, trained from latent float32 weights.

    weights     b1    α = mean W   β = mean|W|   W̃ = +1 where W > α, else -1
                b158               β = mean|W|   W̃ = clip(round(W/β), -1, 1)
    inputs      γ = max|x|   x̃ = clip(round(x·Q/γ), -Q, Q)   Q = 2^(bits-1) - 1
    product     y = (x̃·W̃)·β·γ/Q

    lm = decoder(model, dot=bitnet.dot(config, dot_in("float32")), reparam=bitnet.reparam(config))

The product is taken of integers, and scaled afterwards: in bf16 and in float32 alike it is exact (127 and ±1 fit, sums stay under
2^24), so the forward pass of training is that of packed inference (`bitnet_packed.py`), which multiplies the same integers as int8.
Gradients pass all rounding, clipping and sign unchanged (straight-through), and scales get none. Q is 127 and not the paper's 128,
which no int8 holds; rounding is written out; scales are at least 1e-5 as in the released code of b1.58, and are taken in float32.

Letters: J groups, I inputs of one group, O outputs, L layers. Groups lie along the dimension of the kernel that the mesh axis `model`
cuts (`sharding.RULES`): outputs of q, k, v, gate and up, whose input is whole on every shard and has one group; inputs of o and down,
whose input is cut as the kernel is. So with J = size of `model` no statistic crosses `model`. A scale for each tensor (and not each
token) is one number for the whole batch, so that it does cross `data`, as do the statistics of kernels that are cut along `data`.

Source: arXiv:2310.11453 equations 1 to 12; b1.58: arXiv:2402.17764 equations 1 to 3
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm import tree
from jaxllm.config import BitnetConfig, ConfigError, ModelConfig
from jaxllm.config.bitnet import SITES
from jaxllm.contract import LM, Dot, Params
from jaxllm.sharding import RULES, axis_size, constrain, current_mesh

type Reparam = Callable[[Params], Params]
"""One layer's params -> those it runs with."""

NORM_SCALES = rf"layers/({'|'.join(SITES)})/scale"
"""Leaves that `norm_scales` are."""
FLOOR = 1e-5
"""Least scale, so that nothing is divided by 0."""


# ----------------------------------------------------------------------------------------- sites


def num_inputs(site: str) -> int:
    """Dimensions of a projection's kernel that are summed over: N and H of o [N H D], else one."""
    return 2 if site.endswith("/o") else 1


def cuts_inputs(site: str) -> bool:
    """Whether the mesh axis `model` cuts a projection's kernel along its inputs (o, down) and not its outputs (q, k, v, gate, up).

    >>> cuts_inputs("attention/o"), cuts_inputs("mlp/up")
    (True, False)
    """
    axes = tree.match(RULES, f"layers/{site}/kernel")
    assert axes is not None, f"no sharding rule for {site}"
    return axes.index("model") - 1 < num_inputs(site)  # a rule's first dimension is L


def map_projections(f: Callable[[str, Params], Params], layer: Params) -> Params:
    """One layer's params with `f(site, leaves)` in place of each projection's leaves."""
    branches = {site.partition("/")[0] for site in SITES}
    return {
        branch: {name: f(f"{branch}/{name}", leaves) if f"{branch}/{name}" in SITES else leaves for name, leaves in part.items()}
        if branch in branches
        else part
        for branch, part in layer.items()
    }


def group_shape(config: BitnetConfig, site: str, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """A kernel's shape as (J, I, O) where `model` cuts its inputs, else (I, J, O); and the two dimensions that are not J.

    Raises:
      ConfigError: groups that do not divide the dimension; the message has the nearest numbers that do.

    >>> group_shape(BitnetConfig(num_groups=2), "attention/q", (64, 4, 16))
    ((64, 2, 32), (0, 2))
    """
    inputs, outputs = (math.prod(part) for part in (shape[: num_inputs(site)], shape[num_inputs(site) :]))
    groups = config.num_groups
    cut, what = (inputs, "inputs") if cuts_inputs(site) else (outputs, "outputs")
    if cut % groups:
        divisors = [n for n in range(1, cut + 1) if cut % n == 0]
        near = [*[n for n in divisors if n < groups][-1:], *[n for n in divisors if n > groups][:1]]
        raise ConfigError(
            f"bitnet.num_groups is {groups}, which does not divide the {cut} {what} of {site}; choose {' or '.join(map(str, near))}"
        )
    if cuts_inputs(site):
        return (groups, inputs // groups, outputs), (1, 2)
    return (inputs, groups, outputs // groups), (0, 2)


# --------------------------------------------------------------------------------------- weights


def quantise_weights(config: BitnetConfig, site: str, kernel: Array) -> tuple[Array, Float[Array, " J"]]:
    """(W̃ in float32, shaped as the kernel; β of each group) of one layer's kernel.

    Source: arXiv:2310.11453 equations 1 to 3, groups equation 12; arXiv:2402.17764 equations 1 to 3
    """
    shape, others = group_shape(config, site, kernel.shape)
    grouped = jax.lax.stop_gradient(kernel).astype(jnp.float32).reshape(shape)
    scale = jnp.maximum(jnp.abs(grouped).mean(others, keepdims=True), FLOOR)
    if config.kind == "b1":
        codes = jnp.where(grouped > grouped.mean(others, keepdims=True), 1.0, -1.0)
    else:
        codes = jnp.clip(jnp.round(grouped * (1.0 / scale)), -1.0, 1.0)
    return codes.reshape(kernel.shape), scale.reshape(-1)


def over_kernel(config: BitnetConfig, site: str, scale: Float[Array, " J"], shape: tuple[int, ...]) -> Array:
    """β of each group at each place of a kernel."""
    grouped, others = group_shape(config, site, shape)
    return jnp.broadcast_to(jnp.expand_dims(scale, others), grouped).reshape(shape)


def _straight_through(value: Array, through: Array) -> Array:
    """`value` going forward, the gradient of `through` going back. Exact: what is added to the value is 0."""
    return jax.lax.stop_gradient(value) + (through - jax.lax.stop_gradient(through))


def reparam(config: BitnetConfig) -> Reparam:
    """`reparam` of `decoder`: kernels become W + stop_gradient(λ·(β·W̃ - W)), with β beside them as `weight_scale` [J].

    λ is the layer's leaf `quantise`, 1 where there is none; every projection gets it too, for `dot`. Kernels of integers, which
    `quantise` makes, are W̃ already and stay, so that the model that was trained runs its quantised params as they are.
    """

    def quantised(site: str, leaves: Params, amount: Array | None) -> Params:
        kernel = leaves["kernel"]
        if jnp.issubdtype(kernel.dtype, jnp.integer):
            return leaves
        codes, scale = quantise_weights(config, site, kernel)
        value = codes * over_kernel(config, site, scale, kernel.shape)
        given = {} if amount is None else {"quantise": amount}
        return {**leaves, **given, "kernel": _straight_through(_mix(amount, value, kernel), kernel), "weight_scale": scale}

    def change(layer: Params) -> Params:
        if config.kind == "none":
            return layer
        return map_projections(lambda site, leaves: quantised(site, leaves, layer.get("quantise")), layer)

    return change


def _mix(amount: Array | None, quantised: Array, latent: Array) -> Array:
    """λ·quantised + (1 - λ)·float: at 0 and at 1 exactly one of them."""
    return quantised if amount is None else amount * quantised + (1.0 - amount) * latent


# ---------------------------------------------------------------------------------------- inputs


def quantise_activations(
    config: BitnetConfig, x: Float[Array, "J *B I"], *, shifted: bool = False
) -> tuple[Float[Array, "J *B I"], Float[Array, "J *#B 1"], Float[Array, "#J *#B 1"]]:
    """(x̃ in float32, integers per unit of x, the minimum of x), so that x ≈ x̃ / per_unit + minimum; the minimum is 0 unless shifted.

    Shifted: x̃ = clip(round((x - η)·Q/γ), 0, Q) with η = min x and γ = max(x - η). The paper's γ = max|x| would saturate.

    Source: arXiv:2310.11453 equations 4 to 6
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    axes = (x.ndim - 1,) if config.activation_scale == "token" else tuple(range(1, x.ndim))
    most = 2 ** (config.activation_bits - 1) - 1
    low = x.min(axes, keepdims=True) if shifted else jnp.zeros((1,) * x.ndim)
    per_unit = most / jnp.maximum(jnp.abs(x - low).max(axes, keepdims=True), FLOOR)
    codes = jnp.clip(jnp.round((x - low) * per_unit), 0 if shifted else -most, most)
    return codes, per_unit, low


def normalises(config: BitnetConfig, site: str) -> bool:
    """Whether a projection normalises its input."""
    return config.norm != "none" and re.fullmatch(config.norm_sites, site) is not None


def normalise(config: BitnetConfig, x: Float[Array, "J *B I"]) -> Float[Array, "J *B I"]:
    """LayerNorm or RMSNorm of each group, in float32, without parameters (SubLN).

    Source: arXiv:2310.11453 equations 11 and 12; arXiv:2210.06423 for where
    """
    if config.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_eps)


def dot(config: BitnetConfig, inner: Dot) -> Dot:
    """`dot` of `decoder`, with `reparam(config)`: normalise, quantise, multiply by `inner`, scale. The head goes to `inner` as it is.

    Args:
      inner: a plain einsum, which is given integers in float32 in place of x and of the kernel. Branches that adapters add go
        outside: `adapters.lora_dot(…, bitnet.dot(config, dot_in(…)), …)`.

    Leaves beside `kernel` that matter: `weight_scale` [J] (from `reparam`, or stored beside int8 kernels; without it the kernel
    is not quantised), `quantise` (λ), and `scale`, a norm's own scale, where a model has one.
    """
    if config.kind == "none":
        return inner

    def hook(site: str, spec: str, x: Array, leaves: Params) -> Array:
        return _bit_linear(config, inner, site, spec, x, leaves) if site in SITES else inner(site, spec, x, leaves)

    return hook


def _by_shard(x: Float[Array, "J B *T"]) -> Float[Array, "J B *T"]:
    """Groups on the axis `model`, rows where they usually are: or the partitioner cuts the gradient of the sum over groups elsewhere."""
    mesh = current_mesh()
    return constrain(x, " ".join(["J@model", "B", *"." * (x.ndim - 2)])) if mesh and x.shape[0] % axis_size(mesh, "model") == 0 else x


def _bit_linear(config: BitnetConfig, inner: Dot, site: str, spec: str, x: Array, leaves: Params) -> Array:
    """One projection. J is 1 for the inputs of q, k, v, gate and up."""
    kernel, scale = leaves["kernel"], leaves.get("weight_scale", jnp.ones((config.num_groups,)))
    if not jnp.issubdtype(kernel.dtype, jnp.integer):  # else these are W̃ already
        kernel = kernel / over_kernel(config, site, scale, kernel.shape)
    features, outputs = kernel.shape[: num_inputs(site)], kernel.shape[num_inputs(site) :]
    groups = config.num_groups if cuts_inputs(site) else 1
    grouped = x.reshape(*x.shape[: x.ndim - len(features)], groups, -1).astype(jnp.float32)
    grouped = jnp.moveaxis(grouped, -2, 0)  # [J *B I]: XLA:CPU takes bf16 products of batches only with the batch first
    if normalises(config, site):
        grouped = normalise(config, grouped)
        if "scale" in leaves:
            grouped = grouped * leaves["scale"].reshape(groups, *(1,) * (grouped.ndim - 2), -1)
    shifted = bool(re.fullmatch(config.shifted_sites, site))
    codes, per_unit, low = quantise_activations(config, grouped, shifted=shifted)
    in_units = (grouped - low) * per_unit
    codes = _straight_through(_mix(leaves.get("quantise"), codes, in_units), in_units)
    flat = kernel.reshape(groups, -1, *outputs)
    offset = per_unit * low  # what every input lacks for having been shifted, in units
    if groups > 1:  # one product for each group, as each has a scale of its own
        y = _by_shard(inner(site, "J...I,JIO->J...O", _by_shard(codes), {"kernel": flat}))
        if shifted:
            y = y + offset * flat.astype(jnp.float32).sum(1).reshape(groups, *(1,) * (y.ndim - 2), -1)
        return (y * (scale.reshape(groups, *(1,) * (y.ndim - 1)) / per_unit)).sum(0)
    y = inner(site, spec, codes[0].reshape(x.shape), {"kernel": kernel})
    each = jnp.broadcast_to(scale[:, None], (scale.size, math.prod(outputs) // scale.size)).reshape(outputs)
    per_unit, offset = (a[0].reshape(*a.shape[1:-1], *(1,) * len(outputs)) for a in (per_unit, offset))
    if shifted:
        y = y + offset * flat[0].astype(jnp.float32).sum(0)
    return y * (each / per_unit)


# ------------------------------------------------------------------------------------ whole models


def with_amount(params: Params, amount: Float[Array, ""] | float) -> Params:
    """Params whose layers are quantised to the share λ = `amount` (of weights and inputs): the leaf `layers/quantise` [L] is set."""
    layers = params["layers"]
    depth = jax.tree.leaves(layers)[0].shape[0]
    return {**params, "layers": {**layers, "quantise": jnp.broadcast_to(jnp.asarray(amount, jnp.float32), (depth,))}}


def amount(config: BitnetConfig, step: Array | int) -> Float[Array, ""]:
    """λ at a step counted from 0: step / warm_start_steps up to 1; always 1 without a warm start.

    >>> [float(amount(BitnetConfig("b158", warm_start_steps=4), step)) for step in (0, 3, 9)]
    [0.0, 0.75, 1.0]
    """
    return jnp.clip(jnp.asarray(step, jnp.float32) / config.warm_start_steps, 0.0, 1.0) if config.warm_start_steps else jnp.ones(())


def check(model: ModelConfig, config: BitnetConfig) -> None:
    """Refuse a pair that would train, but not as meant.

    Raises:
      ConfigError: groups that do not divide a projection's dimension; an input that block and projection would both normalise.
    """
    if config.kind == "none":
        return
    for site, shape in kernel_shapes(model).items():
        group_shape(config, site, shape)
        twice = model.norm_placement in ("before", "both") and not site.endswith(("/o", "/down"))
        if twice and normalises(config, site) and not config.norm_scale:  # others' checkpoints do so, each norm with its own scale
            raise ConfigError(
                f"the input of {site} would be normalised twice: by the block (model.norm_placement '{model.norm_placement}') and by "
                f"bitnet.norm '{config.norm}'; set bitnet.norm_sites to '.*/(o|down)', or model.norm_placement to one without a norm there"
            )


def kernel_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Site -> shape of its kernel in one layer, for every projection of a model.

    >>> kernel_shapes(ModelConfig())['attention/o']
    (4, 16, 64)
    """
    c = model
    shapes: dict[str, tuple[int, ...]] = {}
    for branch in ("attention", "cross_attention") if c.cross_attention else ("attention",):
        source = (c.memory_width or c.width) if branch == "cross_attention" else c.width
        shapes[f"{branch}/q"] = (c.width, c.num_heads, c.head_size)
        shapes[f"{branch}/k"] = shapes[f"{branch}/v"] = (source, c.num_kv_heads, c.head_size)
        shapes[f"{branch}/o"] = (c.num_heads, c.head_size, c.width)
    if c.gated:
        shapes["mlp/gate"] = (c.width, c.ff_width)
    return shapes | {"mlp/up": (c.width, c.ff_width), "mlp/down": (c.ff_width, c.width)}


def norm_scales(model: ModelConfig, config: BitnetConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape [L, the kernel's inputs] of the scales that the norms inside have.

    >>> norm_scales(ModelConfig(num_layers=2), BitnetConfig("b158", norm="rms", norm_sites=".*/o", norm_scale=True))
    {'layers/attention/o/scale': (2, 4, 16)}
    """
    if not config.norm_scale:
        return {}
    sites = {site: shape for site, shape in kernel_shapes(model).items() if normalises(config, site)}
    return {f"layers/{site}/scale": (model.num_layers, *shape[: num_inputs(site)]) for site, shape in sites.items()}


def with_norm_scales(lm: LM, config: BitnetConfig) -> LM:
    """`lm`, which was built with `dot`, with `norm_scales` in its params, all of them 1 at the start."""

    def init(key: Array) -> Params:
        ones = [(path, jnp.ones(shape)) for path, shape in norm_scales(lm.config, config).items()]
        return tree.merge(lm.init(key), tree.from_items(ones))

    return lm._replace(init=init)


def map_layers(f: Callable[[str, Params], Params], layers: Params) -> Params:
    """`map_projections` of every layer of a stack."""
    return jax.jit(jax.vmap(lambda layer: map_projections(f, layer)))(layers)


def change_layers(f: Callable[[str, Params], Params], params: Params) -> Params:
    """Params with `f(site, leaves of one layer)` in place of each projection's leaves, in every layer.

    Raises:
      ConfigError: params without the stacked layers of a decoder, or without a float kernel among them.
    """
    layers: Any = params.get("layers")
    kernels = [leaf for path, leaf in tree.items(layers if isinstance(layers, dict) else {}) if path.removesuffix("/kernel") in SITES]
    if not kernels:
        raise ConfigError(f"these params have no projections to quantise: expected layers/attention/q/kernel and the like, given "
                          f"{', '.join(tree.paths(params)[:4]) or 'nothing'}")  # fmt: skip
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in kernels):
        raise ConfigError("these params are quantised already: their kernels are integers; give the latent float ones")
    return {**params, "layers": map_layers(f, layers)}


def quantise(params: Params, config: BitnetConfig) -> Params:
    """Latent params as those of inference: kernels become W̃ in int8, with β beside them as `weight_scale` [L J].

    They run as they are in the model that was trained, without `reparam` too; `bitnet_packed.pack` makes them small.

    Raises:
      ConfigError: nothing to quantise (kind 'none' too), or quantised already.
    """
    if config.kind == "none":
        raise ConfigError("bitnet.kind is 'none', which quantises nothing; choose b1 or b158")

    def change(site: str, leaves: Params) -> Params:
        codes, scale = quantise_weights(config, site, leaves["kernel"])
        return {**leaves, "kernel": codes.astype(jnp.int8), "weight_scale": scale}

    return change_layers(change, params)


def latents(params: Params, config: BitnetConfig) -> Params:
    """Float params whose `quantise` is `params`: to train on from, or to run where quantised ones came without their latents.

    W = β·W̃ / s, with s the share of W̃ that is not 0: then mean |W| is β, and W/β rounds to W̃ again.
    """

    def change(site: str, leaves: Params) -> Params:
        codes = leaves["kernel"].astype(jnp.float32)
        shape, others = group_shape(config, site, codes.shape)
        share = jnp.abs(codes).reshape(shape).mean(others)
        scale = leaves["weight_scale"] / jnp.where(share == 0, 1.0, share)
        kept = {name: leaf for name, leaf in leaves.items() if name != "weight_scale"}
        return {**kept, "kernel": codes * over_kernel(config, site, scale, codes.shape)}

    return {**params, "layers": map_layers(change, params["layers"])}


def round_to_bits(params: Params, bits: int) -> Params:
    """A float model after training, its projections rounded to `bits` with one scale each (absmax), and back in float32.

    bits ≥ 2: Ŵ = round(W·Q/γ)·γ/Q, γ = max|W|, Q = 2^(bits-1) - 1.  1 bit: Ŵ = sign(W - α)·β as b1 has it, as absmax leaves no code.
    """
    if not 1 <= bits <= 16:
        raise ConfigError(f"rounding to {bits} bits; choose 1 to 16")

    def change(site: str, leaves: Params) -> Params:
        kernel = leaves["kernel"].astype(jnp.float32)
        if bits == 1:
            codes, scale = quantise_weights(BitnetConfig("b1"), site, kernel)
            return {**leaves, "kernel": codes * scale}
        most = 2 ** (bits - 1) - 1
        per_unit = most / jnp.maximum(jnp.abs(kernel).max(), FLOOR)
        return {**leaves, "kernel": jnp.round(kernel * per_unit) / per_unit}

    return change_layers(change, params)
