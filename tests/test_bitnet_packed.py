"""BitNet for inference: packing, integer products, sizes, Hugging Face's layout, and the energy and scaling arithmetic.

Items 5, 9 and 10 of the card's "What must be testable"; the others are in test_bitnet.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxllm import pretrain, pretrained, sharding, tree
from jaxllm.config import BitnetConfig, ConfigError, MeshConfig, ModelConfig, TrainConfig
from jaxllm.contract import dot_in
from jaxllm.interop import bitnet as packed_folders
from jaxllm.models.transformer import decoder
from jaxllm.surgery import bitnet, bitnet_packed
from jaxllm.surgery.bitnet_packed import BASE3, SIGNS, TERNARY, Format
from jaxllm.surgery.energy import energy, fit_scaling
from tools import convert

pytestmark = pytest.mark.whole  # compiles much: `make faults` runs them

MODEL = ModelConfig(num_layers=2, width=36, num_heads=4, num_kv_heads=2, head_size=6, ff_width=44, vocab_size=61, max_length=64)
"""No dimension is a multiple of 5 or of 8."""
SUB = {"norm": "rms", "norm_sites": ".*/(o|down)", "norm_eps": MODEL.norm_eps}
B1 = BitnetConfig("b1", norm="layer", norm_sites=".*/(o|down)")
B158 = BitnetConfig("b158", **SUB)  # type: ignore[arg-type]
CONFIGS = {
    "b1": replace(B1, activation_scale="tensor"), "b1 groups": replace(B1, num_groups=4), "b158": B158,
    "b158 base3 groups": replace(B158, packing="base3", num_groups=2, shifted_sites="mlp/(gate|down)"),
}  # fmt: skip


# ----------------------------------------------------------------------------------------- packing


def values_of(how: Format, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice([-1, 1] if how is SIGNS else [-1, 0, 1], shape).astype(np.int8)


@cache
def both_ways(how: Format) -> Any:
    """values [17 2] -> (packed, unpacked) for their first 1, 2, … 17, along the first dimension and along the second."""

    def one(values: Any, axis: int) -> Any:
        packed = bitnet_packed.pack_values(values, how, axis)
        return packed, bitnet_packed.unpack_values(packed, how, values.shape[axis], axis)

    return jax.jit(lambda values: [(one(values[:n], 0), one(values[:n].T, 1)) for n in range(1, 18)])


@given(st.sampled_from([SIGNS, TERNARY, BASE3]), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_9_unpacking_undoes_packing_for_every_length(how: Format, seed: int):
    values = values_of(how, (17, 2), seed)
    for n, ((packed, unpacked), (across, back)) in enumerate(both_ways(how)(values), start=1):
        assert packed.dtype == jnp.uint8 and unpacked.dtype == jnp.int8
        assert packed.shape == (-(-n // {SIGNS: 8, TERNARY: 4, BASE3: 5}[how]), 2), n
        np.testing.assert_array_equal(unpacked, values[:n])
        np.testing.assert_array_equal(back, values[:n].T)
        np.testing.assert_array_equal(across, packed.T)


@pytest.mark.parametrize("how, base, per_byte", [(SIGNS, 2, 8), (TERNARY, 4, 4), (BASE3, 3, 5)])
def test_9_bytes_are_as_documented(how: Format, base: int, per_byte: int):
    """Digit by digit in Python; what fills the last byte up is digit 1, a 0, but for signs."""
    values = values_of(how, (2 * per_byte + 1,), 0)
    digits = [(int(v) + 1) // 2 if how is SIGNS else int(v) + 1 for v in values] + [0 if how is SIGNS else 1] * (per_byte - 1)
    want = [sum(d * base**i for i, d in enumerate(digits[start : start + per_byte])) for start in range(0, len(digits), per_byte)]
    assert bitnet_packed.pack_values(jnp.asarray(values), how).tolist() == want
    assert max(want) < 256


# ------------------------------------------------------------------------------------- whole models


@cache
def start() -> Any:
    return jax.jit(decoder(replace(MODEL, init_std=0.3)).init)(jax.random.key(0))


TOKENS = np.arange(26).reshape(2, 13) * 7 % 61


def logits(params: Any, **hooks: Any) -> np.ndarray:
    lm = decoder(MODEL, **hooks)
    return np.asarray(jax.jit(lambda params: lm.unembed(params).logits(lm.apply(params, jnp.asarray(TOKENS)).hidden))(params))


@pytest.mark.parametrize("name", ["b1", "b158 base3 groups"])
def test_5_the_packed_model_is_the_trained_one(name: str):
    """int8 products, int32 sums and scales, against quantised and dequantised float32."""
    config = CONFIGS[name]
    trained = logits(start(), dot=bitnet.dot(config, dot_in("float32")), reparam=bitnet.reparam(config))
    packed = bitnet_packed.pack(start(), config)
    ours = logits(packed, dot=bitnet_packed.dot(config, dot_in("float32")), reparam=bitnet_packed.unpacked(MODEL, config))
    np.testing.assert_allclose(ours, trained, rtol=1e-5, atol=1e-5 * np.abs(trained).max())
    assert trained.std() > 0.1


@pytest.mark.parametrize("site", ["attention/o", "mlp/up"])
@pytest.mark.parametrize("name", CONFIGS)
def test_5_products_of_int8_with_int32_sums_are_those_of_floats(name: str, site: str):
    spec, shape = {"attention/o": ("BTNH,NHD->BTD", (2, 3, 4, 6)), "mlp/up": ("BTD,DF->BTF", (2, 3, 36))}[site]
    config, (branch, part) = CONFIGS[name], site.split("/")
    x = jnp.asarray(np.random.default_rng(0).normal(1, 3, shape), jnp.float32)
    latent = {branch: {part: jax.tree.map(lambda leaf: leaf[0], tree.get(start(), f"layers/{site}"))}}
    codes, scale = bitnet.quantise_weights(config, site, latent[branch][part]["kernel"])
    leaves = {"kernel": codes.astype(jnp.int8), "weight_scale": scale}
    ours = jax.jit(lambda x: bitnet_packed.dot(config, dot_in("float32"))(site, spec, x, leaves))
    trained = bitnet.dot(config, dot_in("float32"))(site, spec, x, jax.jit(bitnet.reparam(config))(latent)[branch][part])
    np.testing.assert_allclose(ours(x), trained, rtol=1e-5, atol=1e-6)
    products = [eqn for eqn in jax.make_jaxpr(ours)(x).jaxpr.eqns[0].params["jaxpr"].eqns if eqn.primitive.name == "dot_general"]
    assert len(products) == 1
    assert [str(v.aval.dtype) for v in products[0].invars] == ["int8", "int8"] and str(products[0].outvars[0].aval.dtype) == "int32"


@pytest.mark.parametrize("name", CONFIGS)
def test_packing_keeps_what_is_not_a_projection_and_comes_back(name: str):
    config = CONFIGS[name]
    packed, codes = bitnet_packed.pack(start(), config), bitnet.quantise(start(), config)
    for path, leaf in tree.items(start()):
        if not (path.startswith("layers/") and path.endswith("/kernel")):
            np.testing.assert_array_equal(tree.get(packed, path), leaf, err_msg=path)
    layer = jax.tree.map(lambda leaf: leaf[0], codes["layers"])
    for path, leaf in tree.items(bitnet.reparam(config)(layer)):
        assert leaf is tree.get(layer, path), "the model that was trained runs them as they are"
    again = bitnet_packed.pack(codes, config)
    assert tree.structure_diff(packed, again) == []
    back = bitnet_packed.unpack(packed, config)
    assert tree.structure_diff(codes, back) == []
    for path, leaf in tree.items(codes):
        np.testing.assert_array_equal(tree.get(back, path), leaf, err_msg=path)
        assert tree.get(back, path).dtype == leaf.dtype
    for path, leaf in tree.items(packed):
        np.testing.assert_array_equal(tree.get(again, path), leaf, err_msg=path)


def _present(params: Any, rules: Any) -> Any:
    """Without the rules that match nothing: a user's rule must match."""
    return [rule for rule in rules if any(tree.match([rule], path) is not None for path in tree.paths(params))]


