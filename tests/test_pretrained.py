"""Folders of models: saved, loaded, started from; and a checkpoint's arrays slice by slice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import checkpoint, checkpoint_slices, pretrain, pretrained, sharding, tree
from jaxllm.config import ConfigError, MeshConfig, ModelConfig, OptimConfig, TrainConfig, to_dict
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.files import new_folder
from jaxllm.interop.layout import leaf_shapes
from jaxllm.interop.vocab import resize_vocab
from jaxllm.models.transformer import decoder

ROOT = Path(__file__).parent.parent
CONFIG = ModelConfig(num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_size=4, ff_width=24, vocab_size=261, max_length=32)
SOURCE = {"kind": "test", "family": "llama"}


def random_params(config: ModelConfig = CONFIG, dtype: Any = np.float32, seed: int = 0) -> tree.Tree:
    rng = np.random.default_rng(seed)
    return tree.from_items([(path, rng.standard_normal(shape).astype(dtype)) for path, shape in leaf_shapes(config).items()])


def same(a: tree.Tree, b: tree.Tree) -> bool:
    """Whether two trees hold the same bytes."""
    left, right = ({path: np.asarray(leaf[:]) for path, leaf in tree.items(t)} for t in (a, b))
    return left.keys() == right.keys() and all(
        left[p].dtype == right[p].dtype and left[p].shape == right[p].shape and left[p].tobytes() == right[p].tobytes() for p in left
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "model"
    pretrained.save(out, CONFIG, random_params(), ByteTokenizer(), chat_template="{{ messages }}", stop_ids=(257, 258), source=SOURCE)
    return out


# --------------------------------------------------------------------------------------------- load


def test_what_was_saved_is_loaded(folder: Path):
    model = pretrained.load(folder)
    assert model.config == CONFIG == pretrained.model_config(folder)
    assert same(model.params, random_params())
    assert (model.chat_template, model.stop_ids) == ("{{ messages }}", (257, 258))
    assert model.tokenizer.encode("hé") == [104, 195, 169]
    assert same(pretrained.load(folder / "checkpoints").params, model.params)
    assert pretrained.load(folder / "checkpoints" / "00000000").stop_ids == (257, 258)


def test_precision_decides_the_format_of_what_is_multiplied(folder: Path):
    half = pretrained.load(folder, precision="bfloat16")
    assert {path: str(leaf.dtype) for path, leaf in tree.items(half.params)} == {
        path: "float32" if "norm" in path else "bfloat16" for path in tree.paths(half.params)
    }
    hidden = [half.lm.apply(params, jnp.arange(10)[None]).hidden for params in (half.params, pretrained.load(folder).params)]
    assert np.array_equal(*hidden)  # nothing is lost by storing what would be cast anyway
    mixed = pretrained.load(folder, precision="bfloat16_matmul").params
    assert mixed["embed"]["tokens"].dtype == jnp.float32 and mixed["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16


def test_a_mesh_gets_its_shards_and_a_padded_vocabulary(folder: Path):
    mesh = sharding.make_mesh(MeshConfig(data=2, model=4))
    model = pretrained.load(folder, mesh=mesh)
    table = model.params["embed"]["tokens"]
    assert table.shape == (264, 16) and {shard.data.shape for shard in table.addressable_shards} == {(66, 8)}
    assert np.array_equal(np.asarray(table)[:261], random_params()["embed"]["tokens"]) and not np.asarray(table)[261:].any()
    assert same(sharding.trim_vocab(model.params, 261), random_params())


def test_training_starts_from_it(folder: Path):
    """`--init_from`, as it is."""
    config = TrainConfig(model=CONFIG, init_from=str(folder), optim=OptimConfig())
    mesh = sharding.make_mesh(MeshConfig(data=1))
    assert same(pretrain.starting_params(config, decoder(CONFIG), mesh), random_params())
    with pytest.raises(ConfigError, match=r"width|shape"):
        pretrain.starting_params(replace(config, model=replace(CONFIG, width=32)), decoder(replace(CONFIG, width=32)), mesh)


def test_training_starts_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXLLM_CACHE", str(folder.parent))
    config = TrainConfig(model=CONFIG, init_from="cache://model", optim=OptimConfig())
    assert same(pretrain.starting_params(config, decoder(CONFIG), sharding.make_mesh(MeshConfig(data=1))), random_params())


def test_a_run_of_ours_is_loaded_with_its_averages(tmp_path: Path):
    """What the trainer writes: Orbax's store, several branches of a state, the tokenizer beside it."""
    averaged, trained = random_params(seed=1), random_params(seed=2)
    saver = checkpoint.Checkpointer(tmp_path / "checkpoints")
    state = {"ema": averaged, "trainable": trained, "step": np.int32(3)}
    saver.save(3, jax.tree.map(jnp.asarray, state), {"config": to_dict(TrainConfig(model=CONFIG))}, num_vocab=261)
    saver.wait()
    (tmp_path / "tokenizer").mkdir()
    ByteTokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text(json.dumps({"config": to_dict(TrainConfig(model=CONFIG))}))
    model = pretrained.load(tmp_path)
    assert same(model.params, averaged) and model.stop_ids == (257,)
    sliced, record = checkpoint_slices.read(tmp_path)
    assert same(sliced, averaged) and record["step"] == 3
    assert same(checkpoint_slices.read(tmp_path, ("trainable",))[0], trained)
    part = sliced["layers"]["mlp"]["up"]["kernel"][1:2, 3:5]
    assert np.array_equal(part, averaged["layers"]["mlp"]["up"]["kernel"][1:2, 3:5])


