"""What every surgery must satisfy. A new one joins as a row of `SURGERIES`, and needs no test of its own here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import checkpoint_slices, sharding, tree
from jaxllm.checkpoint import load_params
from jaxllm.config import BitnetConfig, BottleneckConfig, LoraConfig, MeshConfig, ModelConfig, PrefixConfig, TrainConfig
from jaxllm.contract import LM, Params
from jaxllm.interop.families import params_from_hf, params_to_hf
from jaxllm.models.transformer import decoder
from jaxllm.pretrain import ADDED, language_model
from jaxllm.pretrained import ONE_DEVICE, chunks_on
from jaxllm.surgery import adapters, importance, prune, resize
from jaxllm.surgery.shapes import Shape
from tests.reference_decoder import BASE, random_params

MODEL = replace(BASE, num_layers=2, width=16, num_heads=4, num_kv_heads=4, ff_width=24)
TOKENS = np.random.default_rng(0).integers(1, MODEL.vocab_size, (8, 6)).astype(np.int32)

type Surgery = Callable[[Params, ModelConfig], tuple[Params, ModelConfig]]
"""(params, config) before -> after; where the config is the same, it is given back."""


class Row(NamedTuple):
    """One surgery, and what the laws need to know of it."""

    name: str
    change: Surgery
    """One that changes the model."""
    identity: Surgery
    """The same with the settings that change nothing."""
    lm: Callable[[ModelConfig], LM] = decoder
    """The model that runs its result, out of the result's config."""
    plain: Surgery | None = lambda params, config: (params, config)
    """Its result as a plain decoder's, for Hugging Face; None where no such model exists there."""
    model: ModelConfig = MODEL
    """Of the model before."""
    family: str = "llama"
    """Hugging Face's model_type for the plain result."""
    identity_lm: Callable[[ModelConfig], LM] | None = None
    """Of the identity, where the setting that changes nothing is one of the model and not of its params; None means `lm`."""
    atol: float = 2e-5
    """Of outputs on a mesh. Where inputs are rounded to integers, one that falls on the other side moves an output by a step."""


