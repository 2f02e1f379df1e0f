"""BitNet's training forward and backward pass: every line of the card's "What must be testable" that is not about packing or energy.

The reference is the papers' equations in NumPy float64, on matrices [inputs, outputs].
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import sharding, tree
from jaxllm.config import BitnetConfig, ConfigError, MeshConfig, ModelConfig
from jaxllm.contract import dot_in
from jaxllm.models.transformer import decoder
from jaxllm.surgery import bitnet
from tests.hlo import collectives, select


def label(value: Any) -> str:
    """A config as what differs from the default one."""
    plain = BitnetConfig()
    changed = [str(v) for name, v in vars(value).items() if v != getattr(plain, name)] if isinstance(value, BitnetConfig) else [str(value)]
    return " ".join(changed)


B1 = BitnetConfig("b1", norm="layer", activation_scale="tensor")
B158 = BitnetConfig("b158", norm="rms")
KINDS = pytest.mark.parametrize("config", [B1, B158], ids=["b1", "b158"])

SITES = {
    "attention/q": ("BTD,DNH->BTNH", (2, 5, 12), (12, 4, 6)),
    "attention/o": ("BTNH,NHD->BTD", (2, 5, 4, 6), (4, 6, 12)),
    "mlp/up": ("BTD,DF->BTF", (2, 5, 12), (12, 16)),
    "mlp/down": ("BTF,FD->BTD", (2, 5, 16), (16, 12)),
}
"""Projection -> its einsum, a shape of x, a shape of the kernel."""


def arrays(site: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    _, x, kernel = SITES[site]
    rng = np.random.default_rng(seed)
    return rng.normal(1.0, 3.0, x).astype(np.float32), rng.normal(0.1, 0.4, kernel).astype(np.float32)


FLOAT32, BFLOAT16 = dot_in("float32"), dot_in("bfloat16")


@partial(jax.jit, static_argnums=(0, 1), static_argnames="inner")
def run(config: BitnetConfig, site: str, x: Any, kernel: Any, inner: Any = FLOAT32, **leaves: Any) -> jax.Array:
    """One projection as the decoder calls it: reparam, then dot."""
    branch, name = site.split("/")
    layer = bitnet.reparam(config)(
        {branch: {name: {"kernel": kernel, **leaves}}, **{"quantise": share for name, share in leaves.items() if name == "quantise"}}
    )
    return bitnet.dot(config, inner)(site, SITES[site][0], jnp.asarray(x), layer[branch][name])


# ----------------------------------------------------------------------------------- the reference


def ref_weights(config: BitnetConfig, w: np.ndarray) -> tuple[np.ndarray, float]:
    scale = np.abs(w).mean()
    return (np.where(w - w.mean() > 0, 1, -1) if config.kind == "b1" else np.clip(np.round(w / scale), -1, 1)), scale


def ref_inputs(config: BitnetConfig, x: np.ndarray, shifted: bool) -> np.ndarray:
    """Dequantised [rows, inputs]."""
    if config.norm == "layer":
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + config.norm_eps)
    if config.norm == "rms":
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + config.norm_eps)
    axis = 1 if config.activation_scale == "token" else (0, 1)
    low = x.min(axis, keepdims=True) if shifted else np.zeros((1, 1))
    top = np.abs(x - low).max(axis, keepdims=True)
    levels = 2 ** (config.activation_bits - 1) - 1
    return np.clip(np.round((x - low) * levels / top), 0 if shifted else -levels, levels) * top / levels + low


def ref_projection(config: BitnetConfig, site: str, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    num_inputs = 2 if site.endswith("/o") else 1
    outputs = kernel.shape[num_inputs:]
    w = kernel.reshape(-1, int(np.prod(outputs))).astype(np.float64)
    rows = x.reshape(-1, w.shape[0]).astype(np.float64)
    shifted = site == config.shifted_sites
    if site.endswith(("/o", "/down")):  # groups of inputs, and of the inputs' weights
        y = 0.0
        for part, own in zip(np.split(rows, config.num_groups, 1), np.split(w, config.num_groups, 0), strict=True):
            codes, scale = ref_weights(config, own)
            y = y + ref_inputs(config, part, shifted) @ codes * scale
    else:  # groups of outputs
        quantised = ref_inputs(config, rows, shifted)
        parts = [ref_weights(config, own) for own in np.split(w, config.num_groups, 1)]
        y = np.concatenate([quantised @ codes * scale for codes, scale in parts], 1)
    return np.asarray(y).reshape(*x.shape[: x.ndim - num_inputs], *outputs)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    "config",
    [B1, B158, BitnetConfig("b158"), replace(B1, num_groups=4), replace(B158, num_groups=2), replace(B158, activation_bits=4),
     replace(B1, activation_scale="token", shifted_sites="mlp/up"), replace(B158, shifted_sites="mlp/down", num_groups=2),
     replace(B1, shifted_sites="mlp/down", num_groups=4)],
    ids=label,
)  # fmt: skip
def test_a_projection_is_the_papers(config: BitnetConfig, site: str):
    x, kernel = arrays(site)
    want = ref_projection(config, site, x, kernel)
    np.testing.assert_allclose(run(config, site, x, kernel), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_the_norm_is_where_the_config_says():
    x, kernel = arrays("attention/q")
    config = replace(B158, norm_sites=".*/(o|down)")
    np.testing.assert_array_equal(run(config, "attention/q", x, kernel), run(replace(B158, norm="none"), "attention/q", x, kernel))
    x, kernel = arrays("attention/o")
    np.testing.assert_array_equal(run(config, "attention/o", x, kernel), run(B158, "attention/o", x, kernel))


def test_a_norms_own_scale_multiplies_its_output():
    x, kernel = arrays("attention/o")
    scale, config = np.linspace(0.5, 2.0, 24, dtype=np.float32).reshape(4, 6), replace(B158, num_groups=2)
    parts = x.reshape(2, 5, 2, 12)
    normed = (parts / np.sqrt((parts**2).mean(-1, keepdims=True) + config.norm_eps)).reshape(x.shape) * scale
    ours = run(config, "attention/o", x, kernel, scale=scale)
    np.testing.assert_allclose(ours, run(replace(config, norm="none"), "attention/o", normed, kernel), rtol=1e-5, atol=1e-4)


# -------------------------------------------------------------------------------------- the card's


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("site", SITES)
@KINDS
def test_1_weights_take_exactly_two_or_three_values(config: BitnetConfig, site: str, groups: int):
    config, kernel = replace(config, num_groups=groups), arrays(site)[1]
    branch, name = site.split("/")
    leaves = bitnet.reparam(config)({branch: {name: {"kernel": jnp.asarray(kernel)}}})[branch][name]
    num_inputs = 2 if site.endswith("/o") else 1
    matrix = np.asarray(leaves["kernel"]).reshape(-1, int(np.prod(kernel.shape[num_inputs:])))
    parts = np.split(matrix, groups, 0 if site.endswith(("/o", "/down")) else 1)
    latent = np.split(kernel.reshape(matrix.shape), groups, 0 if site.endswith(("/o", "/down")) else 1)
    for part, own, scale in zip(parts, latent, np.asarray(leaves["weight_scale"]), strict=True):
        assert set(np.unique(part)) == ({-scale, scale} if config.kind == "b1" else {-scale, 0.0, scale})
        assert scale == pytest.approx(np.abs(own).mean(), rel=1e-6)


@given(st.floats(-6, 6), st.sampled_from(list(SITES)), st.sampled_from([B1, B158, BitnetConfig("b158"), replace(B1, num_groups=2)]))
@settings(max_examples=25, deadline=None)
def test_2_scaling_the_weights_scales_the_output_and_scaling_the_input_does_not(exponent: float, site: str, config: BitnetConfig):
    (x, kernel), factor = arrays(site), np.float32(2.0**exponent)
    y = run(config, site, x, kernel)
    np.testing.assert_allclose(run(config, site, x, kernel * factor), y * factor, rtol=2e-5, atol=1e-5 * factor * np.abs(y).max())
    power = np.float32(2.0 ** round(exponent))  # exact, so that no value crosses to another code on the way
    exact = replace(config, norm_eps=0.0)
    scaled, y = run(exact, site, x * power, kernel), run(exact, site, x, kernel)
    np.testing.assert_allclose(scaled, y * (power if config.norm == "none" else 1.0), rtol=2e-5, atol=1e-5 * np.abs(scaled).max())


def test_2_the_norms_eps_bounds_what_scaling_the_input_does():
    x, kernel = arrays("mlp/up")
    y = run(B158, "mlp/up", x, kernel)
    np.testing.assert_allclose(run(B158, "mlp/up", x * 1000, kernel), y, rtol=1e-3, atol=1e-2 * np.abs(y).max())


@given(st.integers(-64, 64))
@settings(max_examples=15, deadline=None)
def test_3_adding_a_constant_changes_beta_and_no_sign(steps: int):
    kernel = np.random.default_rng(1).permutation(192).astype(np.float32).reshape(12, 16) / 64  # a grid: all sums are exact
    codes, scale = bitnet.quantise_weights(B1, "mlp/up", jnp.asarray(kernel))
    moved, other = bitnet.quantise_weights(B1, "mlp/up", jnp.asarray(kernel + np.float32(steps / 64)))
    np.testing.assert_array_equal(codes, moved)
    assert abs(codes.sum()) <= 1, "centred: as many of either sign"
    assert float(other[0]) == pytest.approx(np.abs(kernel + steps / 64).mean(), rel=1e-6)
    assert steps == 0 or float(other[0]) != float(scale[0])


def test_3_zero_has_the_sign_minus():
    codes, _ = bitnet.quantise_weights(B1, "mlp/up", jnp.array([[-1.0, 0.0, 1.0]]))
    assert codes.tolist() == [[-1.0, -1.0, 1.0]]


@given(st.integers(0, 10**6), st.sampled_from(["token", "tensor"]), st.booleans(), st.sampled_from([8, 4, 2]))
@settings(max_examples=25, deadline=None)
def test_4_inputs_become_integers_within_half_a_step(seed: int, scale: Any, shifted: bool, bits: int):
    x = np.random.default_rng(seed).normal(0.3, 1.0, (2, 3, 4, 7)).astype(np.float32)
    config = BitnetConfig("b158", activation_scale=scale, activation_bits=bits)
    codes, per_unit, low = map(np.asarray, bitnet.quantise_activations(config, jnp.asarray(x), shifted=shifted))
    most = 2 ** (bits - 1) - 1
    assert (codes == np.round(codes)).all() and codes.max() <= most and codes.min() >= (0 if shifted else -most)
    assert (np.abs(codes).max((1, 2, 3) if scale == "tensor" else 3) == most).all(), "the largest input takes the largest integer"
    assert per_unit.shape == ((2, 1, 1, 1) if scale == "tensor" else (2, 3, 4, 1))
    assert (np.abs(codes / per_unit + low - x) <= 0.5 / per_unit + 1e-6).all()


def test_4_a_token_alone_is_as_in_its_row_unless_the_scale_is_the_tensors():
    x, kernel = arrays("mlp/up")
    for scale, same in (("token", True), ("tensor", False)):
        config = replace(B158, activation_scale=scale)
        alone, row = run(config, "mlp/up", x[:, :1], kernel), run(config, "mlp/up", x, kernel)[:, :1]
        assert (np.abs(alone - row).max() < 1e-6) == same


@pytest.mark.parametrize("site, config", [
    ("attention/q", BitnetConfig("b1", activation_scale="tensor")), ("attention/o", BitnetConfig("b158", num_groups=2)),
    ("mlp/up", BitnetConfig("b158", shifted_sites=".*")), ("mlp/down", BitnetConfig("b1", num_groups=4, shifted_sites=".*")),
], ids=label)  # fmt: skip
def test_6_gradients_pass_the_rounding_unchanged(site: str, config: BitnetConfig):
    """As of the same product with quantised operands that are leaves of their own."""
    x, kernel = map(jnp.asarray, arrays(site))
    spec, (branch, name) = SITES[site][0], site.split("/")
    weigh = lambda y: (y.ravel() * jnp.cos(jnp.arange(y.size))).sum()
    quantised = bitnet.reparam(config)({branch: {name: {"kernel": kernel}}})[branch][name]["kernel"]
    groups = config.num_groups if bitnet.cuts_inputs(site) else 1
    codes, per_unit, low = bitnet.quantise_activations(
        config, jnp.moveaxis(x.reshape(2, 5, groups, -1), 2, 0), shifted=bool(config.shifted_sites)
    )
    dequantised = jnp.moveaxis(codes / per_unit + low, 0, 2).reshape(x.shape)
    ours = jax.grad(lambda x, kernel: weigh(run(config, site, x, kernel)), (0, 1))(x, kernel)
    theirs = jax.grad(lambda x, kernel: weigh(jnp.einsum(spec, x, kernel)), (0, 1))(dequantised, quantised)
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=2e-4, atol=2e-5 * float(jnp.abs(expected).max()))
        assert (np.abs(mine) > 0).mean() > 0.99


def test_6_the_norm_is_differentiated_through():
    x, kernel = arrays("mlp/up")
    gradient = jax.grad(lambda x: (run(B158, "mlp/up", x, kernel) ** 2).sum())(jnp.asarray(x))
    along = np.einsum("btd,btd->bt", x, gradient)
    assert np.abs(along).max() < 1e-3 * np.abs(x * gradient).max(), "scaling a token changes nothing"


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("config", [B1, B158, replace(B158, activation_scale="tensor")], ids=label)
@pytest.mark.parametrize("site", SITES)
def test_7_groups_computed_apart_are_the_grouped_result(config: BitnetConfig, site: str, groups: int):
    """Each shard has its part of the kernel (and of x, where the kernel is cut along inputs) and knows of no groups."""
    x, kernel = arrays(site)
    whole = np.asarray(run(replace(config, num_groups=groups), site, x, kernel))
    axis = {"attention/q": 1, "mlp/up": 1, "attention/o": 0, "mlp/down": 0}[site]
    kernels = np.split(kernel, groups, axis)
    if axis == 0:
        parts = [run(config, site, own, part) for own, part in zip(np.split(x, groups, 2), kernels, strict=True)]
        np.testing.assert_allclose(np.sum(parts, 0), whole, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_allclose(np.concatenate([run(config, site, x, part) for part in kernels], 2), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config, share", [(B1, 2 / np.pi), (B158, 0.44)], ids=["b1", "b158"])
@pytest.mark.parametrize("size", [0.1, 1.0, 100.0])
def test_8_the_output_has_about_unit_variance(config: BitnetConfig, share: float, size: float):
    """n·β²·E[x̃²] with β = √(2/π)·σ for normal weights: 2/π; ternary weights are 0 in 31 of 100 places. The paper's 1 is for |W| = σ."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(0, 512**-0.5, (512, 256)).astype(np.float32)
    y = run(config, "mlp/up", size * rng.normal(0, 1, (4, 32, 512)).astype(np.float32), kernel)
    assert float(jnp.var(y)) == pytest.approx(share, rel=0.06)