def test_frozen_leaves_come_from_the_run_before(folder: Path, tmp_path: Path):
    """And the others are the averages, as what training evaluated; the next run begins from the trained ones."""
    train = TrainConfig(model=CONFIG, init_from=str(folder), optim=OptimConfig(freeze=(("embed/.*", True),), ema_decay=0.9))
    branches = {name: random_params(seed=seed) for name, seed in (("trainable", 3), ("ema", 4))}
    for branch in branches.values():
        del branch["embed"]
    saver = checkpoint.Checkpointer(tmp_path / "checkpoints")
    saver.save(1, jax.tree.map(jnp.asarray, branches), {"config": to_dict(train)}, num_vocab=261)
    saver.wait()
    frozen = {"embed": random_params()["embed"]}
    assert same(pretrained.load(tmp_path).params, tree.merge(branches["ema"], frozen))
    following = replace(train, init_from=str(tmp_path))
    begun = pretrain.starting_params(following, decoder(CONFIG), sharding.make_mesh(MeshConfig(data=1)))
    assert same(begun, tree.merge(branches["trainable"], frozen))


def test_samples_compile_once(monkeypatch: pytest.MonkeyPatch):
    made = []
    generator = pretrain.generator
    monkeypatch.setattr(pretrain, "generator", lambda *arguments: made.append(generator(*arguments)) or made[-1])
    config = replace(CONFIG, num_layers=1, max_length=128)
    sample = pretrain.experiment(TrainConfig(model=config), precision="float32", prompts=("ab", "c")).sample
    assert sample is not None and not made
    dataset = SimpleNamespace(tokenizer=ByteTokenizer())
    rows = [sample(random_params(config, seed=seed), dataset, sharding.make_mesh(MeshConfig(data=1))) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2] and [row["prompt"] for row in rows[0]] == ["ab", "c"]
    assert len(made) == 1 and made[0].prefill._cache_size() == made[0].decode._cache_size() == 1