def test_a_packed_model_lies_on_the_mesh_as_the_kernels_do():
    model = replace(MODEL, width=64, num_kv_heads=4, head_size=16, ff_width=64)
    params = jax.eval_shape(lambda key: bitnet_packed.pack(decoder(model).init(key), B158), jax.random.key(0))
    mesh = sharding.make_mesh(MeshConfig(data=2, model=4))
    specs = sharding.param_specs(params, mesh, _present(params, bitnet_packed.RULES))
    kernels = sharding.param_specs(jax.eval_shape(decoder(model).init, jax.random.key(0)), mesh)
    for site in ("attention/q", "attention/o", "mlp/up", "mlp/down"):
        assert tree.get(specs, f"layers/{site}/codes") == tree.get(kernels, f"layers/{site}/kernel")


def test_sizes_are_those_of_the_arrays_and_near_the_formats():
    model = ModelConfig(num_layers=1, width=160, num_heads=2, num_kv_heads=2, head_size=80, ff_width=320, vocab_size=100)
    init = jax.eval_shape(decoder(model).init, jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), init)
    for config, ratio in ((B1, 16.0), (B158, 8.0), (replace(B158, packing="base3"), 10.0)):
        packed = bitnet_packed.pack(zeros, config)
        *rows, projections, whole = bitnet_packed.sizes(packed)
        assert projections.num_params == sum(leaf.size for path, leaf in tree.items(init) if path.startswith("layers") and "kernel" in path)
        assert projections.num_params == sum(row.num_params for row in rows) and len(rows) == 7
        assert whole.num_params == tree.count(init) and whole.packed_bytes == tree.num_bytes(packed)
        assert projections.ratio == pytest.approx(ratio, rel=0.01) and projections.ratio < ratio, "scales and lengths take the rest"
    lines = bitnet_packed.size_report(packed).splitlines()
    assert len(lines) == 10 and len({len(line) for line in lines}) == 1
    numbers = projections.num_params, projections.bfloat16_bytes, projections.packed_bytes
    assert lines[-2].split() == ["projections", *(f"{n:,}" for n in numbers), f"{projections.ratio:.2f}"]


