"""Numbers of a trained run: its leaves, its losses, its subspaces, what it writes; and adapters through a whole run."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import loop, measures, pretrain, pretrained, tree
from jaxllm.config import BitnetConfig, ConfigError, LoraConfig, PrefixConfig, SourceConfig, TrainConfig
from jaxllm.surgery import adapters, prefix
from tests.runs import corpus
from tests.tiny import config as TINY

pytestmark = pytest.mark.whole
SILENT = lambda line: None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A trained run, which others start from."""
    folder = tmp_path_factory.mktemp("runs")
    text = corpus(folder)
    data = replace(TINY.data, sources=(SourceConfig(kind="text", path=str(text), document="paragraph"),), cache_dir=str(folder / "cache"))
    optim = replace(TINY.optim, ema_decay=None)
    config = replace(TINY, data=data, optim=optim, num_steps=6, save_every=6, eval_batches=2, run_dir=str(folder / "base"))
    train(config)
    return config


def train(config: TrainConfig) -> Path:
    experiment = replace(pretrain.experiment(config, precision="float32"), sample=None, finish=None)  # they compile more than they tell
    return loop.run(experiment, "float32", say=SILENT).run_dir


def tuned(base: TrainConfig, name: str, **changes: object) -> TrainConfig:
    return replace(base, run_dir=str(Path(base.run_dir).with_name(name)), init_from=base.run_dir, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def lora(base: TrainConfig) -> TrainConfig:
    config = tuned(base, "lora", lora=LoraConfig((("layers/attention/[qv]/kernel", 2, 8.0),)))
    config = replace(config, optim=replace(base.optim, freeze=adapters.TRAIN_ONLY_LORA), eval_every=3)
    train(config)
    return config


def test_a_run_with_adapters_trains_them_alone_and_loads_with_them_folded_in(base: TrainConfig, lora: TrainConfig):
    config, leaves = measures.trained_leaves(Path(lora.run_dir))
    assert config.lora == lora.lora
    assert {path.rpartition("/")[2] for path in tree.paths(leaves)} == {"lora_a", "lora_b"}
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(leaves)), "B has moved"
    model, before = pretrained.load(lora.run_dir), pretrained.load(base.run_dir)
    changed = {path for path, leaf in tree.items(model.params) if not np.array_equal(leaf, tree.get(before.params, path))}
    assert changed == {"layers/attention/q/kernel", "layers/attention/v/kernel"}
    whole = pretrain.starting_params(replace(lora, init_from=lora.run_dir), pretrain.language_model(lora, "float32"), _mesh())
    tokens = jnp.arange(12)[None]
    want = pretrain.language_model(lora, "float32").apply(whole, tokens).hidden
    np.testing.assert_allclose(model.lm.apply(model.params, tokens).hidden, want, atol=2e-5)


def _mesh() -> jax.sharding.Mesh:
    from jaxllm import sharding

    return sharding.make_mesh(pretrained.ONE_DEVICE)


def test_losses_on_the_way_and_of_a_loaded_run_are_the_loop_s(lora: TrainConfig):
    by_step = measures.losses_by_step(Path(lora.run_dir))
    assert sorted(by_step) == [3, 6]
    assert measures.held_out(lora.run_dir, lora, max_batches=2)["loss"] == pytest.approx(by_step[6], rel=1e-5)
    doubled = measures.held_out(lora.run_dir, lora, max_batches=2, change=lambda params: jax.tree.map(lambda x: 2 * x, params))
    assert doubled["loss"] != pytest.approx(by_step[6], rel=1e-3)


def test_a_resumed_run_refuses_other_weights_below_it(base: TrainConfig, lora: TrainConfig, tmp_path: Path):
    other = replace(base, run_dir=str(tmp_path / "base"), num_steps=3, save_every=3)
    train(other)
    above = replace(lora, run_dir=str(tmp_path / "above"), init_from=other.run_dir, num_steps=3, save_every=3, eval_every=0)
    train(above)
    train(replace(other, num_steps=6))  # the weights below are others now
    with pytest.raises(ConfigError, match="began from the weights"):
        train(replace(above, num_steps=6))
    with pytest.raises(ConfigError, match="began from the weights"):
        pretrained.load(above.run_dir)


def test_a_run_on_top_of_adapters_is_refused_with_the_way_to_fold_them_in(base: TrainConfig, lora: TrainConfig):
    with pytest.raises(ConfigError, match=r"tools\.convert merge"):
        train(replace(tuned(base, "on-top"), init_from=lora.run_dir))