def heads(how: Any, number: int, params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    return resize.kv_heads(params, config, number, how, key=jax.random.key(3))


MOMENTS = (lambda x: np.einsum("LTD,LTE->LDE", x, x))(np.random.default_rng(4).normal(size=(2, 40, 17)))


def merged(number: int, params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    return resize.kv_heads(params, config, number, "svd", moments=MOMENTS)


def pruned(sizes: dict[str, int], options: dict[str, Any], params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    return prune.prune(params, config, importance.random(config, 3), Shape.of(config)._replace(**sizes), **options)


def with_surgery(config: ModelConfig, **settings: Any) -> LM:
    return language_model(TrainConfig(model=config, **settings), "float32")


def keep(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    return params, config


LORA = LoraConfig((("layers/.*/kernel", 2, 4.0),))
ADAPTERS = BottleneckConfig(3)
PREFIX = PrefixConfig(3, shift_positions=False)
TERNARY = BitnetConfig("b158", norm="rms", norm_sites=".*/(o|down)")


def added(settings: dict[str, Any], size: float, params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """The leaves that a model with these settings has besides, moved from their start by `size`."""
    fresh = jax.jit(lambda key: tree.partition(with_surgery(config, **settings).init(key), lambda path: re.fullmatch(ADDED, path))[0])
    moved = jax.tree.map(lambda leaf: leaf + size * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), fresh(jax.random.key(1)))
    return tree.merge(params, moved), config


def folded(size: float, params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    return adapters.merge(added({"lora": LORA}, size, params, config)[0], LORA), config


SURGERIES = (
    Row(
        "lora", partial(added, {"lora": LORA}, 0.1), partial(added, {"lora": LORA}, 0.0), lm=partial(with_surgery, lora=LORA),
        plain=lambda params, config: (adapters.merge(params, LORA), config),
    ),
    Row("lora, merged", partial(folded, 0.1), partial(folded, 0.0)),
    Row(
        "adapter layers", partial(added, {"bottleneck": ADAPTERS}, 0.3), partial(added, {"bottleneck": ADAPTERS}, 0.0),
        lm=partial(with_surgery, bottleneck=ADAPTERS), plain=None,
    ),
    Row("prefix", partial(added, {"prefix": PREFIX}, 1.0), keep, lm=partial(with_surgery, prefix=PREFIX), plain=None, identity_lm=decoder),
    Row("bitnet b1.58", keep, keep, lm=partial(with_surgery, bitnet=TERNARY), plain=None, identity_lm=decoder, atol=2e-2),
    Row("kv_heads mean", partial(heads, "mean", 2), partial(heads, "mean", 4)),
    Row("kv_heads first", partial(heads, "first", 2), partial(heads, "first", 4)),
    Row("kv_heads random", partial(heads, "random", 1), partial(heads, "random", 4)),
    Row("kv_heads svd", partial(merged, 2), partial(merged, 4)),
    Row(
        "kv_heads mean, biases and norms of heads", partial(heads, "mean", 1), partial(heads, "mean", 4),
        model=replace(MODEL, qkv_bias=True, qk_norm="head", norm_placement="both"), plain=None,
    ),
    Row("pruned width", partial(pruned, {"width": 8, "ff_width": 16}, {}), partial(pruned, {}, {})),
    Row(
        "pruned heads and layers", partial(pruned, {"num_heads": 2, "num_kv_heads": 2, "num_layers": 1}, {"merge_heads": -0.5}),
        partial(pruned, {}, {}),
    ),
    Row(
        "pruned, biases, root of the width", partial(pruned, {"width": 8, "num_heads": 2}, {"mend_norms": True}), partial(pruned, {}, {}),
        model=replace(MODEL, num_kv_heads=2, qkv_bias=True, qk_norm="head", norm_placement="both", embedding_scale=4.0), plain=None,
    ),
)  # fmt: skip

every_surgery = pytest.mark.parametrize("row", SURGERIES, ids=[row.name for row in SURGERIES])


def before(row: Row) -> Params:
    return jax.tree.map(jnp.asarray, random_params(row.model))


@cache
def compiled(build: Callable[[ModelConfig], LM], config: ModelConfig) -> Any:
    lm = build(config)
    return jax.jit(lambda params, tokens: lm.apply(params, tokens).hidden)


def hidden(build: Callable[[ModelConfig], LM], params: Params, config: ModelConfig) -> np.ndarray:
    return np.asarray(compiled(build, config)(params, TOKENS))


@cache
def untouched(model: ModelConfig) -> np.ndarray:
    """What the model before gives."""
    lm = decoder(model)
    return np.asarray(jax.jit(lambda params, tokens: lm.apply(params, tokens).hidden)(random_params(model), TOKENS))


@every_surgery
def test_it_changes_something(row: Row):
    params, config = row.change(before(row), row.model)
    got, want = hidden(row.lm, params, config), untouched(row.model)
    assert got.shape != want.shape or np.abs(got - want).max() > 1e-3


@every_surgery
def test_identity_changes_no_bit(row: Row):
    """No bit of the leaves that were there, and none of the output."""
    params, config = row.identity(before(row), row.model)
    for path, leaf in tree.items(before(row)):
        assert np.asarray(tree.get(params, path)).tobytes() == np.asarray(leaf).tobytes(), path
    want = untouched(row.model)
    np.testing.assert_array_equal(hidden(row.identity_lm or row.lm, params, config), want)


@every_surgery
def test_shapes_are_those_of_the_new_config(row: Row):
    params, config = row.change(before(row), row.model)
    shapes = jax.eval_shape(row.lm(config).init, jax.random.key(0))
    assert tree.structure_diff(shapes, params) == []
    assert {path: leaf.dtype for path, leaf in tree.items(params)} == {path: leaf.dtype for path, leaf in tree.items(shapes)}


@every_surgery
@pytest.mark.parametrize("data, model", [(4, 2), (2, 4)])
def test_sharded_equals_unsharded(row: Row, data: int, model: int):
    """Surgery on params that lie on a mesh, and the result run there."""
    params, config = row.change(before(row), row.model)
    mesh = sharding.make_mesh(MeshConfig(data=data, model=model))
    place = lambda leaves: jax.device_put(leaves, sharding.shardings(sharding.param_specs(leaves, mesh), mesh))
    with jax.set_mesh(mesh):
        on_mesh, _ = row.change(place(sharding.pad_vocab(before(row), model)), row.model)
        for path, leaf in tree.items(sharding.pad_vocab(params, model)):
            np.testing.assert_allclose(tree.get(on_mesh, path), leaf, rtol=1e-6, atol=1e-7, err_msg=path)
        lm = row.lm(config)
        got = jax.jit(lambda params, tokens: lm.apply(params, tokens).hidden)(place(on_mesh), TOKENS)
    np.testing.assert_allclose(got, hidden(row.lm, params, config), rtol=row.atol, atol=row.atol)


@every_surgery
def test_a_checkpoint_gives_the_same_bits_back(row: Row, tmp_path: Path):
    params, config = row.change(before(row), row.model)
    leaves = dict(tree.items(params))
    checkpoint_slices.write(tmp_path / "00000000", leaves, chunks_on(ONE_DEVICE, leaves), {}, config.vocab_size)
    shapes = jax.eval_shape(row.lm(config).init, jax.random.key(0))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one), shapes)
    back = load_params(tmp_path / "00000000", template, ("trainable",)).state
    for path, leaf in leaves.items():
        assert np.asarray(tree.get(back, path)).tobytes() == np.asarray(leaf).tobytes(), path


@pytest.mark.parametrize("row", [row for row in SURGERIES if row.plain], ids=[row.name for row in SURGERIES if row.plain])
def test_it_converts_to_hugging_face_and_back(row: Row):
    assert row.plain is not None
    params, config = row.plain(*row.change(before(row), row.model))
    params = jax.tree.map(np.asarray, params)
    back = params_from_hf(row.family, config, params_to_hf(row.family, config, params))
    assert set(tree.paths(back)) == set(tree.paths(params))
    for path, leaf in tree.items(params):
        np.testing.assert_array_equal(tree.get(back, path), leaf, err_msg=path)
