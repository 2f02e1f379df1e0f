"""The decoder against its naive re-implementation in NumPy float64 (tests/reference_decoder.py), and its laws.

Every case runs three rows through one compiled function: documents A and B packed in one row, A alone, B alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import sharding, tree
from jaxllm.config import ConfigError, LayerKind, ModelConfig, RopeConfig
from jaxllm.models.transformer import decoder
from tests.reference_decoder import BASE, BIASES, GPT, Extras, random_params, ref_attention, ref_hidden, ref_norm, ref_rotate

WINDOWS = (LayerKind(window=2, rope=RopeConfig(base=100.0)), LayerKind())
YARN = RopeConfig(base=500.0, scaling="yarn", factor=4.0, original_max_length=64, beta_fast=8.0)

CASES: dict[str, ModelConfig] = {
    "before rms": BASE,
    "before layer, gpt3": replace(BASE, **GPT, layer_pattern=(LayerKind(), LayerKind(window=3))),
    "after rms, olmo2": replace(BASE, norm_placement="after", qk_norm="full", tied_embeddings=False),
    "after layer, mpt": replace(BASE, norm_placement="after", norm="layer", position="alibi", num_kv_heads=1, activation="gelu"),
    "both rms, gemma": replace(
        BASE, norm_placement="both", norm_plus_one=True, qk_norm="head", activation="geglu_tanh", embedding_scale=3.5,
        attention_scale=0.3, layer_pattern=WINDOWS,
    ),
    "both layer, bias": replace(
        BASE, norm_placement="both", norm="layer", norm_plus_one=True, norm_bias=True, position="none", attention_soft_cap=0.7,
        activation="geglu",
    ),
    "after_residual rms, embeddings": replace(
        BASE, norm_placement="after_residual", activation="reglu2", mlp_bias=True, embedding_scale=2.0, layer_pattern=(LayerKind(window=3),)
    ),
    "after_residual layer, gpt1": replace(BASE, **GPT, norm_placement="after_residual", final_norm=False),
    "parallel before, palm": replace(BASE, block="parallel", norm="layer", num_kv_heads=1, logit_scale=12**-0.5, init="fan_in"),
    "parallel before two norms, neox": replace(
        BASE, **BIASES, block="parallel", parallel_norms=2, norm="layer", norm_bias=True, activation="gelu", rope=RopeConfig(fraction=0.5),
    ),
    "parallel after": replace(BASE, block="parallel", parallel_norms=2, norm_placement="after", qk_norm="head"),
    "parallel both": replace(BASE, block="parallel", parallel_norms=2, norm_placement="both", norm_plus_one=True),
    "parallel after_residual": replace(
        BASE, block="parallel", norm_placement="after_residual", norm="layer", norm_bias=True, activation="relu2",
    ),
    "five layers of three kinds": replace(BASE, num_layers=5, head_size=8, layer_pattern=(*WINDOWS, LayerKind(window=4, rope=YARN))),
    "fewer layers than kinds": replace(BASE, num_layers=1, layer_pattern=WINDOWS),
    "banded, one layer": replace(BASE, num_layers=1, layer_pattern=(LayerKind(window=3),)),
    "prefix-LM": replace(BASE, mask="prefix", num_kv_heads=4),
    "prefix-LM, window, alibi": replace(BASE, mask="prefix", position="alibi", layer_pattern=(LayerKind(window=2),)),
    "bidirectional, window, alibi": replace(BASE, mask="bidirectional", position="alibi", layer_pattern=(LayerKind(window=3),)),
    "cross_attention": replace(BASE, **BIASES, cross_attention=True, memory_width=7, norm_placement="both", qk_norm="head"),
    "prefix states": replace(BASE, position="alibi", layer_pattern=(LayerKind(window=2), LayerKind())),
}  # fmt: skip

T, A, B = 10, 4, 5  # row length, lengths of documents A and B
SEGMENTS = np.array([[1] * A + [2] * B + [0], [1] * A + [0] * (T - A), [1] * B + [0] * (T - B)], np.int32)
POSITIONS = np.array([[*range(A), *range(B), 0], range(T), range(T)], np.int32)


def by_rows(packed: np.ndarray) -> np.ndarray:
    """[T …] values of the packed row → those of the three rows."""
    rows = np.zeros((3, *packed.shape), packed.dtype)
    rows[0], rows[1, :A], rows[2, :B] = packed, packed[:A], packed[A : A + B]
    return rows


@cache
def compiled(config: ModelConfig) -> Any:
    lm = decoder(config)
    return jax.jit(
        lambda params, inputs, kw: (
            lm.apply(params, inputs, positions=jnp.asarray(POSITIONS), segment_ids=jnp.asarray(SEGMENTS), **kw).hidden
        )
    )


@cache
def case_inputs(name: str) -> tuple[np.ndarray, dict[str, Any], list[Extras]]:
    """(inputs, keyword arguments of apply, the same for the reference by row)."""
    c, rng = CASES[name], np.random.default_rng(2)
    inputs = by_rows(rng.integers(1, c.vocab_size, T).astype(np.int32))
    if name.endswith("embeddings"):
        inputs = by_rows(rng.normal(size=(T, c.width)).astype(np.float32))
    if c.mask == "prefix":
        marks = by_rows(np.array([1, 1, 0, 0, 1, 1, 1, 0, 0, 0], bool))
        return inputs, {"prefix_mask": marks}, [Extras(prefix_mask=m) for m in marks]
    if name.endswith("bias"):
        bias = rng.normal(size=(3, c.num_heads, T, T)).astype(np.float32)
        return inputs, {"bias": bias}, [Extras(bias=b) for b in bias]
    if c.cross_attention:
        memory = rng.normal(size=(3, 6, 7)).astype(np.float32)  # three entries for A, two for B, one of padding
        memory[1], memory[2, :2] = memory[0], memory[0, 3:5]
        owner = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]], np.int32)
        return inputs, {"memory": memory, "memory_segment_ids": owner}, [Extras(memory=m, memory_segments=r) for m, r in zip(memory, owner)]
    if name == "prefix states":
        keys, values = rng.normal(size=(2, c.num_layers, 1, 3, c.num_kv_heads, c.head_size)).astype(np.float32)
        return inputs, {"prefix": (keys, values)}, [Extras(prefix=(keys[:, 0], values[:, 0]))] * 3
    return inputs, {}, [Extras()] * 3


@cache
def case_hidden(name: str) -> np.ndarray:
    inputs, kw, _ = case_inputs(name)
    return np.asarray(compiled(CASES[name])(random_params(CASES[name]), inputs, kw))


@pytest.mark.parametrize("name", CASES)
def test_equals_numpy(name: str):
    inputs, _, extras = case_inputs(name)
    hidden, real = case_hidden(name), SEGMENTS > 0
    assert np.isfinite(hidden).all()
    for row in range(3):
        want = ref_hidden(CASES[name], random_params(CASES[name]), inputs[row], POSITIONS[row], SEGMENTS[row], extras[row])
        np.testing.assert_allclose(hidden[row][real[row]], want[real[row]], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("bias")])
def test_packed_rows_equal_separate_rows(name: str):
    hidden = case_hidden(name)
    np.testing.assert_allclose(hidden[0, :A], hidden[1, :A], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hidden[0, A : A + B], hidden[2, :B], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_token_changes_its_own_document_from_itself_on(name: str):
    inputs, kw, _ = case_inputs(name)
    t, other = A + 2, inputs.copy()  # the third token of B in the packed row
    other[0, t] = inputs[0, t] + (1 if inputs.ndim == 3 else -1)
    hidden = np.asarray(compiled(CASES[name])(random_params(CASES[name]), other, kw))
    changed = np.flatnonzero(np.abs(hidden[0] - case_hidden(name)[0]).max(-1) > 0)
    reach = {"prefix-LM": A, "prefix-LM, window, alibi": A, "bidirectional, window, alibi": A}.get(name, t)
    assert set(changed) <= set(range(reach, A + B)), changed
    assert changed[0] == reach
    np.testing.assert_array_equal(hidden[1:], case_hidden(name)[1:])


def test_a_band_sees_its_window_and_no_further():
    c, (inputs, _, _) = CASES["banded, one layer"], case_inputs("banded, one layer")
    other = inputs.copy()
    other[0, A] = inputs[0, A] - 1  # the first token of B; the window is 3
    moved = np.asarray(compiled(c)(random_params(c), other, {}))[0] != case_hidden("banded, one layer")[0]
    assert np.flatnonzero(moved.any(-1)).tolist() == [A, A + 1, A + 2]


def test_segments_and_positions_may_be_left_out():
    name = "before rms"
    params, (inputs, _, _) = random_params(CASES[name]), case_inputs(name)
    plain = np.asarray(jax.jit(lambda p, x: decoder(CASES[name]).apply(p, x).hidden)(params, inputs))
    np.testing.assert_allclose(plain[2, :B], case_hidden(name)[2, :B], atol=1e-5)
    want = ref_hidden(CASES[name], params, inputs[0], np.arange(T), np.ones(T))
    np.testing.assert_allclose(plain[0], want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_logits(tied: bool):
    c = replace(BASE, tied_embeddings=tied, logit_scale=0.5, logit_soft_cap=2.0, embedding_scale=7.0)
    params, hidden = jax.tree.map(jnp.asarray, random_params(c)), jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 12)), jnp.float32)
    table = params["embed"]["tokens"] if tied else params["unembed"]["kernel"]
    want = 2.0 * np.tanh(0.5 * np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T / 2.0)
    np.testing.assert_allclose(decoder(c).unembed(params).logits(hidden), want, atol=1e-5)
    padded = decoder(c).unembed(sharding.pad_vocab(params, 8)).logits(hidden)
    np.testing.assert_allclose(padded[..., :19], want, atol=1e-5)
    assert padded.shape[-1] == 24 and (padded[..., 19:] == -np.inf).all()


@pytest.mark.parametrize("precision, hidden", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16_matmul", "float32")])
def test_types(precision: Any, hidden: str):
    lm = decoder(BASE, precision=precision)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
    out, logits = jax.eval_shape(lambda p: (h := lm.apply(p, jnp.zeros((1, 3), int)).hidden, lm.unembed(p).logits(h)), params)
    assert (str(out.dtype), str(logits.dtype)) == (hidden, "float32")


# --------------------------------------------------------------------------------- rows of the papers


def test_palm_block_without_down_matrix_is_x_plus_attention():
    c = CASES["parallel before, palm"]
    params = random_params(c)
    params = tree.map_with_path(lambda path, leaf: leaf * 0 if path == "layers/mlp/down/kernel" else leaf, params)
    inputs = case_inputs("parallel before, palm")[0]
    serial = tree.from_items([(path, leaf) for path, leaf in tree.items(params) if not path.startswith("layers/mlp")])
    x = serial["embed"]["tokens"][inputs[0]].astype(np.float64)
    for layer in range(c.num_layers):
        p = jax.tree.map(lambda leaf: leaf[layer].astype(np.float64), serial["layers"])
        turn = partial(ref_rotate, c.rope, positions=POSITIONS[0])
        sees = lambda i, j: j <= i and SEGMENTS[0, i] == SEGMENTS[0, j] > 0
        u = ref_norm(c, p["attention_norm"], x)
        x = x + ref_attention(c, p["attention"], u, u, sees, turn, Extras(), layer)
    hidden = np.asarray(compiled(c)(params, inputs, {}))[0]
    np.testing.assert_allclose(hidden[: A + B], ref_norm(c, params["final_norm"], x)[: A + B], rtol=2e-5, atol=2e-5)


def test_multi_query_equals_multi_head_with_tiled_kernels():
    name = "parallel before, palm"
    c, inputs = replace(CASES[name], num_kv_heads=4), case_inputs(name)[0]

    def tile(path: str, leaf: np.ndarray) -> np.ndarray:
        return np.repeat(leaf, 4, axis=2) if path in ("layers/attention/k/kernel", "layers/attention/v/kernel") else leaf

    hidden = compiled(c)(tree.map_with_path(tile, random_params(CASES[name])), inputs, {})
    np.testing.assert_allclose(hidden, case_hidden(name), atol=1e-5)


@pytest.mark.parametrize("kind", ["normal", "fan_in"])
def test_init(kind: Any):
    c = ModelConfig(num_layers=3, width=48, num_heads=4, num_kv_heads=2, head_size=16, ff_width=80, vocab_size=300, max_length=64,
                    position="learned", tied_embeddings=False, init=kind, init_std=0.03, **BIASES)  # fmt: skip
    params = dict(tree.items(jax.jit(decoder(c).init)(jax.random.key(0))))
    if kind == "normal":  # residual outputs over sqrt(2L)
        inner, out = dict.fromkeys(("attention/q", "attention/k", "attention/v", "mlp/gate", "mlp/up"), 0.03), 0.03 / math.sqrt(6)
        want = {**inner, "attention/o": out, "mlp/down": out}
        embed = unembed = 0.03
    else:  # n_in^-0.5, where attention/o reads N·H numbers
        inner = dict.fromkeys(("attention/q", "attention/k", "attention/v", "mlp/gate", "mlp/up"), 48**-0.5)
        want, embed, unembed = {**inner, "attention/o": 64**-0.5, "mlp/down": 80**-0.5}, 1.0, 48**-0.5
    expected = {f"layers/{name}/kernel": std for name, std in want.items()} | {"embed/tokens": embed, "unembed/kernel": unembed}
    for path, std in expected.items():
        leaf = np.asarray(params[path])
        assert leaf.std() == pytest.approx(std, rel=0.06), path
        assert abs(leaf.mean()) < 0.1 * std
        assert path[0] != "l" or np.abs(leaf[0] - leaf[1]).min() > 0 or np.abs(leaf[0] - leaf[1]).mean() > std, "layers start alike"
    assert not np.allclose(params["layers/mlp/up/kernel"], params["layers/mlp/gate/kernel"])
    for path, leaf in params.items():
        if path.endswith(("bias", "scale")):
            assert (np.asarray(leaf) == path.endswith("scale")).all(), path


# ---------------------------------------------------------------------------------------------- errors


def test_a_row_longer_than_the_learned_positions_is_refused():
    c = replace(BASE, position="learned", max_length=4)
    with pytest.raises(ConfigError, match=r"5 tokens.*learned positions for 4"):
        jax.eval_shape(lambda p: decoder(c).apply(p, jnp.zeros((1, 5), int)), random_params(c))