def test_a_model_without_a_tokenizer_says_so_when_it_is_asked(tmp_path: Path):
    pretrained.save(tmp_path / "m", CONFIG, random_params(), None, source=SOURCE)
    model = pretrained.load(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"came without a tokenizer.*--tokenizer"):
        model.tokenizer.encode("x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "does not exist"),
        (lambda f: f.mkdir(), "no complete checkpoint"),
        (lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "llama"}')), "Hugging Face folder; convert it first"),
        (lambda f: (f.mkdir(), (f / "config.json").write_text("{")), "damaged"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, make: Any, message: str):
    make(tmp_path / "m")
    with pytest.raises(ConfigError, match=message):
        pretrained.load(tmp_path / "m")


def test_a_flipped_bit_is_noticed(tmp_path: Path):
    pretrained.save(tmp_path / "m", CONFIG, random_params(), ByteTokenizer(), source=SOURCE)
    file = next((tmp_path / "m" / "checkpoints").rglob("*mlp.up.kernel/0.*"))
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        pretrained.load(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"mlp.up.kernel.*has changed"):
        checkpoint_slices.read(tmp_path / "m")


# --------------------------------------------------------------------------------------------- save


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_leaves_keep_their_number_format(tmp_path: Path, dtype: Any):
    params = random_params(dtype=dtype)
    mesh = MeshConfig(data=2, model=4)
    pretrained.save(tmp_path / "m", CONFIG, params, ByteTokenizer(), source=SOURCE, mesh=mesh)
    assert same(checkpoint_slices.read(tmp_path / "m")[0], params)
    assert same(pretrained.load(tmp_path / "m").params, jax.tree.map(lambda leaf: leaf.astype(np.float32), params))
    # one file for each device's part of [L D F], D over data and F over model
    assert len(list((tmp_path / "m").rglob("trainable.layers.mlp.up.kernel/[0-9]*"))) == 8


def test_padded_rows_are_cut_off(tmp_path: Path):
    padded = sharding.pad_vocab(jax.tree.map(jnp.asarray, random_params()), 8)
    pretrained.save(tmp_path / "m", CONFIG, padded, None, source=SOURCE)
    assert same(checkpoint_slices.read(tmp_path / "m")[0], random_params())


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (CONFIG, lambda p: p["layers"].pop("mlp_norm"), "missing layers/mlp_norm/scale"),
        (CONFIG, lambda p: p.update(extra=np.ones(3, np.float32)), "surplus extra"),
        (replace(CONFIG, ff_width=32), lambda p: None, r"layers/mlp/up/kernel has shape \(2, 16, 24\), expected \(2, 16, 32\)"),
        (replace(CONFIG, vocab_size=200), lambda p: None, "the tokenizer has 259 tokens and the model 200; --vocab_size 259"),
        (CONFIG, lambda p: p["embed"].update(tokens=np.ones((261, 16), np.int8)), "embed/tokens holds int8 numbers.*quantised"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, config: ModelConfig, change: Any, message: str):
    params = random_params()
    change(params)
    with pytest.raises(ConfigError, match=message):
        pretrained.save(tmp_path / "m", config, params, ByteTokenizer(), source=SOURCE)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_overwritten(folder: Path):
    with pytest.raises(ConfigError, match="exists already"):
        pretrained.save(folder, CONFIG, random_params(), None, source=SOURCE)


# --------------------------------------------------------------------------------- whole or not at all


def test_no_space_is_said_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"it needs 1,000,000,000,000,000 bytes and [\d,]+ are free"), new_folder(tmp_path / "m", 10**15):
        raise AssertionError("never entered")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_half_way_leaves_nothing(tmp_path: Path):
    """/dev/full refuses every write."""
    with pytest.raises(ConfigError, match=r"no space left on device.*free some space"), new_folder(tmp_path / "m", 0) as partial:
        (partial / "written").write_text("x")
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from jaxllm.files import new_folder
with new_folder(Path(sys.argv[1]), 0) as partial:
    (partial / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_killed_half_way_nothing_is_there_and_the_rest_goes_with_the_next(tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "m"], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    assert not (tmp_path / "m").exists() and len(list(tmp_path.iterdir())) == 1
    with new_folder(tmp_path / "m", 0) as partial:
        (partial / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["whole"]


# ------------------------------------------------------------------------------------ chunks, vocabulary


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=4), st.integers(1, 400))
def test_chunks_cover_a_shard_and_are_small(sizes: list[tuple[int, int]], max_bytes: int):
    shape, shards = (tuple(column) for column in zip(*sizes, strict=True))
    chunk = checkpoint_slices.chunk_shape(shape, shards, 2, max_bytes)
    shard = [-(-size // parts) for size, parts in sizes]
    assert all(s % c == 0 for s, c in zip(shard, chunk, strict=True))
    assert 2 * np.prod(chunk) <= max_bytes or set(chunk) == {1}


def test_a_leaf_comes_back_from_any_chunks(tmp_path: Path):
    leaf = random_params()["layers"]["mlp"]["up"]["kernel"]  # [2 16 24]
    for number, chunk in enumerate([(2, 16, 24), (1, 5, 7), (2, 16, 1), (3, 17, 25)]):
        checkpoint_slices.write(tmp_path / f"{number:08d}", {"a/b": leaf}, {"a/b": chunk}, {}, 1)
        assert same(checkpoint_slices.read(tmp_path / f"{number:08d}")[0], {"a": {"b": leaf}})


def test_vocabulary_is_trimmed_and_added_to():
    params = random_params()
    table = params["embed"]["tokens"]
    config, shorter = resize_vocab(CONFIG, params, 100)
    assert config.vocab_size == 100 and np.array_equal(shorter["embed"]["tokens"][:], table[:100])
    config, longer = resize_vocab(CONFIG, params, 270)
    added = longer["embed"]["tokens"][:]
    assert config.vocab_size == 270 and np.array_equal(added[:261], table)
    assert np.allclose(added[261:], table.mean(0, keepdims=True), atol=1e-6)
    assert np.array_equal(longer["embed"]["tokens"][258:264, 3:5], added[258:264, 3:5])  # a slice over the seam
    assert np.array_equal(longer["embed"]["tokens"][262:264], added[262:264])
    assert same(resize_vocab(config, longer, 261)[1], params)
    assert longer["layers"] is not None and same({"layers": longer["layers"]}, {"layers": params["layers"]})
    with pytest.raises(ConfigError, match="at least 1"):
        resize_vocab(CONFIG, params, 0)
