"""Low-rank deltas: the oracles of the LoRA card, mixed batches, and what runs with them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.models import gpt2, gpt2_large, gpt2_medium, gpt3_175b
from jaxllm import optim, tree
from jaxllm.config import ConfigError, LoraConfig, ModelConfig, OptimConfig
from jaxllm.contract import LM, Params, dot_in
from jaxllm.models.generate import complete, generator, sampler
from jaxllm.models.transformer import decoder
from jaxllm.surgery import adapters

PLAIN = dot_in("float32")
MODEL = ModelConfig(
    num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_size=8, ff_width=48, vocab_size=50, max_length=64, tied_embeddings=False
)
EVERYWHERE = LoraConfig((("layers/.*", 4, 8.0), ("unembed/kernel", 2, 4.0)))
QV = LoraConfig((("layers/attention/[qv]/kernel", 4, 32.0),))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (3, 12)))


def model_with(config: LoraConfig, model: ModelConfig = MODEL) -> LM:
    return adapters.with_lora(decoder(model, dot=adapters.lora_dot(config, PLAIN, PLAIN)), config)


def shaken(params: Params, seed: int = 1, size: float = 0.1) -> Params:
    """With B (and m) moved away from where they start."""
    key = jax.random.key(seed)

    def move(path: str, leaf: Any) -> Any:
        if not path.endswith(("lora_b", "lora_m")):
            return leaf
        return leaf + size * jax.random.normal(jax.random.fold_in(key, sum(map(ord, path))), leaf.shape)

    return tree.map_with_path(move, params)


def base_of(params: Params) -> Params:
    return tree.partition(params, lambda path: "lora_" not in path)[0]


def logits(lm: LM, params: Params, tokens: Any = TOKENS, **options: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, t, o: lm.unembed(p).logits(lm.apply(p, t, **o).hidden))(params, tokens, options))


# ------------------------------------------------------------------------------------------- one adapter


@pytest.mark.parametrize("config", [QV, EVERYWHERE, replace(QV, init="kaiming", scale="sqrt_rank")])
def test_at_the_start_logits_are_those_of_the_base_to_the_bit(config: LoraConfig):
    lm = model_with(config)
    params = lm.init(jax.random.key(0))
    np.testing.assert_array_equal(logits(lm, params), logits(decoder(MODEL), base_of(params)))


def test_dora_starts_as_the_base_and_keeps_the_norms_m():
    config = replace(QV, dora=True)
    lm = model_with(config)
    params = lm.init(jax.random.key(0))
    np.testing.assert_allclose(logits(lm, params), logits(decoder(MODEL), base_of(params)), atol=2e-6)
    moved = shaken(params)
    merged = adapters.merge(moved, config)["layers"]["attention"]["q"]["kernel"]
    norms = np.linalg.norm(np.asarray(merged, np.float64), axis=1)
    np.testing.assert_allclose(norms, np.abs(moved["layers"]["attention"]["q"]["lora_m"]), rtol=1e-5)
    np.testing.assert_allclose(logits(lm, moved), logits(decoder(MODEL), adapters.merge(moved, config)), atol=2e-5)


def test_the_card_s_two_by_two():
    leaves = {"kernel": jnp.eye(2), "lora_a": jnp.array([[1.0], [2.0]]), "lora_b": jnp.array([[3.0, 4.0]])}
    dot = adapters.lora_dot(LoraConfig(((".*", 1, 2.0),)), PLAIN, PLAIN)
    np.testing.assert_array_equal(dot("mlp/up", "BTD,DF->BTF", jnp.ones((1, 1, 2)), leaves)[0, 0], [19.0, 25.0])


def test_after_one_step_a_had_no_gradient_and_b_had():
    lm = model_with(QV)
    params = lm.init(jax.random.key(0))
    grads = jax.grad(lambda p: jnp.square(lm.apply(p, TOKENS).hidden).sum())(params)
    for path, leaf in tree.items(grads):
        if "lora_" in path:
            assert bool((leaf != 0).any()) == path.endswith("lora_b"), path


# Its encoder as this decoder without a causal mask; 1907.11692, table 9.
ROBERTA_BASE = replace(
    gpt2, mask="bidirectional", vocab_size=50_265, max_length=512, norm_placement="after_residual", final_norm=False, activation="gelu"
)
ROBERTA_LARGE = replace(ROBERTA_BASE, num_layers=24, width=1024, num_heads=16, num_kv_heads=16, ff_width=4096)


@pytest.mark.parametrize(("config", "model", "count"), [
    (replace(QV, rules=(("layers/attention/[qv]/kernel", 4, 32.0),)), gpt3_175b, 18_874_368),
    (replace(QV, rules=(("layers/attention/[qv]/kernel", 1, 32.0),)), gpt3_175b, 4_718_592),
    (replace(QV, rules=(("layers/attention/[qv]/kernel", 8, 32.0),)), gpt3_175b, 37_748_736),
    (QV, gpt2_medium, 393_216),
    (QV, gpt2_large, 737_280),
    (replace(QV, rules=(("layers/attention/[qv]/kernel", 8, 16.0),)), ROBERTA_BASE, 294_912),
    (replace(QV, rules=(("layers/attention/[qv]/kernel", 8, 16.0),)), ROBERTA_LARGE, 786_432),
])  # fmt: skip
def test_published_counts(config: LoraConfig, model: ModelConfig, count: int):
    shapes = jax.eval_shape(model_with(config, model).init, jax.random.key(0))
    added = tree.partition(shapes, lambda path: "lora_" in path)[0]
    assert tree.count(added) == count
    trained = optim.split(OptimConfig(freeze=adapters.TRAIN_ONLY_LORA), shapes)[0]
    assert set(tree.paths(trained)) == set(tree.paths(added))


def test_scales():
    rules = (("layers/.*", 4, 16.0),)
    assert adapters.scale_of(LoraConfig(rules), "layers/mlp/up/kernel") == 4.0
    assert adapters.scale_of(LoraConfig(rules, scale="sqrt_rank"), "layers/mlp/up/kernel") == 8.0


def test_the_first_rule_that_matches_wins_and_rank_0_leaves_a_kernel_alone():
    config = LoraConfig((("layers/attention/o/kernel", 0, 1.0), ("layers/attention/q/kernel", 2, 1.0), ("layers/attention/.*", 4, 1.0)))
    ranks = adapters.ranks_of(decoder(MODEL).init(jax.random.key(0)), config)
    assert ranks == {"layers/attention/k/kernel": 4, "layers/attention/q/kernel": 2, "layers/attention/v/kernel": 4}


def test_the_rank_of_the_change_is_the_adapter_s():
    lm = model_with(QV)
    params = shaken(lm.init(jax.random.key(0)))
    change = adapters.merge(params, QV)["layers"]["attention"]["q"]["kernel"] - params["layers"]["attention"]["q"]["kernel"]
    singular = np.linalg.svd(np.asarray(change, np.float64).reshape(2, 32, 32), compute_uv=False)
    assert (singular[:, 3] > 1e-2).all() and (singular[:, 4] < 1e-5).all()


@pytest.mark.parametrize("config", [EVERYWHERE, replace(QV, scale="sqrt_rank")])
def test_merged_is_unmerged_and_unmerging_gives_the_base_back(config: LoraConfig):
    lm = model_with(config)
    params = shaken(lm.init(jax.random.key(0)))
    merged = adapters.merge(params, config)
    assert not any("lora_" in path for path in tree.paths(merged))
    np.testing.assert_allclose(logits(decoder(MODEL), merged), logits(lm, params), atol=3e-5)
    back = adapters.unmerge(merged, tree.partition(params, lambda path: "lora_" in path)[0], config)
    for path, leaf in tree.items(params):
        np.testing.assert_allclose(tree.get(back, path), leaf, atol=1e-6, err_msg=path)


def test_a_bf16_base_comes_back_from_a_float32_merge_to_the_last_bit():
    lm = model_with(QV)
    params = shaken(lm.init(jax.random.key(0)))
    half = tree.map_with_path(lambda path, leaf: leaf if "lora_" in path else leaf.astype(jnp.bfloat16), params)
    wide = tree.map_with_path(lambda _, leaf: leaf.astype(jnp.float32), half)
    back = adapters.unmerge(adapters.merge(wide, QV), tree.partition(wide, lambda path: "lora_" in path)[0], QV)
    for path, leaf in tree.items(base_of(half)):
        np.testing.assert_array_equal(tree.get(back, path).astype(jnp.bfloat16), leaf, err_msg=path)


def test_dropout_is_on_the_branch_only_and_differs_by_layer():
    config = replace(EVERYWHERE, dropout=0.5)
    lm = model_with(config)
    assert lm.has_dropout
    params = lm.init(jax.random.key(0))
    key = jax.random.key(7)
    np.testing.assert_array_equal(logits(lm, params, key=key), logits(lm, params), err_msg="B = 0: the base sees no dropout")
    moved = shaken(params)
    assert np.abs(logits(lm, moved, key=key) - logits(lm, moved)).max() > 1e-3


def test_dropout_changes_nothing_on_average():
    dot = partial(adapters.lora_dot(replace(QV, dropout=0.5), PLAIN, PLAIN), "attention/q", "BTD,DF->BTF")
    rng = np.random.default_rng(0)
    leaves = {name: jnp.asarray(rng.normal(size=size)) for name, size in (("kernel", (6, 5)), ("lora_a", (6, 2)), ("lora_b", (2, 5)))}
    x = jnp.asarray(rng.normal(size=(1, 1, 6)))
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 4000))
    drawn = jax.jit(jax.vmap(lambda key: dot(x, leaves | {"lora_key": key})[0, 0]))(keys)
    np.testing.assert_allclose(drawn.mean(0), dot(x, leaves)[0, 0], atol=6 * float(drawn.std(0).max()) / 4000**0.5)


def test_the_kernel_s_gradient_is_never_made():
    """In the compiled program of LoRA on all linears no product has the shape of a kernel."""
    config = LoraConfig((("layers/.*", 4, 8.0),))
    lm = model_with(config, replace(MODEL, ff_width=80))
    params = lm.init(jax.random.key(0))
    mine, rest = tree.partition(params, lambda path: "lora_" in path)

    def loss(mine: Params, rest: Params) -> Any:
        return jnp.square(lm.apply(tree.merge(mine, rest), TOKENS).hidden).sum()

    def products(argnums: Any) -> list[str]:
        text = jax.jit(jax.grad(loss, argnums)).lower(mine, rest).compile().as_text()
        return [line for line in text.splitlines() if " dot(" in line or "__onednn" in line or "custom-call" in line]

    shapes = ("f32[32,80]", "f32[80,32]")
    assert any(shape in line.split("=")[1][:40] for line in products((0, 1)) for shape in shapes), "the twin that trains the base has one"
    assert not any(shape in line.split("=")[1][:40] for line in products(0) for shape in shapes)


def test_frozen_leaves_have_no_optimizer_state_and_do_not_change():
    config = OptimConfig(freeze=adapters.TRAIN_ONLY_LORA, weight_decay=0.5)
    params = model_with(QV).init(jax.random.key(0))
    trained, frozen = optim.split(config, params)
    optimizer = optim.build(config, trained, num_steps=10, num_vocab=50)
    state = optimizer.init(trained)
    assert tree.num_bytes(state) < 3 * tree.num_bytes(trained)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, trained), state, trained)
    assert set(tree.paths(optax.apply_updates(trained, updates))).isdisjoint(tree.paths(frozen))


def test_lora_plus_is_a_rate_for_b():
    config = OptimConfig(lr=1e-2, freeze=adapters.TRAIN_ONLY_LORA, lr_scale=((".*/lora_b", 16.0),), weight_decay=0.0, clip_norm=None)
    trained, _ = optim.split(config, shaken(model_with(QV).init(jax.random.key(0))))
    optimizer = optim.build(config, trained, num_steps=10, num_vocab=50)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, trained), optimizer.init(trained), trained)
    sizes = {path: float(jnp.abs(leaf).max()) for path, leaf in tree.items(updates)}
    a, b = (next(size for path, size in sizes.items() if path.endswith(end)) for end in ("lora_a", "lora_b"))
    assert b == pytest.approx(16 * a, rel=1e-5)


# ---------------------------------------------------------------------------------------- mixed batches


def three() -> tuple[Params, list[tuple[Params, LoraConfig]]]:
    """A base, and adapters of unlike ranks, targets and scales for it."""
    base = decoder(MODEL).init(jax.random.key(0))
    configs = [
        LoraConfig((("layers/attention/[qv]/kernel", 4, 8.0),)),
        LoraConfig((("layers/.*", 2, 3.0),), scale="sqrt_rank"),
        LoraConfig((("layers/mlp/down/kernel", 7, 20.0),)),
    ]
    made = [shaken(adapters.init_leaves(base, c, jax.random.key(i)), seed=i) for i, c in enumerate(configs)]
    return base, list(zip(made, configs, strict=True))


def test_a_batch_that_mixes_adapters_is_one_at_a_time():
    base, ours = three()
    tokens = jnp.concatenate([TOKENS, TOKENS])
    lm = decoder(MODEL, dot=adapters.lora_dot(LoraConfig(), PLAIN, PLAIN))
    mixed = tree.merge(base, adapters.stack(ours, base))
    rows = [2, -1, 0, 1, 0, 2]
    together = logits(lm, adapters.select(mixed, jnp.array(rows)), tokens)
    for i, row in enumerate(rows):
        alone = base if row < 0 else adapters.merge(tree.merge(base, ours[row][0]), ours[row][1])
        np.testing.assert_allclose(together[i], logits(decoder(MODEL), alone, tokens[i : i + 1])[0], atol=5e-5, err_msg=f"row {i}")
    order = np.array([3, 0, 5, 4, 1, 2])
    shuffled = logits(lm, adapters.select(mixed, jnp.array(rows)[order]), tokens[order])
    np.testing.assert_allclose(shuffled, together[order], atol=1e-6, err_msg="shuffling rows shuffles outputs")


def test_mixed_adapters_generate_as_each_alone():
    base, ours = three()
    lm = decoder(MODEL, dot=adapters.lora_dot(LoraConfig(), PLAIN, PLAIN))
    mixed = tree.merge(base, adapters.stack(ours, base))
    prompts, rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9]], [1, -1, 0]
    got = complete(generator(lm, sampler(0.0)), adapters.select(mixed, jnp.array(rows)), prompts, num_tokens=5)
    for prompt, row, ids in zip(prompts, rows, got, strict=True):
        alone = base if row < 0 else adapters.merge(tree.merge(base, ours[row][0]), ours[row][1])
        assert complete(generator(decoder(MODEL), sampler(0.0)), alone, [prompt], num_tokens=5) == [ids]


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("config", "says"), [
    (LoraConfig((("layers/atention/q/kernel", 4, 8.0),)), "matches no parameter.*layers/attention/q/kernel"),
    (LoraConfig((("layers/mlp/up/kernel", 33, 8.0),)), "rank 33.*32 or less"),
    (LoraConfig((("embed/tokens", 4, 8.0),)), "matches no parameter"),
    (LoraConfig((("unembed/kernel", 4, 8.0),), dora=True), "leaves the head out"),
])  # fmt: skip
def test_rules_that_cannot_work_are_refused(config: LoraConfig, says: str):
    with pytest.raises(ConfigError, match=says):
        model_with(config).init(jax.random.key(0))


def test_configs_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="rank is at least 0"):
        LoraConfig((("a", -1, 8.0),))
    with pytest.raises(ConfigError, match="dropout"):
        LoraConfig(dropout=1.0)


def test_merging_twice_and_merging_a_mixture_are_refused():
    base, ours = three()
    params = tree.merge(base, ours[0][0])
    merged = adapters.merge(params, ours[0][1])
    with pytest.raises(ConfigError, match="merged already"):
        adapters.merge(merged, ours[0][1])
    with pytest.raises(ConfigError, match="not merged"):
        adapters.unmerge(params, ours[0][0], ours[0][1])
    mixture = adapters.select(tree.merge(base, adapters.stack(ours, base)), jnp.array([0]))
    with pytest.raises(ConfigError, match="adapter of its own"):
        adapters.merge(mixture, ours[0][1])


def test_adapters_of_another_base_and_wrong_rows_are_refused():
    base, ours = three()
    other = adapters.init_leaves(decoder(replace(MODEL, width=40)).init(jax.random.key(0)), QV, jax.random.key(0))
    with pytest.raises(ConfigError, match=r"adapter 1 .*made for another base"):
        adapters.stack([ours[0], (other, QV)], base)
    dora = replace(QV, dora=True)
    with pytest.raises(ConfigError, match="DoRA"):
        adapters.stack([(adapters.init_leaves(base, dora, jax.random.key(0)), dora)], base)
    mixed = adapters.select(tree.merge(base, adapters.stack(ours, base)), jnp.array([0, 1]))
    with pytest.raises(ConfigError, match=r"2 rows.*batch has 3"):
        decoder(MODEL, dot=adapters.lora_dot(LoraConfig(), PLAIN, PLAIN)).apply(mixed, TOKENS)


# ----------------------------------------------------------------------------------------------- meshes


def test_sharded_equals_unsharded():
    """On 2 × 2 × 2 devices; other meshes are among the laws of surgery."""
    from jaxllm import sharding
    from jaxllm.config import MeshConfig

    config = replace(EVERYWHERE, dropout=0.1)
    lm = model_with(config, replace(MODEL, vocab_size=64))
    params = shaken(lm.init(jax.random.key(0)))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50, (8, 8)))

    def value(params: Params, tokens: Any) -> Any:
        hidden = lm.apply(params, tokens, key=jax.random.key(1)).hidden
        return jnp.square(lm.unembed(params).logits(hidden)).mean()

    want, want_grads = jax.value_and_grad(value)(params, tokens)
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(sharding.param_specs(params, mesh), mesh))
        got, grads = jax.jit(jax.value_and_grad(value))(placed, jax.device_put(tokens, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for path, leaf in tree.items(want_grads):
        np.testing.assert_allclose(tree.get(grads, path), leaf, atol=1e-5 * max(1.0, float(jnp.abs(leaf).max())), err_msg=path)


def test_dora_norms_carry_no_gradient():
    config = replace(QV, dora=True)
    leaves = {"kernel": jnp.eye(3), "lora_a": jnp.ones((3, 1)), "lora_b": 0.1 * jnp.ones((1, 3)), "lora_m": jnp.ones(3)}
    dot = partial(adapters.lora_dot(config, PLAIN, PLAIN), "attention/q", "BTD,DF->BTF", jnp.ones((1, 1, 3)))
    grads = jax.grad(lambda own: dot(own).sum())(leaves)
    whole = leaves["kernel"] + 8.0 * leaves["lora_a"] @ leaves["lora_b"]
    norm = jnp.linalg.norm(whole, axis=0)
    np.testing.assert_allclose(grads["lora_b"], 8.0 * 3 * (1 / norm)[None], rtol=1e-5)


def test_two_thirds_of_the_memory_of_training_are_saved():
    """Arguments and temporaries of the compiled step, weights and moments in float32, at a size where weights outweigh activations."""
    from jaxllm import pretrain, sharding
    from jaxllm.config import DataConfig, MeshConfig, TrainConfig
    from jaxllm.contract import Batch
    from jaxllm.step import frozen_base, program

    model = replace(MODEL, num_layers=4, width=256, num_heads=8, num_kv_heads=8, head_size=32, ff_width=1024)
    full = TrainConfig(model=model, data=DataConfig(sequence_length=8, batch_size=1), mesh=MeshConfig(data=1), remat="full")
    lora = replace(full, lora=QV, optim=OptimConfig(freeze=adapters.TRAIN_ONLY_LORA))
    mesh = sharding.make_mesh(full.mesh, jax.devices()[:1])
    ones = np.ones((1, 8), np.int32)
    batch = Batch(ones, ones, ones.astype(np.float32), ones, ones)

    def num_bytes(config: TrainConfig) -> int:
        experiment = pretrain.experiment(config, precision="float32")
        with jax.set_mesh(mesh):
            step, _, template = program(experiment, mesh)
            memory = step.lower(template, frozen_base(experiment, mesh), batch).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    assert num_bytes(lora) < num_bytes(full) / 3
