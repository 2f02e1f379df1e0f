"""`python -m tools.convert kv-heads`: the same numbers as in memory, slice by slice, and a folder that everything else takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from test_convert import refused, run, write
from test_pretrained import same

from jaxllm import checkpoint_slices, pretrained, tree
from jaxllm.config import ModelConfig
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.interop.layout import leaf_shapes
from jaxllm.interop.stored import Lazy
from jaxllm.surgery import resize
from tools import kv_heads

CONFIG = ModelConfig(
    num_layers=3, width=16, num_heads=6, num_kv_heads=6, head_size=4, ff_width=24, vocab_size=261, max_length=32, qkv_bias=True
)
SOURCE = {"kind": "test", "family": "qwen2"}


def random_params(dtype: Any = np.float32) -> tree.Tree:
    rng = np.random.default_rng(0)
    return tree.from_items([(path, rng.standard_normal(shape).astype(dtype)) for path, shape in leaf_shapes(CONFIG).items()])


def saved(folder: Path, dtype: Any = np.float32) -> tree.Tree:
    params = random_params(dtype)
    pretrained.save(folder, CONFIG, params, ByteTokenizer(), chat_template="{{ messages }}", stop_ids=(257, 258), source=SOURCE)
    return params


def read(folder: Path) -> tree.Tree:
    return checkpoint_slices.read(folder)[0]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("how", ["mean", "first", "random"])
def test_the_folder_holds_what_kv_heads_makes(how: Any, dtype: Any, tmp_path: Path):
    params = saved(tmp_path / "before", dtype)
    run("kv-heads", tmp_path / "before", tmp_path / "after", "--num_kv_heads", 2, "--how", how, "--seed", 5)
    want, config = resize.kv_heads(params, CONFIG, 2, how, key=jax.random.key(5))
    assert same(read(tmp_path / "after"), want)
    assert pretrained.model_config(tmp_path / "after") == config
    tokenizer, template, stop_ids = pretrained.load_text(tmp_path / "after")
    assert (tokenizer.fingerprint, template, stop_ids) == (ByteTokenizer().fingerprint, "{{ messages }}", (257, 258))


def test_the_command_as_the_docs_have_it_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Options between the places; a line for each layer, and the same numbers in the folder."""
    params = saved(tmp_path / "before")
    run("kv-heads", tmp_path / "before", "--num-kv-heads", 1, "--how", "mean", tmp_path / "after")
    lines = capsys.readouterr().out.splitlines()
    assert "6 -> 1 key/value heads (mean)" in lines[-1]
    errors = json.loads((tmp_path / "after" / "source" / "conversion.json").read_text())["relative_error"]
    assert list(errors) == ["attention/k", "attention/v", "attention/scores", "attention/outputs"]
    for site, values in list(errors.items())[:2]:
        heads = tree.get(params, f"layers/{site}/kernel").astype(np.float64)
        for layer, value in enumerate(values):
            apart = heads[layer] - heads[layer].mean(1, keepdims=True)
            assert value == pytest.approx(np.sqrt((apart**2).sum() / (heads[layer] ** 2).sum()), rel=1e-5)
    q, k = (tree.get(params, f"layers/attention/{name}/kernel").astype(np.float64)[1] for name in "qk")
    scores, means = (np.einsum("DNH,ENH->NDE", q, x) for x in (k, np.repeat(k.mean(1, keepdims=True), 6, 1)))
    assert errors["attention/scores"][1] == pytest.approx(np.linalg.norm(scores - means) / np.linalg.norm(scores), rel=1e-5)
    v, o = (tree.get(params, f"layers/attention/{name}/kernel").astype(np.float64)[1] for name in "vo")
    outputs, means = (np.einsum("DNH,NHE->NDE", x, o) for x in (v, np.repeat(v.mean(1, keepdims=True), 6, 1)))
    assert errors["attention/outputs"][1] == pytest.approx(np.linalg.norm(outputs - means) / np.linalg.norm(outputs), rel=1e-5)
    assert len(lines) == 2 + CONFIG.num_layers
    for layer, line in enumerate(lines[1:-1]):
        assert [float(word) for word in line.split()] == pytest.approx([layer, *(values[layer] for values in errors.values())], abs=1e-4)