def test_a_relative_path_may_name_the_weights(base: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(base.run_dir).parent)
    train(replace(tuned(base, "relative"), init_from="base", num_steps=1, save_every=1))


def test_subspaces_of_two_adapters(base: TrainConfig, lora: TrainConfig):
    wide = replace(lora, lora=LoraConfig((("layers/attention/[qv]/kernel", 4, 8.0),)), run_dir=lora.run_dir + "-wide", eval_every=0)
    train(wide)
    found = measures.similarity_of_adapters(Path(lora.run_dir), Path(wide.run_dir))
    assert [*found] == [f"phi {i} {j}" for i in (1, 2) for j in (1, 2, 4)] and all(0 <= value <= 1 for value in found.values())
    assert measures.similarity_of_adapters(Path(lora.run_dir), Path(lora.run_dir))["phi 2 2"] == pytest.approx(1.0)
    amplified = measures.amplification_of_adapters(Path(lora.run_dir))
    assert amplified["change"] > 0 and amplified["own"] > amplified["random"]
    assert measures.saved_bytes(Path(lora.run_dir))["trained_mb"] == pytest.approx(4 * 2 * 2 * (32 * 2 + 2 * 24) / 1e6, rel=0.2)


@pytest.mark.parametrize("place", ["states", "mlp"])
def test_a_run_with_a_prefix_loads_as_its_states(base: TrainConfig, place: str):
    options = {"states": PrefixConfig(3, init_text="the cat"), "mlp": PrefixConfig(3, 8)}
    config = tuned(base, f"prefix-{place}", prefix=options[place], num_steps=3, save_every=3)
    if place == "states":  # words need the tokenizer, and bytes have one
        config = replace(config, data=replace(config.data, tokenizer=replace(config.data.tokenizer, kind="bytes")))
    config = replace(config, optim=replace(base.optim, freeze=prefix.TRAIN_ONLY_PREFIX))
    train(config)
    model = pretrained.load(config.run_dir)
    assert set(model.params["prefix"]) == {"keys", "values"} and model.train.prefix.length == 3
    assert measures.held_out(config.run_dir, config, max_batches=2)["loss"] == pytest.approx(
        measures.losses_by_step(Path(config.run_dir))[3], rel=1e-5
    )


def test_texts_come_back_in_the_order_of_their_prompts(base: TrainConfig):
    model, prompts = pretrained.load(base.run_dir), ["a much longer prompt than the other", "the"]
    one_by_one = [measures.written(model, [prompt], num_beams=2, num_tokens=3)[0] for prompt in prompts]
    assert measures.written(model, prompts, num_beams=2, num_tokens=3) == one_by_one


def test_a_bitnet_run_by_degrees_loads_quantised(base: TrainConfig):
    config = tuned(
        base, "bitnet", bitnet=BitnetConfig("b158", norm="rms", norm_sites=".*/(o|down)", warm_start_steps=2), num_steps=4, save_every=4
    )
    train(config)
    loss = measures.held_out(config.run_dir, config, max_batches=2)["loss"]
    assert loss == pytest.approx(measures.losses_by_step(Path(config.run_dir))[4], rel=1e-5)


def test_references_that_are_not_there_name_the_command(lora: TrainConfig):
    with pytest.raises(ConfigError, match=r"tools\.fetch nowhere"):
        measures.against_references(Path(lora.run_dir), "cache://data/nowhere/dev.jsonl")


def test_questions_are_answered_by_the_most_probable_choice(base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The right answer is what the corpus says over and over, or something it never says."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"tools\.fetch choices"):
        measures.choices(base.run_dir, ["piqa"])
    lines = [
        {"request_type": "loglikelihood", "doc_id": document, "idx": index, "label": document % 2,
         "request": {"context": "    ", "continuation": continuation}}
        for document in range(4)
        for index, continuation in enumerate(("    ", "\u2603\u2603\u2603\u2603"))
    ]  # fmt: skip
    (tmp_path / "data" / "choices").mkdir(parents=True)
    for name, number in (("piqa", 4), ("arc_easy", 1)):
        text = "".join(f"{json.dumps(line)}\n" for line in lines if line["doc_id"] < number)
        (tmp_path / "data" / "choices" / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert measures.choices(base.run_dir, ["piqa", "arc_easy"]) == {"piqa": 0.5, "arc_easy": 1.0}
    assert measures.choices(base.run_dir, ["piqa"], limit=1) == {"piqa": 1.0}