def test_what_cannot_be_packed_is_refused():
    packed = bitnet_packed.pack(start(), B158)
    with pytest.raises(ConfigError, match=r"packed already \(layers/attention/.*unpack them first"):
        bitnet_packed.pack(packed, B158)
    with pytest.raises(ConfigError, match=r"bitnet.kind is 'none': there is nothing to pack; choose b1 or b158"):
        bitnet_packed.pack(start(), BitnetConfig())
    with pytest.raises(
        ConfigError, match="no projections to quantise: expected layers/attention/q/kernel and the like, given embed/tokens"
    ):
        bitnet_packed.pack({"embed": start()["embed"]}, B158)
    with pytest.raises(ConfigError, match="these weights are ternary: 1 bit has no place for a 0"):
        bitnet_packed.pack(bitnet.quantise(start(), B158), B1)
    with pytest.raises(ConfigError, match=r"layers/attention/k is not packed: it has kernel"):
        bitnet_packed.unpack(start(), B158)
    with pytest.raises(ConfigError, match=r"layers/attention/k has 9 bytes for 36 values, and .*'base3' takes 8"):
        bitnet_packed.unpack(packed, replace(B158, packing="base3"))
    with pytest.raises(ConfigError, match="these params are not packed"):
        bitnet_packed.sizes(start())
    other = replace(MODEL, ff_width=48)
    with pytest.raises(ConfigError, match=r"layers/mlp/.*/codes of one layer is .* use the model and the bitnet config"):
        jax.vmap(bitnet_packed.unpacked(other, B158))(packed["layers"])