@KINDS
def test_12_zeros_give_finite_output_and_gradients(config: BitnetConfig):
    for site, chosen in (("attention/q", config), ("mlp/down", replace(config, norm="none", shifted_sites=".*", num_groups=2))):
        x, kernel = arrays(site)
        f = jax.jit(jax.value_and_grad(lambda x, k: run(chosen, site, x, k).sum(), (0, 1)))
        for inputs, weights in ((x, 0 * kernel), (0 * x, kernel), (0 * x, 0 * kernel)):
            value, gradients = f(inputs, weights)
            assert all(np.isfinite(a).all() for a in jax.tree.leaves((value, gradients)))
            assert abs(value) < 0.1, "the least scale is 1e-5"


def test_bfloat16_operands_change_nothing_as_they_hold_the_integers_exactly():
    for site, config in (("attention/q", B1), ("mlp/down", B158), ("attention/o", replace(B158, num_groups=2))):
        x, kernel = arrays(site)
        np.testing.assert_allclose(run(config, site, x, kernel, inner=BFLOAT16), run(config, site, x, kernel), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------- whole models

MODEL = ModelConfig(
    num_layers=2, width=32, num_heads=4, num_kv_heads=4, head_size=8, ff_width=64, vocab_size=64, max_length=64, tied_embeddings=False
)
SUB = {"norm_sites": ".*/(o|down)"}
"""With norms before attention and mlp in the block."""


def lm_of(config: BitnetConfig, model: ModelConfig = MODEL) -> Any:
    bitnet.check(model, config)
    return decoder(model, dot=bitnet.dot(config, dot_in("float32")), reparam=bitnet.reparam(config))


@cache
def logits(config: BitnetConfig) -> Any:
    """params -> logits."""
    lm, tokens = lm_of(config), jnp.arange(24).reshape(2, 12) * 7 % 61
    return jax.jit(lambda params: lm.unembed(params).logits(lm.apply(params, tokens).hidden))


@cache
def start() -> Any:
    return decoder(MODEL).init(jax.random.key(0))


@KINDS
def test_11_embeddings_head_and_norms_are_not_quantised(config: BitnetConfig):
    params, seen = start(), {}
    config = replace(config, **SUB)
    init = jax.eval_shape(lm_of(config).init, jax.random.key(0))
    assert tree.structure_diff(jax.eval_shape(lambda: params), init) == [], "the same parameters, as many"
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    changed = jax.jit(bitnet.reparam(config))(layer)
    for path, leaf in tree.items(layer):
        assert np.array_equal(tree.get(changed, path), leaf) == (not path.endswith("kernel")), path

    def spy(name: str, spec: str, x: Any, leaves: Any) -> Any:
        seen[name] = (x, leaves["kernel"])
        return dot_in("float32")(name, spec, x, leaves)

    kernel = params["unembed"]["kernel"]
    hidden = jax.random.normal(jax.random.key(1), (2, 3, 32))
    head = bitnet.dot(config, spy)("unembed", "...D,VD->...V", hidden, {"kernel": kernel})
    assert seen["unembed"][0] is hidden and seen["unembed"][1] is kernel
    np.testing.assert_array_equal(head, dot_in("float32")("unembed", "...D,VD->...V", hidden, {"kernel": kernel}))


def test_none_is_the_float_model():
    params = start()
    inner = dot_in("float32")
    assert bitnet.dot(BitnetConfig(), inner) is inner and bitnet.reparam(BitnetConfig())(params["layers"]) is params["layers"]


def test_a_warm_start_goes_from_the_float_model_to_the_quantised_one():
    params, config = start(), replace(B1, norm="none")
    plain, quantised = logits(BitnetConfig())(params), logits(config)(params)
    zero, half, one = (logits(config)(bitnet.with_amount(params, share)) for share in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(zero, plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one, quantised, rtol=1e-6, atol=1e-6)
    assert np.abs(half - plain).max() > 1e-2 and np.abs(half - quantised).max() > 1e-2
    assert tree.get(bitnet.with_amount(params, 0.5), "layers/quantise").shape == (2,)
    assert [float(bitnet.amount(replace(config, warm_start_steps=8), step)) for step in (0, 2, 8, 99)] == [0.0, 0.25, 1.0, 1.0]


def test_a_mixture_is_of_weights_and_inputs_and_passes_no_gradient_to_its_share():
    x, kernel = map(jnp.asarray, arrays("mlp/up"))
    config, share = BitnetConfig("b158"), jnp.float32(0.25)
    codes, scale = bitnet.quantise_weights(config, "mlp/up", kernel)
    rounded, per_unit, _ = bitnet.quantise_activations(config, x[None])
    want = (0.25 * (rounded / per_unit)[0] + 0.75 * x) @ (0.25 * codes * scale + 0.75 * kernel)
    np.testing.assert_allclose(run(config, "mlp/up", x, kernel, quantise=share), want, rtol=1e-5, atol=1e-5)
    assert float(jax.grad(lambda share: run(config, "mlp/up", x, kernel, quantise=share).sum())(share)) == 0.0


@pytest.mark.parametrize("config", [replace(B1, **SUB), replace(B158, **SUB)], ids=["b1", "b158"])
def test_a_tiny_decoder_learns(config: BitnetConfig):
    lm, optimizer = lm_of(config), optax.adam(1e-2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 16)))

    def loss(params: Any) -> Any:
        out = lm.unembed(params).logits(lm.apply(params, tokens[:, :-1]).hidden)
        return optax.softmax_cross_entropy_with_integer_labels(out, tokens[:, 1:]).mean()

    @jax.jit
    def thirty_steps(params: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=30)

    (params, _), losses = thirty_steps(start())
    assert float(losses[0]) == pytest.approx(np.log(64), abs=0.2)
    assert float(losses[-1]) < 1.5, losses
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, start())
    assert min(jax.tree.leaves(moved)) > 1e-3, "every leaf is trained"
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_a_float_model_rounded_after_training(bits: int):
    params = start()
    rounded = bitnet.round_to_bits(params, bits)
    for path, leaf in tree.items(params):
        ours = np.asarray(tree.get(rounded, path))
        if not (path.startswith("layers/") and path.endswith("/kernel")):
            np.testing.assert_array_equal(ours, leaf, err_msg=path)
            continue
        for own, layer in zip(ours, np.asarray(leaf), strict=True):
            if bits == 1:
                assert np.unique(np.abs(own)).size == 1 and np.abs(own).max() == pytest.approx(np.abs(layer).mean(), rel=1e-5)
            else:
                step = np.abs(layer).max() / (2 ** (bits - 1) - 1)
                assert np.abs(own - layer).max() <= step * 0.5001 and np.unique(own).size <= 2**bits - 1
                np.testing.assert_allclose(own / step, np.round(own / step), atol=1e-3)


