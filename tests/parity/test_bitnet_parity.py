"""Packed BitNet checkpoints in Hugging Face's layout, both ways, against transformers' BitLinear and AutoBitLinear.

Run by `make parity`. The references come from make_bitnet_references.py; they are in the folder `bitnet` of JAXLLM_PARITY.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm import pretrained, tree
from jaxllm.config import BitnetConfig
from jaxllm.contract import dot_in
from jaxllm.interop import bitnet as packed_folders
from jaxllm.models.transformer import decoder
from jaxllm.surgery import bitnet, bitnet_packed
from tools import convert

FOLDER = Path(os.environ.get("JAXLLM_PARITY", "")) / "bitnet"
PYTHON = os.environ.get("JAXLLM_PARITY_PYTHON", "")
if not os.environ.get("JAXLLM_PARITY"):
    pytest.skip("JAXLLM_PARITY is not set: run `make parity`, which makes the references with torch", allow_module_level=True)

OFFLINE = ["auto", "tied", "linear", "norms"]


@cache
def checkpoint(case: str) -> packed_folders.Checkpoint:
    return packed_folders.read(FOLDER / case)


@cache
def answers(case: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / case / "answers.npz") as file:
        return dict(file)


def logits(config: Any, params: Any, tokens: np.ndarray, **hooks: Any) -> np.ndarray:
    lm = decoder(config, **hooks)
    return np.asarray(jax.jit(lambda params: lm.unembed(params).logits(lm.apply(params, jnp.asarray(tokens)).hidden))(params))


def agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Inputs that round to another integer in one of the two are few and move little; nearly all logits agree to float32."""
    error = np.abs(ours - theirs) / theirs.std()
    print(f"median {np.median(error):.1e}, largest {error.max():.1e}")
    assert np.median(error) < 1e-5 and error.max() < 0.02


@pytest.mark.parametrize("rows", [4, 8, 12, 32, 5, 7])
def test_bytes_are_those_of_their_own_packing(rows: int):
    with np.load(FOLDER / "packs.npz") as file:
        codes, packed, unpacked = (file[f"{name}_{rows}"] for name in ("codes", "packed", "unpacked"))
    np.testing.assert_array_equal(packed_folders.unpack_rows(packed), unpacked)
    np.testing.assert_array_equal(unpacked[:rows], codes)
    if rows % 4 == 0:
        np.testing.assert_array_equal(packed_folders.pack_rows(codes), packed)


@pytest.mark.parametrize("case", OFFLINE)
def test_logits_agree(case: str):
    """Integer products, out of the packed tree."""
    model, config, params = checkpoint(case)
    small = bitnet_packed.pack(params, config)
    hooks = {"dot": bitnet_packed.dot(config, dot_in("float32")), "reparam": bitnet_packed.unpacked(model, config)}
    agree(logits(model, small, answers(case)["input_ids"], **hooks), answers(case)["logits"])


@pytest.mark.parametrize("case", [*OFFLINE, "online"])
def test_the_command_makes_a_model_that_answers_alike(case: str, tmp_path: Path):
    """With latents of our own making where theirs are gone."""
    assert convert.main(["hf", str(FOLDER / case), str(tmp_path / "out")]) == 0
    model = pretrained.load(tmp_path / "out", precision="float32")
    tokens = jnp.asarray(answers(case)["input_ids"])
    agree(np.asarray(model.lm.unembed(model.params).logits(model.lm.apply(model.params, tokens).hidden)), answers(case)["logits"])


@pytest.mark.parametrize("changes", [{"norm": "none"}, {"norm_eps": 1e-9}, {"activation_scale": "tensor"}, {"activation_bits": 7}], ids=str)
def test_every_option_matters(changes: dict[str, Any]):
    """Or agreement would say nothing of it."""
    case = "norms" if "norm_eps" in changes else "auto"
    model, config, params = checkpoint(case)
    ours = logits(model, params, answers(case)["input_ids"], dot=bitnet.dot(replace(config, **changes), dot_in("float32")))
    with pytest.raises(AssertionError):
        agree(ours, answers(case)["logits"])


def test_an_online_checkpoint_trains_as_theirs_does():
    """Logits, and gradients with respect to latent weights and norms in the middle layer."""
    model, config, params = checkpoint("online")
    given = answers("online")
    lm = decoder(model, dot=bitnet.dot(config, dot_in("float32")), reparam=bitnet.reparam(config))

    def loss(params: Any) -> Any:
        out = lm.unembed(params).logits(lm.apply(params, jnp.asarray(given["input_ids"])).hidden)
        return jnp.sin(out).sum(), out

    (_, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    agree(np.asarray(ours), given["logits"])
    theirs = {name.removeprefix("gradient/model.layers.1."): array for name, array in given.items() if name.startswith("gradient/")}
    assert {f"{name}.weight" for name in packed_folders.NAMES.values()} < set(theirs)
    for site, name in packed_folders.NAMES.items():
        kernel = np.asarray(tree.get(gradients, f"layers/{site}/kernel"))[1]
        expected = theirs[f"{name}.weight"].T
        error = np.linalg.norm(kernel.reshape(expected.shape) - expected) / np.linalg.norm(expected)
        assert error < 0.02, f"{site}: {error}"
    for site, name in packed_folders.SUB_NORMS.items():
        scale, expected = np.asarray(tree.get(gradients, f"layers/{site}/scale"))[1].ravel(), theirs[f"{name}.weight"]
        assert np.linalg.norm(scale - expected) < 0.02 * np.linalg.norm(expected), site


@pytest.mark.parametrize("case", OFFLINE)
def test_a_folder_comes_back_bit_for_bit(case: str, tmp_path: Path):
    about = json.loads((FOLDER / case / "config.json").read_text())["quantization_config"]
    packed_folders.write(tmp_path / "back", *checkpoint(case), linear_class=about["linear_class"])
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (FOLDER / case, tmp_path / "back"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.endswith("weight_scale"):  # 1 / (1 / β)
            np.testing.assert_allclose(ours[name], tensor, rtol=1e-6)
        else:
            assert ours[name].tobytes() == tensor.tobytes() and ours[name].shape == tensor.shape, name


@pytest.mark.skipif(not PYTHON, reason="JAXLLM_PARITY_PYTHON is not set: the Python that has torch and transformers")
def test_transformers_loads_what_we_trained(tmp_path: Path):
    """Params of our own, of both kinds and all places for norms: quantised, written, and loaded by them."""
    model = replace(checkpoint("auto").model, init_std=0.3)
    tokens = answers("auto")["input_ids"]
    params = decoder(model).init(jax.random.key(0))
    own = {}
    for name, config, linear_class in (
        ("b158", BitnetConfig("b158"), "autobitlinear"),
        ("sub", BitnetConfig("b158", norm="rms", norm_sites=".*/(o|down)", norm_eps=model.norm_eps), "autobitlinear"),
        ("b1", BitnetConfig("b1", norm="rms", norm_eps=1e-4), "bitlinear"),
    ):
        hooks = {"dot": bitnet.dot(config, dot_in("float32")), "reparam": bitnet.reparam(config)}
        own[name] = logits(model, params, tokens, **hooks)
        packed_folders.write(tmp_path / name, model, config, bitnet.quantise(params, config), linear_class=linear_class)
        np.save(tmp_path / name / "input_ids.npy", tokens)
    script = Path(__file__).with_name("make_bitnet_references.py")
    subprocess.run([PYTHON, script, tmp_path, "--reload"], check=True, timeout=300)
    for name, ours in own.items():
        agree(ours, np.load(tmp_path / name / "logits.npy"))