# --------------------------------------------------------------------------- Hugging Face's layout

FOLDABLE = replace(MODEL, num_heads=8, num_kv_heads=4)


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
@pytest.mark.parametrize(
    "config", [B158, replace(B158, norm="none", norm_sites=".*"), replace(B158, norm_sites=".*", norm_eps=0.5)], ids=str
)
def test_a_hugging_face_folder_comes_back(config: BitnetConfig, linear_class: Any, tmp_path: Path):
    codes = bitnet.quantise(jax.jit(decoder(FOLDABLE).init)(jax.random.key(1)), config)
    rng = np.random.default_rng(0)
    own = {"layers/attention/o/scale": rng.normal(1, 0.1, (2, 8, 6)), "layers/mlp/down/scale": rng.normal(1, 0.1, (2, 44))}
    given = tree.from_items([*tree.items(codes), *(own.items() if config.norm != "none" else ())])
    packed_folders.write(tmp_path / "out", FOLDABLE, config, given, linear_class=linear_class)
    model, read_config, params = packed_folders.read(tmp_path / "out")
    assert replace(model, init_std=FOLDABLE.init_std, max_length=64) == FOLDABLE
    expected = replace(config, norm_scale=config.norm != "none")
    assert replace(read_config, norm_eps=config.norm_eps if config.norm == "none" else read_config.norm_eps) == expected
    for path, leaf in tree.items(given):
        np.testing.assert_allclose(tree.get(params, path), leaf, rtol=1e-6, err_msg=path)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    assert tensors[f"{name}.weight"].dtype == np.uint8 and tensors[f"{name}.weight"].shape == (11, 36)
    beta = float(np.asarray(tree.get(codes, "layers/mlp/up/weight_scale"))[1, 0])
    assert tensors[f"{name}.weight_scale"] == pytest.approx(beta if linear_class == "autobitlinear" else 1 / beta, rel=1e-6)