# ------------------------------------------------------------------------------------------- meshes

MESH = MeshConfig(data=2, model=4)


def layer_loss(config: BitnetConfig, params: Any, x: Any) -> Any:
    """A column-cut and a row-cut projection, as the decoder lays them out."""
    leaves, dot = bitnet.reparam(config)(params), bitnet.dot(config, dot_in("float32"))
    hidden = sharding.constrain(dot("mlp/up", "BTD,DF->BTF", sharding.constrain(x, "B . ."), leaves["mlp"]["up"]), "B . F")
    out = dot("mlp/down", "BTF,FD->BTD", jnp.tanh(hidden), leaves["mlp"]["down"])
    return jnp.sin(sharding.constrain(out, "B . D")).sum()


@cache
def on_mesh(config: BitnetConfig, sizes: MeshConfig | None) -> tuple[Any, Counter[Any]]:
    """(loss, gradients) and how often what is communicated over `model`."""
    rng = np.random.default_rng(0)
    params = {"mlp": {"up": {"kernel": rng.normal(0, 0.2, (32, 64))}, "down": {"kernel": rng.normal(0, 0.2, (64, 32))}}}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    x = jnp.asarray(rng.normal(0, 1, (4, 8, 32)), jnp.float32)
    f = jax.jit(jax.value_and_grad(partial(layer_loss, config), argnums=0))
    if sizes is None:
        return jax.tree.map(np.asarray, f(params, x)), Counter()
    mesh = sharding.make_mesh(sizes)
    with jax.set_mesh(mesh):
        stacked = {"layers": jax.tree.map(lambda leaf: leaf[None], params)}
        specs = jax.tree.map(lambda spec: jax.sharding.PartitionSpec(*spec[1:]), sharding.param_specs(stacked, mesh)["layers"],
                             is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec))  # fmt: skip
        placed = jax.device_put(params, sharding.shardings(specs, mesh)), jax.device_put(x, sharding.batch_sharding(mesh))
        program = f.lower(*placed).compile()
        found = select(collectives(program.as_text(), mesh.shape), axis="model")
        seen = Counter((c.op, tuple(sorted(int(np.prod(a.shape)) for a in c.operands))) for c in found)
        return jax.tree.map(np.asarray, program(*placed)), seen