def test_svd_calibrates_on_a_text_and_keeps_the_number_format(tmp_path: Path):
    params = saved(tmp_path / "before", ml_dtypes.bfloat16)
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    words = ("--how", "svd", "--calibration", tmp_path / "text", "--calibration_tokens", 256, "--reach", 0)
    run("kv-heads", tmp_path / "before", tmp_path / "after", "--num_kv_heads", 3, *words)
    model = pretrained.load(tmp_path / "before")
    tokens = kv_heads.text_rows(model.tokenizer, tmp_path / "text", 256, 32)
    moments = resize.input_moments(model.lm, model.params, [kv_heads.whole_rows(tokens)])
    want, config = resize.kv_heads(params, CONFIG, 3, "svd", moments=moments, reach=0)
    assert pretrained.model_config(tmp_path / "after") == config
    for path, leaf in tree.items(want):
        got = tree.get(read(tmp_path / "after"), path)[:]
        assert got.dtype == leaf.dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(got.astype(np.float32), leaf.astype(np.float32), rtol=0.02, atol=0.02, err_msg=path)
    errors = json.loads((tmp_path / "after" / "source" / "conversion.json").read_text())["relative_error"]
    assert list(errors) == ["attention/scores", "attention/outputs"]


def test_from_hugging_face_and_back_under_the_same_family(tmp_path: Path):
    write(tmp_path / "hf", "llama", temperature=0.7)
    (tmp_path / "hf" / "README.md").write_text("numbers of the model before")
    (tmp_path / "hf" / "LICENSE").write_text("terms")
    run("hf", tmp_path / "hf", tmp_path / "ours")
    run("kv-heads", tmp_path / "ours", tmp_path / "fewer", "--num_kv_heads", 1)
    run("to-hf", tmp_path / "fewer", tmp_path / "back")
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (values["model_type"], values["num_key_value_heads"], values["temperature"]) == ("llama", 1, 0.7)
    assert (tmp_path / "back" / "LICENSE").read_text() == "terms"
    assert "numbers of the model before" not in (tmp_path / "back" / "README.md").read_text()
    run("hf", tmp_path / "back", tmp_path / "again")
    assert same(read(tmp_path / "again"), read(tmp_path / "fewer"))


@pytest.mark.parametrize("how", ["mean", "first", "random"])
def test_a_part_of_a_new_leaf_reads_the_heads_that_it_is_made_of(how: Any):
    """And is that part of the whole; nothing else of the old leaf is asked for."""
    asked: dict[str, list[tuple[slice, ...]]] = {}

    def watched(path: str, leaf: np.ndarray) -> Lazy:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            asked.setdefault(path, []).append(index)
            return leaf[index]

        return Lazy(leaf.shape, leaf.dtype, read)

    params = random_params()
    new, _ = kv_heads.lazy(tree.map_with_path(watched, params), CONFIG, 3, how, seed=2)
    want, _ = resize.kv_heads(params, CONFIG, 3, how, key=jax.random.key(2))
    part = (slice(1, 3), slice(4, 9), slice(1, 2), slice(0, 3))
    for name in "kv":
        got = tree.get(new, f"layers/attention/{name}/kernel")[part]
        np.testing.assert_array_equal(got, np.asarray(tree.get(want, f"layers/attention/{name}/kernel"))[part])
    wide = (slice(1, 3), slice(4, 9), slice(2, 4), slice(0, 3))
    assert asked == ({} if how == "random" else {f"layers/attention/{name}/kernel": [wide] for name in "kv"})


def test_what_cannot_be_done_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved(tmp_path / "before")
    before, after = tmp_path / "before", tmp_path / "after"
    assert "--num_kv_heads, one of 1, 2, 3, 6" in refused(capsys, "kv-heads", before, after)
    assert "choose one of 1, 2, 3, 6" in refused(capsys, "kv-heads", before, after, "--num_kv_heads", 4)
    assert "merged, not split" in refused(capsys, "kv-heads", before, after, "--num_kv_heads", 12)
    assert "did you mean 'mean'" in refused(capsys, "kv-heads", before, after, "--num_kv_heads", 2, "--how", "meen")
    assert "usage: python -m tools.convert kv-heads CHECKPOINT OUT" in refused(capsys, "kv-heads", before, "--num_kv_heads", 2)
    assert "give --calibration FILE" in refused(capsys, "kv-heads", before, after, "--num_kv_heads", 2, "--how", "svd")
    short = ("--how", "svd", "--calibration", before / "config.json", "--calibration_tokens", 10**6)
    assert "tokens, and 1,000,000 were asked for" in refused(capsys, "kv-heads", before, after, "--num_kv_heads", 2, *short)
    assert not after.exists()
    run("kv-heads", before, after, "--num_kv_heads", 2)
    capsys.readouterr()
    assert "exists" in refused(capsys, "kv-heads", before, after, "--num_kv_heads", 2)
