"""Adapters in PEFT's format against PEFT itself, in both directions. Run by `make parity`.

PEFT makes and loads in the environment that has torch (peft_reference.py), through $JAXLLM_PARITY_PYTHON; the conversions are the
commands that users type.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm import pretrained, tree
from jaxllm.config import LoraConfig, OptimConfig, PrefixConfig, TrainConfig
from jaxllm.interop.layout import leaf_shapes
from jaxllm.surgery import adapters, prefix
from tools import convert
from tools import peft as tool

PYTHON = os.environ.get("JAXLLM_PARITY_PYTHON", "")
if not PYTHON:
    pytest.skip("JAXLLM_PARITY_PYTHON is not set: the Python that has torch, transformers and peft", allow_module_level=True)

SCRIPT = Path(__file__).with_name("peft_reference.py")
TOLERANCE = 1e-4
"""Largest difference of a logit over the standard deviation of all; float32 noise is about 5e-6."""
KINDS = ("lora", "rslora", "dora")
CASES = (
    *(f"{model}_{kind}" for model in ("llama", "gpt2", "gpt_neox") for kind in (*KINDS, "prefix")),
    *(f"{model}_all_linear" for model in ("mpt", "phi3", "gpt1", "qwen3", "gemma3")),
    "phi3_all_linear_dora", "llama_patterns", "llama_regex_named", "llama_dora_layers", "gpt2_layers", "llama_prefix_projection",
    "qwen3_prefix",
)  # fmt: skip
QV = r"layers/attention/[qv]/kernel"
OURS: dict[str, Any] = {  # what we train -> which case's base it stands on
    "llama_lora": LoraConfig(((QV, 4, 32.0), (r"unembed/kernel", 2, 6.0), (r".*/(o|down)/kernel", 3, 9.0))),
    "llama_rslora": LoraConfig(((r"layers/attention/q/kernel", 4, 32.0), (r"layers/.*/kernel", 2, 5.0)), "sqrt_rank"),
    "llama_dora": LoraConfig(((r"layers/(attention|mlp)/[a-z]+/kernel", 3, 7.0),), dora=True),
    "gpt2_lora": LoraConfig(((r"layers/attention/q/kernel", 4, 32.0), (r"layers/attention/v/kernel", 3, 5.0))),
    "gpt2_rslora": LoraConfig(((QV, 4, 32.0), (r"layers/mlp/up/kernel", 2, 6.0)), "sqrt_rank"),
    "gpt2_dora": LoraConfig(((QV, 3, 7.0), (r"layers/attention/o/kernel", 2, 7.0)), dora=True),
    "gpt_neox_lora": LoraConfig(((r"layers/attention/q/kernel", 4, 32.0), (r"layers/attention/v/kernel", 3, 5.0))),
    "gpt_neox_rslora": LoraConfig(((r"layers/.*/kernel", 2, 5.0),), "sqrt_rank"),
    "gpt_neox_dora": LoraConfig(((QV, 3, 7.0),), dora=True),
    "phi3_all_linear": LoraConfig(((QV, 4, 32.0), (r"layers/mlp/up/kernel", 2, 6.0))),
    "phi3_all_linear_dora": LoraConfig(((r"layers/mlp/gate/kernel", 2, 6.0), (QV, 4, 32.0)), dora=True),
    "llama_prefix": PrefixConfig(length=5), "gpt2_prefix": PrefixConfig(length=7, hidden=9), "gpt_neox_prefix": PrefixConfig(length=3),
    "qwen3_prefix": PrefixConfig(length=4, place="embedding"),
    "llama_prefix_projection": (LoraConfig(((QV, 4, 32.0),)), PrefixConfig(length=5)),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's adapters and answers; every base converted; ours written and loaded by PEFT."""
    folder = tmp_path_factory.mktemp("peft")
    subprocess.run([PYTHON, SCRIPT, "make", folder], check=True, timeout=900)
    assert sorted(path.name for path in folder.iterdir()) == sorted(CASES)
    for case in CASES:
        run("hf", folder / case / "base", folder / case / "base.ours")
    for seed, (case, config) in enumerate(OURS.items()):
        train(folder / case, config, seed)
        run("to-peft", folder / case / "run", folder / case / "ours")
    subprocess.run([PYTHON, SCRIPT, "load", folder], check=True, timeout=900)
    return folder


