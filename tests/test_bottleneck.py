"""Adapter layers, and what a low-rank change does to a matrix."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import pretrain, tree
from jaxllm.config import BottleneckConfig, ConfigError, TrainConfig
from jaxllm.models.transformer import decoder
from jaxllm.surgery import subspace
from tests.tiny import config as TINY

TOKENS = jnp.arange(12).reshape(2, 6)


def test_adapter_layers_start_as_nothing_and_are_a_residual_mlp():
    config = replace(TINY, bottleneck=BottleneckConfig(3, ("mlp/down",)))
    lm = pretrain.language_model(config, "float32")
    params = lm.init(jax.random.key(0))
    base = tree.partition(params, lambda path: "adapter_" not in path)[0]
    plain = decoder(config.model)
    np.testing.assert_array_equal(lm.apply(params, TOKENS).hidden, plain.apply(base, TOKENS).hidden)
    assert tree.count(params) - tree.count(base) == 2 * 2 * 32 * 3
    down = params["layers"]["mlp"]["down"]
    down["adapter_up"] = jax.random.normal(jax.random.key(1), down["adapter_up"].shape)
    taps = lm.apply(params, TOKENS, taps=("mlp_hidden", "mlp_output")).taps
    for layer in range(2):
        y = np.asarray(taps["mlp_hidden"][layer] @ down["kernel"][layer], np.float64)
        hidden = np.asarray(jax.nn.gelu(y @ np.asarray(down["adapter_down"][layer])))
        np.testing.assert_allclose(taps["mlp_output"][layer], y + hidden @ np.asarray(down["adapter_up"][layer]), atol=1e-5)


def test_sites_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"mlp/dwn.*mlp/down"):
        pretrain.language_model(TrainConfig(bottleneck=BottleneckConfig(3, ("mlp/dwn",))), "float32")
    with pytest.raises(ConfigError, match="at least 1"):
        BottleneckConfig(-1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_the_overlap_of_subspaces(i: int, j: int, seed: int):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(9, 4)), rng.normal(size=(9, 4))
    phi = subspace.similarity(a, b, i, j)
    assert -1e-9 <= phi <= 1 + 1e-9
    assert phi == pytest.approx(subspace.similarity(b, a, j, i)), "symmetric"
    assert subspace.similarity(a, a, i, i) == pytest.approx(1.0)
    assert subspace.similarity(a @ rng.normal(size=(4, 4)), a, 4, 4) == pytest.approx(1.0), "another basis of one space"
    u, v = (np.linalg.svd(x, full_matrices=False)[0][:, :n] for x, n in ((a, i), (b, j)))
    cosines = np.linalg.svd(u.T @ v, compute_uv=False)
    distance = np.sqrt(max(0.0, min(i, j) - np.square(cosines).sum()))
    assert phi == pytest.approx(1 - distance**2 / min(i, j)), "projection distance"


def test_amplification_of_a_change_along_the_kernel_s_own_directions():
    kernel = np.diag([10.0, 5.0, 1.0, 0.5])
    change = np.zeros((4, 4))
    change[2, 2] = 6.0
    got = subspace.amplification(kernel, change, rank=1)
    assert (got.change, got.seen, got.own) == pytest.approx((6.0, 1.0, 10.0))
    assert got.factor == pytest.approx(6.0)
    assert got.random < 10.0