@pytest.mark.parametrize("config", [replace(B1, num_groups=4), replace(B158, num_groups=4, norm="rms")], ids=["b1", "b158"])
def test_7_as_many_groups_as_shards_communicate_no_statistic(config: BitnetConfig):
    """Over `model` the program says what the float one says, backward pass included, and the numbers are those of one device."""
    many, said = on_mesh(config, MESH)
    assert said == on_mesh(BitnetConfig(), MESH)[1] and said
    for ours, one in zip(jax.tree.leaves(many), jax.tree.leaves(on_mesh(config, None)[0]), strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-4)


def test_7_one_group_over_several_shards_does_communicate():
    """Or the test above would read nothing."""
    more = on_mesh(B158, MESH)[1] - on_mesh(BitnetConfig(), MESH)[1]
    assert sum(more.values()) >= 2, "the kernels' scales, and the inputs' of the row-cut projection"


def test_7_shards_under_shard_map_communicate_their_sum_only():
    """Each shard runs the projection on what it holds as if there were no groups; the sum over shards is the grouped result."""
    mesh, shard = sharding.make_mesh(MeshConfig(model=4)), jax.sharding.PartitionSpec
    x, kernel = map(jnp.asarray, arrays("mlp/down"))
    local = lambda x, kernel: jax.lax.psum(run(B1, "mlp/down", x, kernel), "model")
    specs = shard(None, None, "model"), shard("model", None)
    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=shard())).lower(x, kernel).compile()
    found = collectives(program.as_text(), mesh.shape)
    assert [(c.op, c.largest) for c in found] == [("all-reduce", 2 * 5 * 12)]
    np.testing.assert_allclose(program(x, kernel), run(replace(B1, num_groups=4), "mlp/down", x, kernel), rtol=1e-5, atol=1e-5)