@pytest.mark.parametrize("config", [replace(B158, norm_scale=True), replace(B158, norm="none", norm_sites=".*")], ids=str)
def test_the_commands_take_a_trained_model_there_and_back(config: BitnetConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Latents are lost on the way; what comes back computes the same, and can be trained on."""
    train = TrainConfig(model=FOLDABLE, bitnet=config)
    lm = pretrain.language_model(train, "float32")
    params = jax.tree.map(lambda leaf: leaf * 1.25, lm.init(jax.random.key(1)))  # norms' scales are not 1
    pretrained.save(tmp_path / "ours", FOLDABLE, params, None, source={"family": ""}, rounded=config)
    assert convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    packed = 2 * sum(math.prod(shape) for shape in bitnet.kernel_shapes(FOLDABLE).values()) / 4 / 1e6
    assert f"projections in 2 bits a weight: {packed:.2f} MB, {8 * packed:.2f} MB in bfloat16" in capsys.readouterr().out
    assert convert.main(["hf", str(tmp_path / "theirs"), str(tmp_path / "back")]) == 0
    before, after = pretrained.load(tmp_path / "ours"), pretrained.load(tmp_path / "back")
    for path, leaf in tree.items(bitnet.quantise(before.params, config)):
        np.testing.assert_allclose(tree.get(bitnet.quantise(after.params, after.train.bitnet), path), leaf, rtol=1e-5, err_msg=path)
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 61)
    found = []
    for model in (before, after):
        for lm, weights in ((model.lm, model.params), model.for_decoding(sharding.make_mesh(MeshConfig(data=1)), "float32")):
            found.append(np.asarray(lm.unembed(weights).logits(lm.apply(weights, tokens).hidden)))
    for logits in found[1:]:
        np.testing.assert_allclose(logits, found[0], atol=2e-5 * found[0].std())
    with pytest.raises(ConfigError, match=r"are used rounded \(bitnet.kind b158\), and here they would not be: set --bitnet.kind b158"):
        plain = TrainConfig(model=FOLDABLE, init_from=str(tmp_path / "back"))
        pretrain.starting_params(plain, pretrain.language_model(plain, "float32"), sharding.make_mesh(MeshConfig(data=1)))
    assert convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "other"), "--family", "mistral"]) == 2
    assert "has b158 weights, which Hugging Face keeps as" in capsys.readouterr().err


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_latents_of_quantised_params_quantise_to_them(config: BitnetConfig):
    codes = bitnet.quantise(decoder(MODEL).init(jax.random.key(0)), config)
    codes["layers"]["mlp"]["up"]["kernel"] = jnp.zeros_like(codes["layers"]["mlp"]["up"]["kernel"])  # as a dead projection is
    again = bitnet.quantise(bitnet.latents(codes, config), config)
    for site in bitnet.kernel_shapes(MODEL):
        if config.kind == "b158" or site != "mlp/up":  # a sign is never 0
            np.testing.assert_array_equal(tree.get(again, f"layers/{site}/kernel"), tree.get(codes, f"layers/{site}/kernel"))
        if site != "mlp/up":
            scales = (tree.get(params, f"layers/{site}/weight_scale") for params in (again, codes))
            np.testing.assert_allclose(*scales, rtol=1e-5)


@pytest.mark.parametrize(
    "model, config, message",
    [
        ({}, {"kind": "none"}, r"bitnet.kind is 'none'"),
        ({}, {"num_groups": 2}, r"num_groups is 2, and each matrix of theirs has one scale"),
        ({}, {"norm": "layer"}, r"bitnet.norm is 'layer', and theirs is 'rms'"),
        ({}, {"norm_sites": "mlp/.*"}, r"norm_sites 'mlp/\.\*' matches mlp/gate, mlp/up, mlp/down; theirs are none, o and down, or all"),
        ({}, {"norm_sites": "mlp/(gate|up)"}, r"matches mlp/gate, mlp/up; theirs are"),
        ({}, {"norm_eps": 0.1}, r"bitnet.norm_eps is 0.1 and model.norm_eps 1e-06"),
        ({}, {"activation_bits": 4}, r"activation_bits must be 8"),
        ({"norm": "layer"}, {}, r"model.norm = 'layer'"),
        ({"ff_width": 42}, {}, r"a matrix of 42 outputs cannot be packed for Hugging Face: 4 must divide them"),
    ],
)
def test_what_their_layout_has_no_place_for_is_refused(model: Any, config: Any, message: str, tmp_path: Path):
    chosen = replace(FOLDABLE, **model)
    shapes = jax.eval_shape(lambda key: bitnet.quantise(decoder(chosen).init(key), B158), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    with pytest.raises(ConfigError, match=message):
        packed_folders.write(tmp_path / "out", chosen, replace(B158, **config), params)
    assert not (tmp_path / "out").exists()


def test_float_params_are_not_written(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"layers/attention/q/kernel is not an int8 kernel: quantise the params first"):
        packed_folders.write(tmp_path / "out", MODEL, B158, start())


def change_config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        about = values["quantization_config"] | {key: value for key, value in changes.items() if key in values["quantization_config"]}
        outer = {key: value for key, value in changes.items() if key not in about}
        (folder / "config.json").write_text(json.dumps({**values, "quantization_config": about, **outer}))

    return change


def change_tensor(name: str, change: Any) -> Any:
    def f(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        new = change(tensors.pop(name))
        save_file(tensors | ({} if new is None else {name: new}), folder / "model.safetensors")

    return f


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "damage, message",
    [
        (change_config(quant_method="gptq"), r"is quantised by 'gptq'"),
        (change_config(model_type="mistral"), r"model_type 'mistral'; jaxllm reads bitnet and llama"),
        (change_config(linear_class="linear"), r"linear_class is 'linear'; jaxllm reads 'bitlinear' and 'autobitlinear'"),
        (change_config(use_rms_norm=True), r"use_rms_norm is true in model_type 'bitnet', which would normalise twice"),
        (change_config(hidden_act="tanh"), r"'hidden_act' .*tanh"),
        (change_tensor(f"{UP}.weight_scale", lambda x: None), rf"{UP} is not packed: jaxllm reads checkpoints in which every"),
        (change_tensor(f"{UP}.weight_scale", lambda x: -x), rf"{UP}.weight_scale is \[-.*; it must be one positive number"),
        (change_tensor(f"{UP}.weight", lambda x: x | 3), r"a packed matrix \(11, 36\) holds the code 3"),
        (change_tensor(f"{UP}.weight", lambda x: x[:-1]), rf"{UP}.weight has shape \(40, 36\), expected \(44, 36\)"),
        (change_tensor(f"{UP}.weight", lambda x: x.astype(np.float32)), rf"{UP} is not packed"),
        (change_tensor("model.layers.0.mlp.ffn_sub_norm.weight", lambda x: None), r"missing model.layers.0.mlp.ffn_sub_norm.weight"),
        (
            change_tensor("model.layers.0.mlp.ffn_sub_norm.weight", lambda x: x[:3]),
            r"ffn_sub_norm.weight has shape \(3,\), expected \(44,\)",
        ),
    ],
)
def test_a_folder_that_is_not_as_it_should_be_is_refused(damage: Any, message: str, tmp_path: Path):
    shapes = jax.eval_shape(lambda key: bitnet.quantise(decoder(FOLDABLE).init(key), B158), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    packed_folders.write(tmp_path / "out", FOLDABLE, B158, params)
    damage(tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        packed_folders.read(tmp_path / "out")


def test_a_float_folder_is_not_a_packed_one(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"x": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"is not quantised: its config.json has no quantization_config with quant_method 'bitnet'"):
        packed_folders.read(tmp_path)


# ------------------------------------------------------------------------------- energy and scaling

GPT_SIZES = {  # the paper's table of models: width, layers, heads
    "125M": (768, 12, 12), "350M": (1024, 24, 16), "760M": (1536, 24, 16), "1.3B": (2048, 24, 32), "2.7B": (2560, 32, 32),
    "6.7B": (4096, 32, 32), "13B": (5120, 40, 40), "30B": (7168, 48, 56),
}  # fmt: skip
TABLE = {  # (multiplications, additions) at 7 nm, then at 45 nm, in joules
    ("6.7B", 32): (4.41, 1.28, 12.46, 3.03), ("6.7B", 16): (1.14, 0.54, 3.70, 1.35), ("6.7B", 1): (0.02, 0.04, 0.08, 0.13),
    ("13B", 32): (8.58, 2.49, 24.23, 5.89), ("13B", 16): (2.23, 1.05, 7.20, 2.62), ("13B", 1): (0.04, 0.06, 0.12, 0.24),
    ("30B", 32): (20.09, 5.83, 56.73, 13.80), ("30B", 16): (5.21, 2.45, 16.87, 6.13), ("30B", 1): (0.06, 0.14, 0.20, 0.53),
}  # fmt: skip
RATIOS = {"125M": 8.8, "350M": 11.0, "760M": 15.0, "1.3B": 18.5, "2.7B": 21.6, "6.7B": 29.1, "13B": 32.9, "30B": 38.8}


def gpt(size: str) -> ModelConfig:
    width, layers, heads = GPT_SIZES[size]
    return ModelConfig(
        num_layers=layers, width=width, num_heads=heads, num_kv_heads=heads, head_size=width // heads, ff_width=4 * width, activation="gelu"
    )


@pytest.mark.parametrize("size, bits", TABLE)
def test_10_energy_is_the_papers_table(size: str, bits: Any):
    at7, at45 = (energy(gpt(size), bits=bits, process=process) for process in ("7nm", "45nm"))
    np.testing.assert_allclose((at7.multiply, at7.add, at45.multiply, at45.add), TABLE[size, bits], rtol=0, atol=0.01)


@pytest.mark.parametrize("size", RATIOS)
def test_10_energy_ratios_are_the_papers_figure(size: str):
    assert energy(gpt(size), bits=16).joules / energy(gpt(size), bits=1).joules == pytest.approx(RATIOS[size], abs=0.06)


def test_10_energy_counts_what_a_model_has():
    """Gated layers have a third matrix, grouped queries smaller ones, and b1.58's claim of 71.4 is the limit of a long product."""
    base = ModelConfig(width=64, ff_width=128, num_heads=4, num_kv_heads=4, head_size=16, activation="gelu")
    one = lambda model: energy(model, bits=32, num_tokens=1).multiply / 1.31e-12
    assert one(base) == pytest.approx(2 * (4 * 64 * 64 + 2 * 64 * 128 + 2 * 64))
    assert one(replace(base, activation="swiglu", num_kv_heads=1)) == pytest.approx(2 * (2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 128 + 2 * 64))
    huge = ModelConfig(width=2**20, ff_width=2**22, num_heads=1, num_kv_heads=1, head_size=2**20)
    assert energy(huge, bits=16, num_tokens=1).joules / energy(huge, bits=1, num_tokens=1).joules == pytest.approx(0.5 / 0.007, rel=1e-3)


@given(st.floats(0.05, 1.2), st.floats(0.0, 3.0), st.floats(0.5, 4.0))
@settings(max_examples=20, deadline=None)
def test_a_scaling_law_is_found_again(slope: float, floor: float, above: float):
    """L(N) through five sizes; `above` is what the smallest loses beyond the floor."""
    sizes = np.array([3e5, 1e6, 3e6, 1e7, 1e8])
    losses = above * (sizes / sizes[0]) ** -slope + floor
    law = fit_scaling(sizes.tolist(), losses.tolist())
    assert law.b == pytest.approx(-slope, rel=1e-3) and law.c == pytest.approx(floor, abs=5e-3)
    np.testing.assert_allclose([law.loss(n) for n in sizes], losses, rtol=1e-5)
    assert law.loss(1e9) == pytest.approx(above * (1e9 / sizes[0]) ** -slope + floor, rel=1e-3)


def test_a_scaling_law_through_noise_beats_its_neighbours():
    rng, sizes = np.random.default_rng(0), np.geomspace(1e6, 1e8, 6)
    losses = 40 * sizes**-0.25 + 1.5 + rng.normal(0, 0.01, 6)
    a, b, c = law = fit_scaling(sizes, losses)
    error = lambda a, b, c: ((a * sizes**b + c - losses) ** 2).sum()
    assert all(error(a, b, c) <= error(a * x, b * y, c * z) for x in (0.99, 1, 1.01) for y in (0.99, 1, 1.01) for z in (0.99, 1, 1.01))
    assert law.b == pytest.approx(-0.25, abs=0.08)


@pytest.mark.parametrize(
    "sizes, losses, message",
    [
        ([1e6, 2e6, 3e6], [3.0, 2.0, 1.5], "at least four positive sizes"),
        ([1e6, 1e6, 3e6, 3e6], [3.0, 3.0, 2.0, 2.0], "at least four positive sizes"),
        ([1e6, 2e6], [3.0], "2 sizes and 1 losses"),
        ([1e6, 2e6, 3e6, 4e6], [3.0, 2.0, np.nan, 1.0], "finite losses"),
        ([1e6, 2e6, 3e6, 4e6], [1.0, 2.0, 3.0, 4.0], "do not fall with size"),
    ],
)
def test_losses_that_make_no_law_are_refused(sizes: Any, losses: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        fit_scaling(sizes, losses)
