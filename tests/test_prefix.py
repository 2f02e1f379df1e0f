"""Prefix states: the oracles of the prefix-tuning card, a prefix per row, and what runs with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import gpt2_large, gpt2_medium
from jaxllm import optim, sharding, tree
from jaxllm.config import ConfigError, LayerKind, LoraConfig, MeshConfig, ModelConfig, OptimConfig, PrefixConfig
from jaxllm.contract import LM, Params, dot_in
from jaxllm.models.generate import complete, generator, sampler
from jaxllm.models.transformer import decoder
from jaxllm.surgery import adapters, prefix

MODEL = ModelConfig(num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_size=8, ff_width=48, vocab_size=50, max_length=64)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 50, (3, 12)))
CONTEXT = jnp.asarray(np.random.default_rng(1).integers(1, 50, (1, 4)))
SEPARATOR = 0


def hidden(lm: LM, params: Params, tokens: Any = TOKENS, **options: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, t, o: lm.apply(p, t, **o).hidden)(params, tokens, options))


def tuned(config: PrefixConfig, model: ModelConfig = MODEL, seed: int = 0) -> tuple[LM, LM, Params]:
    """(the model, the model with a prefix, its params, with states large enough to matter)."""
    lm = decoder(model)
    with_it = prefix.with_prefix(lm, config)
    params = with_it.init(jax.random.key(seed))
    if "keys" in params["prefix"]:
        params = {**params, "prefix": jax.tree.map(lambda x: 30 * x, params["prefix"])}
    return lm, with_it, params


def without(params: Params) -> Params:
    return {name: part for name, part in params.items() if name != "prefix"}


# ------------------------------------------------------------------------------------------ the states


@pytest.mark.parametrize(("model", "length", "hidden_width", "count"), [
    (gpt2_medium, 5, 0, 245_760), (gpt2_medium, 10, 0, 491_520), (gpt2_large, 10, 0, 921_600), (gpt2_medium, 5, 512, 25_744_896),
])  # fmt: skip
def test_published_counts(model: ModelConfig, length: int, hidden_width: int, count: int):
    shapes = jax.eval_shape(prefix.with_prefix(decoder(model), PrefixConfig(length, hidden_width)).init, jax.random.key(0))
    assert tree.count(shapes["prefix"]) == count
    trained, frozen = optim.split(OptimConfig(freeze=prefix.TRAIN_ONLY_PREFIX), shapes)
    assert set(trained) == {"prefix"} and "prefix" not in frozen


@pytest.mark.parametrize(("length", "count"), [(100, 7_372_800), (200, 14_745_600)])
def test_published_counts_of_bart_large(length: int, count: int):
    """Three stacks of 12 layers have a prefix each: the encoder's attention, the decoder's, and that across."""
    stack = replace(gpt2_medium, num_layers=12)
    shapes = jax.eval_shape(prefix.with_prefix(decoder(stack), PrefixConfig(length)).init, jax.random.key(0))
    assert 3 * tree.count(shapes["prefix"]) == count


@pytest.mark.parametrize("config", [PrefixConfig(3, hidden=16), PrefixConfig(3, place="embedding"), PrefixConfig(3)])
def test_materialised_states_give_the_same_outputs(config: PrefixConfig):
    lm, with_it, params = tuned(config)
    states, kept = prefix.materialise(params, lm, config)
    assert set(states["prefix"]) == {"keys", "values"} and kept == PrefixConfig(3)
    np.testing.assert_allclose(hidden(prefix.with_prefix(lm, kept), states), hidden(with_it, params), atol=1e-6)


@pytest.mark.parametrize(("model", "shift"), [
    (MODEL, True), (MODEL, False), (replace(MODEL, position="learned"), True), (replace(MODEL, position="none", qk_norm="head"), True),
])  # fmt: skip
def test_states_of_a_real_text_are_that_text_as_context(model: ModelConfig, shift: bool):
    lm = decoder(model)
    params = lm.init(jax.random.key(0))
    config = PrefixConfig(4, shift_positions=shift, init_text="words")
    own = prefix.from_text(lm, params, config, CONTEXT[0].tolist())
    got = hidden(prefix.with_prefix(lm, config), {**params, "prefix": own})
    want = hidden(lm, params, jnp.concatenate([jnp.broadcast_to(CONTEXT, (3, 4)), TOKENS], axis=1))[:, 4:]
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_an_embedding_prefix_is_its_tokens_as_context():
    lm, config = decoder(MODEL), PrefixConfig(4, place="embedding", init_text="words")
    params = lm.init(jax.random.key(0))
    own = prefix.from_text(lm, params, config, CONTEXT[0].tolist())
    want = hidden(lm, params, jnp.concatenate([jnp.broadcast_to(CONTEXT, (3, 4)), TOKENS], axis=1))[:, 4:]
    np.testing.assert_allclose(hidden(prefix.with_prefix(lm, config), {**params, "prefix": own}), want, atol=2e-5)


def test_a_short_text_is_repeated():
    lm = decoder(MODEL)
    own = prefix.from_text(lm, lm.init(jax.random.key(0)), PrefixConfig(5, place="embedding", init_text="ab"), [3, 4])
    np.testing.assert_array_equal(own["embedding"][0], own["embedding"][4])


def test_the_lambda_identity_for_one_head():
    """Scores q·K = (0, 0) and q·P = 0: the prefix has a third of the weight. Far below, it has none."""
    lm = decoder(replace(MODEL, position="none"))
    with_it = prefix.with_prefix(lm, PrefixConfig(1))
    params = lm.init(jax.random.key(0))
    attention = params["layers"]["attention"]
    attention["q"]["kernel"] = jnp.zeros_like(attention["q"]["kernel"])  # every score is 0
    states = {"keys": jnp.ones((2, 1, 2, 8)), "values": jnp.ones((2, 1, 2, 8))}
    run = lambda lm, params: lm.apply(params, TOKENS[:1, :2], taps=("attention_heads",)).taps["attention_heads"][0, 0, 1]
    own = run(lm, params)
    np.testing.assert_allclose(run(with_it, {**params, "prefix": states}), 2 / 3 * own + 1 / 3 * 1.0, atol=1e-6)
    attention["q"]["kernel"] = jnp.zeros_like(attention["q"]["kernel"]).at[:, 0].set(1.0)
    far = {**states, "keys": -1e4 * jnp.sign(TOKENS.sum()) * jnp.ones((2, 1, 2, 8))}
    got = np.asarray(with_it.apply({**params, "prefix": far}, TOKENS[:1, :2]).hidden)
    assert np.isfinite(got).all()


def test_a_zero_prefix_changes_the_output_and_a_hidden_one_does_not():
    lm = decoder(replace(MODEL, position="none"))
    params = lm.init(jax.random.key(0))
    zero = {"keys": jnp.zeros((2, 3, 2, 8)), "values": jnp.zeros((2, 3, 2, 8))}
    plain = hidden(lm, params)
    assert np.abs(hidden(prefix.with_prefix(lm, PrefixConfig(3)), {**params, "prefix": zero}) - plain).max() > 1e-3
    unseen = lm.apply(
        params,
        TOKENS,
        prefix=(zero["keys"][:, None] + 5, zero["values"][:, None] + 5),
        prefix_segments=(None, jnp.zeros((1, 3), jnp.int32)),
    )
    np.testing.assert_allclose(unseen.hidden, plain, atol=1e-6)


# ---------------------------------------------------------------------------------- with everything else


VARIANTS = {
    "rope": MODEL,
    "windows": replace(MODEL, num_layers=3, layer_pattern=(LayerKind(window=4), LayerKind())),
    "alibi": replace(MODEL, position="alibi"),
    "learned": replace(MODEL, position="learned"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_is_a_full_pass(name: str):
    """Greedy tokens of the cached generator are those of argmax over full passes; the prefix never enters the ids."""
    _, lm, params = tuned(PrefixConfig(5), VARIANTS[name])
    prompts, new = [[1, 2, 3], [4, 5, 6, 7, 8, 9]], 6
    got = complete(generator(lm, sampler(0.0)), params, prompts, num_tokens=new)
    for prompt, ids in zip(prompts, got, strict=True):
        row = jnp.asarray([prompt + ids])
        best = np.argmax(np.asarray(lm.unembed(params).logits(hidden(lm, params, row))), -1)[0]
        assert best[len(prompt) - 1 : -1].tolist() == ids


def test_remat_changes_no_gradient():
    config = PrefixConfig(3, hidden=16)
    _, plain, params = tuned(config)
    again = prefix.with_prefix(decoder(MODEL, remat="full"), config)
    grad = lambda lm: jax.jit(jax.grad(lambda own: jnp.square(lm.apply({**params, "prefix": own}, TOKENS).hidden).sum()))(params["prefix"])
    for (path, want), (_, got) in zip(tree.items(grad(plain)), tree.items(grad(again)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()), err_msg=path)
        assert np.abs(want).max() > 0


def test_packed_documents_all_see_the_prefix():
    _, lm, params = tuned(PrefixConfig(3))
    one, two = TOKENS[:1, :5], TOKENS[:1, 5:]
    packed = hidden(
        lm, params, TOKENS[:1],
        positions=jnp.asarray([[*range(5), *range(7)]]), segment_ids=jnp.asarray([[1] * 5 + [2] * 7]),
    )  # fmt: skip
    np.testing.assert_allclose(packed[:, :5], hidden(lm, params, one), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], hidden(lm, params, two), atol=1e-5)


def test_rows_with_prefixes_of_their_own_are_one_at_a_time():
    lm, with_it, params = tuned(PrefixConfig(3))
    _, longer, other = tuned(PrefixConfig(6), seed=5)
    mixed = {**without(params), "prefix": prefix.stack([params["prefix"], other["prefix"]])}
    together = hidden(with_it, prefix.select(mixed, jnp.array([1, -1, 0])))
    np.testing.assert_allclose(together[0], hidden(longer, {**without(params), "prefix": other["prefix"]}, TOKENS[:1])[0], atol=1e-5)
    np.testing.assert_allclose(together[1], hidden(lm, without(params), TOKENS[1:2])[0], atol=1e-5)
    np.testing.assert_allclose(together[2], hidden(with_it, params, TOKENS[2:])[0], atol=1e-5)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    got = complete(generator(with_it, sampler(0.0)), prefix.select(mixed, jnp.array([1, -1, 0])), prompts, num_tokens=5)
    alone = complete(generator(with_it, sampler(0.0)), params, prompts[2:], num_tokens=5)
    assert got[2] == alone[0]


def test_sharded_equals_unsharded():
    """On 2 × 2 × 2 devices; other meshes are among the laws of surgery."""
    _, lm, params = tuned(PrefixConfig(3), replace(MODEL, vocab_size=64))
    tokens = jnp.asarray(np.random.default_rng(2).integers(1, 50, (8, 8)))
    value = lambda own, rest, tokens: jnp.square(lm.apply({**rest, "prefix": own}, tokens).hidden).mean()
    want = jax.jit(jax.grad(value))(params["prefix"], without(params), tokens)
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(sharding.param_specs(params, mesh), mesh))
        got = jax.jit(jax.grad(value))(placed["prefix"], without(placed), jax.device_put(tokens, sharding.batch_sharding(mesh)))
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-5, err_msg=name)


# ------------------------------------------------------------------------------------------------ infix


def test_an_infix_is_seen_from_the_separator_on():
    config = PrefixConfig(3, place="infix", separator=SEPARATOR)
    lm, with_it, params = tuned(config)
    tokens = TOKENS.at[:, 5].set(SEPARATOR)
    moved = {**params, "prefix": jax.tree.map(lambda x: x + 1.0, params["prefix"])}
    a, b = hidden(with_it, params, tokens), hidden(with_it, moved, tokens)
    np.testing.assert_array_equal(a[:, :5], b[:, :5], err_msg="x does not see it")
    assert np.abs(a[:, 5:] - b[:, 5:]).max(axis=(0, 2)).min() > 1e-4, "everything after does"
    before = prefix.with_prefix(lm, PrefixConfig(3))
    assert np.abs(hidden(before, params, tokens)[:, :5] - hidden(before, moved, tokens)[:, :5]).max() > 1e-4, "a prefix is seen by x"


def test_an_infix_in_packed_rows_begins_anew_with_each_document():
    config = PrefixConfig(3, place="infix", separator=SEPARATOR)
    _, lm, params = tuned(config)
    row = TOKENS[:1].at[0, 2].set(SEPARATOR).at[0, 9].set(SEPARATOR)
    packed = hidden(
        lm, params, row, positions=jnp.asarray([[*range(6), *range(6)]]), segment_ids=jnp.asarray([[1] * 6 + [2] * 6])
    )  # fmt: skip
    np.testing.assert_allclose(packed[:, 6:], hidden(lm, params, row[:, 6:]), atol=1e-5)


def test_an_infix_decodes_as_it_trains():
    config = PrefixConfig(3, place="infix", separator=SEPARATOR)
    _, lm, params = tuned(config)
    prompt = [4, 5, 6, SEPARATOR]
    (ids,) = complete(generator(lm, sampler(0.0)), params, [prompt], num_tokens=5)
    best = np.argmax(np.asarray(lm.unembed(params).logits(hidden(lm, params, jnp.asarray([prompt + ids])))), -1)[0]
    assert best[3:-1].tolist() == ids


# -------------------------------------------------------------------------------------------- bad input


def test_what_cannot_work_is_refused():
    learned = replace(MODEL, position="learned", max_length=16)
    with pytest.raises(ConfigError, match="prefix of 40 leaves no room in the model's context of 16 tokens"):
        prefix.with_prefix(decoder(replace(MODEL, max_length=16)), PrefixConfig(40))
    lm = prefix.with_prefix(decoder(learned), PrefixConfig(5))
    with pytest.raises(ConfigError, match="prefix of 5 and 12 tokens"):
        lm.apply(lm.init(jax.random.key(0)), TOKENS)
    with pytest.raises(ConfigError, match=r"prefix\.separator"):
        PrefixConfig(3, place="infix")
    with pytest.raises(ConfigError, match="neither can be negative"):
        PrefixConfig(-1)
    plain, params = decoder(MODEL), decoder(MODEL).init(jax.random.key(0))
    with pytest.raises(ConfigError, match="has no tokens"):
        prefix.from_text(plain, params, PrefixConfig(3, init_text=""), [])
    with pytest.raises(ConfigError, match="use one of the two"):
        prefix.from_text(plain, params, PrefixConfig(3, hidden=8, init_text="a"), [1])


def test_prefixes_of_unlike_models_do_not_stack():
    _, _, small = tuned(PrefixConfig(3))
    _, _, other = tuned(PrefixConfig(3), replace(MODEL, num_kv_heads=4))
    with pytest.raises(ConfigError, match="prefix 1 has states"):
        prefix.stack([small["prefix"], other["prefix"]])
    _, _, mlp = tuned(PrefixConfig(3, hidden=8))
    with pytest.raises(ConfigError, match="materialise"):
        prefix.stack([mlp["prefix"]])


def test_adapters_and_prefixes_of_each_row_at_once():
    """Row 0: adapter and prefix; row 1: neither; row 2: prefix alone."""
    plain = dot_in("float32")
    lora = LoraConfig((("layers/attention/[qv]/kernel", 2, 4.0),))
    lm = prefix.with_prefix(decoder(MODEL, dot=adapters.lora_dot(LoraConfig(), plain, plain)), PrefixConfig(3))
    base = decoder(MODEL).init(jax.random.key(0))
    delta = jax.tree.map(lambda x: x + 0.1, adapters.init_leaves(base, lora, jax.random.key(1)))
    _, _, params = tuned(PrefixConfig(3))
    states = params["prefix"]
    both = adapters.select(tree.merge(base, adapters.stack([(delta, lora)], base)), jnp.array([0, -1, -1]))
    both = prefix.select({**both, "prefix": prefix.stack([states])}, jnp.array([0, -1, 0]))
    got = hidden(lm, both)
    folded = adapters.merge(tree.merge(base, delta), lora)
    with_states = prefix.with_prefix(decoder(MODEL), PrefixConfig(3))
    np.testing.assert_allclose(got[0], hidden(with_states, {**folded, "prefix": states}, TOKENS[:1])[0], atol=2e-5)
    np.testing.assert_allclose(got[1], hidden(decoder(MODEL), base, TOKENS[1:2])[0], atol=2e-5)
    np.testing.assert_allclose(got[2], hidden(with_states, {**base, "prefix": states}, TOKENS[2:])[0], atol=2e-5)