def test_7_a_sharded_decoder_is_the_decoder():
    config = replace(B1, num_groups=4, **SUB)
    lm, params, tokens = lm_of(config), start(), jnp.arange(48).reshape(4, 12) * 7 % 61
    run = jax.jit(lambda params, tokens: lm.apply(params, tokens).hidden)
    one, mesh = np.asarray(run(params, tokens)), sharding.make_mesh(MESH)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(sharding.param_specs(params, mesh), mesh))
        many = np.asarray(run(placed, jax.device_put(tokens, sharding.batch_sharding(mesh))))
    np.testing.assert_allclose(many, one, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_groups": 3}, r"num_groups is 3, which does not divide the 32 outputs of attention/q; choose 2 or 4"),
        ({"num_groups": 64}, r"64, which does not divide the 32 outputs of attention/q; choose 32"),
        ({"norm": "rms"}, r"the input of attention/q would be normalised twice.*set bitnet.norm_sites to '\.\*/\(o\|down\)'"),
        ({"norm": "rms", "norm_sites": "mlp/.*"}, r"the input of mlp/gate would be normalised twice"),
    ],
)
def test_a_model_and_a_config_that_do_not_go_together_are_refused(config: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        bitnet.check(MODEL, BitnetConfig("b158", **config))


def test_groups_that_do_not_divide_are_named_when_the_model_runs_too():
    with pytest.raises(ConfigError, match=r"num_groups is 5, which does not divide the 16 inputs of mlp/down; choose 4 or 8"):
        run(BitnetConfig("b158", num_groups=5), "mlp/down", *arrays("mlp/down"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "b159"}, r"bitnet.kind is 'b159'; choose one of none, b1, b158; did you mean 'b158'"),
        ({"norm": "batch"}, r"bitnet.norm is 'batch'; choose one of none, layer, rms"),
        ({"num_groups": 0}, r"bitnet.num_groups is 0"),
        ({"activation_bits": 9}, r"bitnet.activation_bits is 9; integers of 2 to 8 bits"),
        ({"warm_start_steps": -1}, r"bitnet.warm_start_steps is -1"),
        ({"norm_sites": "mlp/out"}, r"bitnet.norm_sites 'mlp/out' matches no projection; projections are attention/q"),
        ({"shifted_sites": "("}, r"bitnet.shifted_sites '\(' is not a regular expression"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        BitnetConfig(**fields)


def test_params_without_projections_are_refused():
    for params in ({}, {"embed": {"tokens": jnp.zeros((3, 2))}}, {"layers": {"mlp_norm": {"scale": jnp.zeros((2, 3))}}}):
        with pytest.raises(ConfigError, match="no projections to quantise"):
            bitnet.quantise(params, B158)
    once = bitnet.quantise(start(), B158)
    with pytest.raises(ConfigError, match="quantised already"):
        bitnet.quantise(once, B158)
    with pytest.raises(ConfigError, match=r"bitnet.kind is 'none'"):
        bitnet.quantise(start(), BitnetConfig())
    with pytest.raises(ConfigError, match="rounding to 0 bits"):
        bitnet.round_to_bits(start(), 0)