def run(*words: Any) -> None:
    assert convert.main([str(word) for word in words]) == 0


def train(case: Path, config: Any, seed: int) -> None:
    """A run whose adapters are random numbers."""
    parts = config if isinstance(config, tuple) else (config,)
    lora = next((part for part in parts if isinstance(part, LoraConfig)), LoraConfig())
    own = next((part for part in parts if isinstance(part, PrefixConfig)), PrefixConfig())
    model = pretrained.load(case / "base.ours", precision="float32")
    leaves = tree.merge(
        adapters.init_leaves(model.params, lora, jax.random.key(seed)),
        {"prefix": prefix.init_leaves(model.config, own, jax.random.key(seed))} if own.length else {},
    )
    rng = np.random.default_rng(seed)

    def number(path: str, leaf: Any) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        return np.asarray(leaf) * (1.0 + 0.3 * noise) if path.endswith("lora_m") else (0.4 if "prefix" in path else 0.15) * noise

    optim = OptimConfig(freeze=((tool.ADDED, False), (r".*", True)))
    config = TrainConfig(name="run", model=model.config, lora=lora, prefix=own, optim=optim, init_from=str(case / "base.ours"))
    tool.save_run(case / "run", config, {path: number(path, leaf) for path, leaf in tree.items(leaves)})


def logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = pretrained.load(folder, precision="float32")
    forward = jax.jit(lambda params, tokens: model.lm.unembed(params).logits(model.lm.apply(params, tokens).hidden))
    return np.asarray(forward(model.params, jnp.asarray(ids, jnp.int32)))


def answers(made: Path, case: str) -> dict[str, np.ndarray]:
    with np.load(made / case / "answers.npz") as file:
        return dict(file)


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / theirs.std())


@pytest.mark.parametrize("case", CASES)
def test_we_load_what_peft_wrote(made: Path, case: str, tmp_path: Path, record_property):
    named = ["--adapter", "pirate"] if case == "llama_regex_named" else []
    run("peft", made / case / "adapter", made / case / "base.ours", tmp_path / "run", *named)
    theirs = answers(made, case)
    error = distance(logits(tmp_path / "run", theirs["ids"]), theirs["adapter"])
    print(f"{case}: {error:.1e}")
    record_property("error", error)
    assert error < TOLERANCE


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_what_we_wrote(made: Path, case: str, record_property):
    if isinstance(OURS[case], tuple):
        assert sorted(path.name for path in (made / case / "ours").iterdir()) == ["lora", "prefix"]
        return
    with np.load(made / case / "back.npz") as file:
        theirs = file["."]
    error = distance(logits(made / case / "run", answers(made, case)["ids"]), theirs)
    print(f"{case}: {error:.1e}")
    record_property("error", error)
    assert error < TOLERANCE
    assert distance(theirs, answers(made, case)["base"]) > 0.05


@pytest.mark.parametrize("case", [case for case in CASES if case.split("_")[-1] in (*KINDS, "linear", "prefix")])
def test_peft_tensors_come_back_bit_for_bit(made: Path, case: str, tmp_path: Path):
    run("peft", made / case / "adapter", made / case / "base.ours", tmp_path / "run")
    run("to-peft", tmp_path / "run", tmp_path / "back")
    theirs, back = (load_file(folder / "adapter_model.safetensors") for folder in (made / case / "adapter", tmp_path / "back"))
    assert theirs.keys() == back.keys()
    assert all(theirs[name].tobytes() == back[name].tobytes() and theirs[name].shape == back[name].shape for name in theirs)


@pytest.mark.parametrize("case", ["llama_dora", "llama_patterns", "phi3_all_linear"])
def test_a_merged_model_is_the_adapted_one(made: Path, case: str, tmp_path: Path):
    run("peft", made / case / "adapter", made / case / "base.ours", tmp_path / "run")
    run("merge", tmp_path / "run", tmp_path / "merged")
    theirs = answers(made, case)
    model = pretrained.load(tmp_path / "merged", precision="float32")
    assert set(tree.paths(model.params)) == set(leaf_shapes(model.config))
    assert distance(logits(tmp_path / "merged", theirs["ids"]), theirs["adapter"]) < TOLERANCE
