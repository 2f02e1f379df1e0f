"""A frozen base in 8 or 4 bits under adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import pretrain, pretrained, sharding, tree
from jaxllm.config import BitnetConfig, ConfigError, LoraConfig, MeshConfig, ModelConfig, OptimConfig, QuantiseConfig, TrainConfig
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.models.transformer import decoder
from jaxllm.step import frozen_base, program
from jaxllm.surgery import adapters, quantise
from tests.observed import batch_of
from tests.test_pretrained import SOURCE, random_params

MODEL = ModelConfig(num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_size=4, ff_width=32, vocab_size=261, max_length=64)
LORA = LoraConfig((("layers/.*/kernel", 2, 4.0),))
KINDS = ("int8", "int4", "nf4")
NF4 = np.array(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
)


def config_of(folder: Path | str = "", kind: Any = "int8", **changes: Any) -> TrainConfig:
    made = TrainConfig(
        model=MODEL, lora=LORA, quantise=QuantiseConfig(kind, tile=8), optim=OptimConfig(lr=1e-2, freeze=adapters.TRAIN_ONLY_LORA),
        init_from=str(folder), remat="full", mesh=MeshConfig(data=1),
    )  # fmt: skip
    return replace(made, data=replace(made.data, batch_size=4, sequence_length=12), **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantise") / "model"
    pretrained.save(out, MODEL, jax.tree.map(lambda x: 0.3 * x, random_params(MODEL)), ByteTokenizer(), source=SOURCE)
    return out


def rounded(kernel: np.ndarray, path: str, kind: str, tile: int = 8) -> np.ndarray:
    """By hand: absmax of each tile of inputs and each output, to the nearest of the kind's numbers."""
    axis = 2 if "/o/" in path else 1
    tile = min(tile, kernel.shape[axis])
    parts = np.moveaxis(kernel, axis, -1)
    parts = parts.reshape(*parts.shape[:-1], -1, tile).astype(np.float64)
    largest = np.abs(parts).max(-1, keepdims=True)
    if kind == "nf4":
        found = NF4[np.abs(parts[..., None] / largest[..., None] - NF4).argmin(-1)] * largest
    else:
        steps = {"int8": 127.5, "int4": 7.5}[kind]
        top = {"int8": 127, "int4": 7}[kind]
        found = np.clip(np.round(parts / largest * steps), -top - 1, top) * largest / steps
    return np.moveaxis(found.reshape(*found.shape[:-2], -1), -1, axis)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_rounded_tile_by_tile(kind: Any) -> None:
    """At most half a step from the kernel, as near as the kind allows by hand; other leaves are the ones given."""
    params = random_params(MODEL)
    small = quantise.quantise(params, QuantiseConfig(kind, tile=8))
    again = dict(tree.items(quantise.dequantise(small, kind)))
    assert again.keys() == set(tree.paths(params))
    for path, leaf in tree.items(params):
        if path.startswith("layers/") and path.endswith("/kernel"):
            ours, best = np.abs(np.asarray(again[path]) - leaf).mean(), np.abs(rounded(leaf, path, kind) - leaf).mean()
            assert ours <= 1.1 * best, (path, ours, best)
            assert np.abs(np.asarray(again[path]) - leaf).max() < {"int8": 0.02, "int4": 0.3, "nf4": 0.6}[kind] * np.abs(leaf).max()
        else:
            assert again[path] is leaf
    kernels = sum(leaf.size for path, leaf in tree.items(params) if path.startswith("layers/") and path.endswith("/kernel"))
    of = {path: leaf for path, leaf in tree.items(small) if path.endswith("/values")}
    assert quantise.num_bytes(tree.from_items(list(of.items()))) == kernels * {"int8": 2, "int4": 1, "nf4": 1}[kind] // 2


