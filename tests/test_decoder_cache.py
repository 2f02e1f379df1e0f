"""Decoding with a cache gives what the whole row gives, in every layout of the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LayerKind, ModelConfig
from jaxllm.models.transformer import decoder
from tests.reference_decoder import BASE, GPT, Extras, random_params, ref_hidden

CACHED: dict[str, ModelConfig] = {
    "mqa, alibi, rings and dense": replace(BASE, num_kv_heads=1, position="alibi", layer_pattern=(LayerKind(window=3), LayerKind())),
    "mha, learned, memory": replace(BASE, **GPT, num_layers=2, cross_attention=True, attention_scale=0.3),
    "gqa, rope, prefix-LM, prefix states, a ring": replace(
        BASE, mask="prefix", num_layers=2, block="parallel", qk_norm="head", attention_soft_cap=1.0, layer_pattern=(LayerKind(window=5),)
    ),
}


@pytest.mark.parametrize("name", CACHED)
def test_cached_decode_equals_the_whole_row(name: str):
    """Chunks of 4 and 4 with ragged ends, then one token at a time, past the point where rings wrap."""
    c, rng = CACHED[name], np.random.default_rng(5)
    lm, params = decoder(c), random_params(c)
    lengths, steps = np.array([8, 5, 7]), 3
    tokens = rng.integers(1, c.vocab_size, (3, lengths.max() + steps)).astype(np.int32)
    kw: dict[str, Any] = {}
    extras = Extras()
    if c.cross_attention:
        memory = rng.normal(size=(3, 6, c.width)).astype(np.float32)
        memory[1:] = memory[0]
        kw, extras = {"memory": memory}, Extras(memory=memory[0])
    marks = np.zeros((3, 4), bool)
    if c.mask == "prefix":
        marks[:, :3] = True
        prefix = rng.normal(size=(2, c.num_layers, 1, 2, c.num_kv_heads, c.head_size)).astype(np.float32)
        kw, extras = {"prefix": tuple(prefix)}, Extras(prefix=tuple(prefix[:, :, 0]), prefix_mask=np.arange(11) < 3)

    @jax.jit
    def chunk(params: Any, tokens: Any, positions: Any, real: Any, marks: Any, cache: Any, kw: Any) -> Any:
        out = lm.apply(params, tokens, positions=positions, segment_ids=real.astype(jnp.int32), prefix_mask=marks, cache=cache, **kw)
        return out.hidden, out.cache

    got: list[list[np.ndarray]] = [[], [], []]
    cache, ones = lm.init_cache(3, int(lengths.max()) + steps), np.ones((3, 1), bool)
    for first in (0, 4):
        at = np.arange(first, first + 4)[None].repeat(3, 0)
        real = at < lengths[:, None]
        hidden, cache = chunk(params, tokens[:, first : first + 4], at, real, marks if first == 0 else marks * False, cache, kw)
        for row in range(3):
            got[row] += list(np.asarray(hidden)[row][real[row]])
    for step in range(steps):
        at = (lengths + step)[:, None]
        hidden, cache = chunk(params, np.take_along_axis(tokens, at, 1), at, ones, ones * False, cache, kw)
        for row in range(3):
            got[row].append(np.asarray(hidden)[row, 0])
    for row in range(3):
        n = lengths[row] + steps
        want = ref_hidden(c, params, tokens[row, :n], np.arange(n), np.ones(n), extras)
        np.testing.assert_allclose(np.array(got[row]), want, rtol=2e-5, atol=2e-5)


def test_a_window_has_a_ring_of_its_own_size():
    cache = decoder(CACHED["mqa, alibi, rings and dense"]).init_cache(2, 8)
    assert [k.shape for k in cache.keys] == [(2, 2, 1, 3, 4), (1, 2, 1, 8, 4)]
    assert [v.shape for v in cache.values] == [k.shape for k in cache.keys]