def test_training_sees_the_rounded_base_and_no_gradient_of_it(folder: Path) -> None:
    """Loss and the adapters' steps are those of a float run whose base was rounded beforehand; the state has no kernel."""
    kind: Any = "nf4"
    tokens = np.random.default_rng(0).integers(0, 256, (4, 12)).astype(np.int32)
    batch = batch_of(np.roll(tokens, -1, 1)).replace(tokens=jnp.asarray(tokens))
    base = quantise.dequantise(quantise.quantise(pretrained.load(folder).params, QuantiseConfig(kind, tile=8)), kind)
    results = []
    for config, change in ((config_of(folder, kind), False), (config_of(folder, "none"), True)):
        experiment = pretrain.experiment(config, precision="float32")
        mesh = sharding.make_mesh(config.mesh)
        assert experiment.initial_params is not None
        params = experiment.initial_params(mesh)
        if change:
            params = {**params, "layers": tree.merge(tree.partition(params["layers"], lambda path: "lora" in path)[0], base["layers"])}
        made = program(experiment, mesh)
        state, frozen = made.make_state(params), frozen_base(experiment, mesh, params)
        assert all("lora" in path for path in tree.paths(state.trainable))
        losses = []
        for _ in range(4):
            state, metrics = made.step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
        results.append((losses, state.trainable, quantise.num_bytes(frozen["base"]["layers"])))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for (path, a), (_, b) in zip(tree.items(results[0][1]), tree.items(results[1][1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=path)
    assert results[0][2] < 0.35 * results[1][2]


def test_on_a_mesh(folder: Path) -> None:
    config = config_of(folder, "int4", mesh=MeshConfig(data=2, model=2))
    lm = pretrain.language_model(config, "float32")
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 256, (4, 12)), jnp.int32)
    outs = []
    for sizes in (MeshConfig(data=1), MeshConfig(data=2, model=2)):
        mesh = sharding.make_mesh(sizes)
        with jax.set_mesh(mesh):
            params = pretrain.starting_params(replace(config, mesh=sizes), lm, mesh)
            assert params["layers"]["attention"]["q"]["values"].dtype == jnp.int4
            outs.append(np.asarray(jax.jit(lambda p: lm.apply(p, tokens).hidden)(params)))
    np.testing.assert_allclose(outs[0], outs[1], atol=2e-5)


def test_what_is_loaded_afterwards_is_the_rounded_base_with_its_adapters(folder: Path, tmp_path: Path) -> None:
    from jaxllm import checkpoint
    from jaxllm.config import to_dict

    config = config_of(folder, "nf4")
    lm = pretrain.language_model(config, "float32")
    params = pretrain.starting_params(config, lm, sharding.make_mesh(config.mesh))
    fresh, base = tree.partition(params, lambda path: "lora" in path)
    trained = jax.tree.map(lambda x: x + 0.05, fresh)
    saver = checkpoint.Checkpointer(tmp_path / "checkpoints")
    saver.save(1, {"trainable": trained, "step": jnp.int32(1)}, {"config": to_dict(config)}, num_vocab=261)
    saver.wait()
    (tmp_path / "tokenizer").mkdir()
    ByteTokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text("{}")
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 256, (2, 9)), jnp.int32)
    want = np.asarray(jax.jit(lambda p: lm.apply(p, tokens).hidden)(tree.merge(base, trained)))
    model = pretrained.load(tmp_path)
    assert set(tree.paths(model.params)) == set(tree.paths(random_params(MODEL)))
    np.testing.assert_allclose(jax.jit(lambda p: decoder(MODEL).apply(p, tokens).hidden)(model.params), want, atol=2e-5)


def test_bad_input(folder: Path) -> None:
    build = lambda config: pretrain.experiment(config, precision="float32")
    cases: list[tuple[Any, str]] = [
        (lambda: build(config_of(folder, optim=OptimConfig())), "layers/.*/kernel trains.*freeze it"),
        (
            lambda: build(config_of(folder, quantise=QuantiseConfig("int4", where="layers/atention/q/kernel"))),
            "matches no kernel.*attention/q",
        ),
        (lambda: build(config_of(folder, quantise=QuantiseConfig("int4", tile=5))), "tile is 5, which does not divide the 16 inputs"),
        (lambda: build(config_of(folder, lora=replace(LORA, dora=True))), "neither bitnet nor lora.dora"),
        (lambda: build(config_of(folder, bitnet=BitnetConfig("b1"))), "neither bitnet nor lora.dora"),
        (lambda: QuantiseConfig("int3"), "int3"),  # type: ignore[arg-type]
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            raise AssertionError(f"not refused: {message}", call())
