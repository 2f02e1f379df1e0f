"""Which shapes there are near a budget, and `python -m tools.prune`: checkpoint to checkpoint to Hugging Face."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import models
from jaxllm import checkpoint_slices, pretrained, tree
from jaxllm.config import ConfigError, ModelConfig
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.interop.layout import leaf_shapes
from jaxllm.surgery import importance, shapes
from jaxllm.surgery.prune import Kept, keep, prune
from jaxllm.surgery.shapes import Shape
from tests.reference_decoder import BASE
from tests.test_prune import same_leaves
from tools import convert
from tools import prune as tool

pytestmark = pytest.mark.whole  # whole commands: `make faults` runs them

MODEL = replace(BASE, num_layers=3)
LLAMA = models.llama3_1_8b


# --------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("row", models.PUBLISHED, ids=[row.name for row in models.PUBLISHED])
def test_the_closed_form_counts_every_published_model(row: Any):
    assert shapes.num_params(row.config) == sum(math.prod(shape) for shape in leaf_shapes(row.config).values())
    assert abs(shapes.num_params(row.config) - row.num_params) <= row.last_digit


def test_every_shape_near_the_budget_and_no_other():
    found = shapes.near(MODEL, 4000, num_layers=(2, 3), num_heads=(2, 4), tolerance=0.1)
    every = [
        Shape(L, D, N, 2, F) for L in (2, 3) for D in (8, 12) for N in (2, 4) for F in (8, 16, 20)
    ]  # fmt: skip
    leaves = lambda shape: leaf_shapes(replace(MODEL, **shape._asdict())).values()
    counts = {shape: sum(math.prod(leaf) for leaf in leaves(shape)) for shape in every}
    assert {shape for shape, count in counts.items() if abs(count - 4000) <= 400} == set(found) != set()
    miss = [abs(counts[shape] - 4000) for shape in found]
    assert miss == sorted(miss)
    assert shapes.near(MODEL, 4000, num_layers=(2, 3), num_heads=(2, 4), tolerance=0.1, rank=lambda shape: -shape.width)[0].width == 12


def test_the_papers_shapes_are_among_those_near_their_sizes():
    width = shapes.near(LLAMA, 4_500_000_000, width=(2560, 3072, 3584), ff_width=(9216, 10240))
    assert Shape(32, 3072, 32, 8, 9216) in width
    assert Shape(16, 4096, 32, 8, 14336) in shapes.near(LLAMA, 4_500_000_000, num_layers=range(8, 33), width=[4096], ff_width=[14336])
    own = shapes.near(LLAMA, 4_500_000_000, rank=shapes.nearest_proportions(LLAMA, 4_500_000_000))[0]
    assert own.width % 64 == own.ff_width % 64 == 0 and own.ff_width / own.width == pytest.approx(3.5, rel=0.01)


def test_a_budget_that_no_shape_meets_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"no shape has 10 parameters within 5%: the nearest is ([\d,]+) \(3 layers, width 8, 4 heads in 2 gr"
    ):
        shapes.near(MODEL, 10)
    with pytest.raises(ConfigError, match=r"num_heads is 3.*choose one of 2, 4"):
        shapes.near(MODEL, 4000, num_heads=[3])
    with pytest.raises(ConfigError, match="width is 16; pruning makes a model smaller"):
        shapes.near(MODEL, 4000, width=[8, 16])


# ------------------------------------------------------------------------------------------ the command

SMALL = ModelConfig(
    num_layers=3, width=16, num_heads=4, num_kv_heads=2, head_size=4, ff_width=24, vocab_size=261, max_length=32, norm_eps=1e-5,
    tied_embeddings=False,
)  # fmt: skip


def saved(folder: Path, dtype: Any = np.float32, seed: int = 0) -> tree.Tree:
    rng = np.random.default_rng(seed)
    params = tree.from_items([(path, rng.standard_normal(shape).astype(dtype)) for path, shape in leaf_shapes(SMALL).items()])
    pretrained.save(folder, SMALL, params, ByteTokenizer(), stop_ids=(257,), source={"kind": "test", "family": "llama"})
    return params


def read(folder: Path) -> tree.Tree:
    return tree.map_with_path(lambda _, leaf: leaf[:], checkpoint_slices.read(folder)[0])


def ran(*words: Any) -> None:
    assert tool.main([str(word) for word in words]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    capsys.readouterr()
    assert tool.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def text(tmp_path: Path) -> tuple[Any, ...]:
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    return ("--text", tmp_path / "text", "--text-tokens", 256)


def test_checkpoint_to_checkpoint_to_hugging_face(tmp_path: Path, text: Any, capsys: pytest.CaptureFixture[str]):
    """The folder holds what `prune` makes in memory; scores serve the next shape; it converts."""
    params = saved(tmp_path / "before", ml_dtypes.bfloat16)
    words = ("--width", 8, "--ff-width", 16, "--num-heads", 2, "--num-layers", 2, "--mend-norms", "--merge-heads", -0.5)
    ran(tmp_path / "before", tmp_path / "after", *words, *text)
    said = capsys.readouterr().out
    assert "measured on 256 tokens" in said and "layers kept:" in said and "neurons: 16 of 24 kept, with" in said
    scores = importance.load(tmp_path / "after.scores.npz")
    want, config = prune(params, SMALL, scores, Shape(2, 8, 2, 2, 16), mend_norms=True, merge_heads=-0.5)
    got = read(tmp_path / "after")
    assert pretrained.model_config(tmp_path / "after") == config
    for path, leaf in tree.items(want):
        assert tree.get(got, path).dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tree.get(got, path), leaf, err_msg=path)
    source = json.loads((tmp_path / "after" / "source" / "conversion.json").read_text())
    assert source["before"]["width"] == 16 and source["after"]["width"] == 8 and len(source["kept"]["D"]) == 8
    ran(tmp_path / "before", tmp_path / "again", "--target-params", "7.2K", "--scores", tmp_path / "after.scores.npz")
    assert "mean over tokens, l2 over rows" in (said := capsys.readouterr().out) and "taking 3 layers, width 8, 4 heads in 2 groups" in said
    assert 6840 <= tree.count(read(tmp_path / "again")) <= 7560
    again = (tmp_path / "before", tmp_path / "other", "--width", 8, "--scores", tmp_path / "after.scores.npz")
    assert "asked for is mean over tokens, var over rows" in refused(capsys, *again, "--over-rows", "var")
    assert "asked for is text " in refused(capsys, *again, *text[:-1], 128)
    assert convert.main(["to-hf", str(tmp_path / "after"), str(tmp_path / "hf")]) == 0
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert [values[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")] == [8, 16, 2, 4]
    assert convert.main(["hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    same_leaves(read(tmp_path / "back"), read(tmp_path / "after"))


def test_layers_by_name_by_loss_and_a_random_choice(tmp_path: Path, text: Any, capsys: pytest.CaptureFixture[str]):
    params = saved(tmp_path / "before")
    ran(tmp_path / "before", tmp_path / "named", "--layers", 0, 2)
    same_leaves(read(tmp_path / "named"), keep(params, SMALL, Kept(layers=[0, 2]))[0])
    ran(tmp_path / "before", tmp_path / "random", "--width", 8, "--random", 3)
    want, _ = prune(params, SMALL, importance.random(SMALL, 3), Shape.of(SMALL)._replace(width=8))
    same_leaves(read(tmp_path / "random"), want)
    capsys.readouterr()
    ran(tmp_path / "before", tmp_path / "loss", "--num-layers", 2, "--depth", "loss", *text)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1]) for line in lines if line.startswith("without layers")]
    assert len(losses) == 3 and not (tmp_path / "loss.scores.npz").exists()
    gone = int(np.argmin(losses))
    assert lines[3] == f"layers kept: {' '.join(str(layer) for layer in range(3) if layer != gone)}"
    model = pretrained.load(tmp_path / "loss")
    rows = tool.text_rows(model.tokenizer, tmp_path / "text", 256, 32)
    logits = np.asarray(model.lm.unembed(model.params).logits(model.lm.apply(model.params, jnp.asarray(rows)).hidden), np.float64)[:, :-1]
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
    assert min(losses) == pytest.approx(nll.mean(), abs=1e-3)


def test_what_the_command_refuses(tmp_path: Path, text: Any, capsys: pytest.CaptureFixture[str]):
    saved(tmp_path / "before")
    before, after = tmp_path / "before", tmp_path / "after"
    assert "nothing to prune" in refused(capsys, before, after)
    assert "give --text FILE" in refused(capsys, before, after, "--width", 8)
    assert "choose one of 1, 2, 4" not in (line := refused(capsys, before, after, "--num-heads", 3)) and "choose one of 2, 4" in line
    assert "write a number, or one with K, M or B" in refused(capsys, before, after, "--target-params", "small")
    assert "the nearest is" in refused(capsys, before, after, "--target-params", "7B", "--random", 0)
    assert "--layers names 2 layers and --num_layers is 1" in refused(capsys, before, after, "--layers", 0, 1, "--num-layers", 1)
    assert "did you mean '--ff_width'" in refused(capsys, before, after, "--ff-widht", 8)
    assert "usage: python -m tools.prune CHECKPOINT OUT" in refused(capsys, before, "--width", 8)
    importance.save(tmp_path / "other.npz", importance.random(SMALL, 0))
    assert "scores of other weights" in refused(capsys, before, after, "--width", 8, "--scores", tmp_path / "other.npz")
    assert "exists already" in refused(capsys, before, before, "--width", 8, *text)
    assert "tokens, and 1,000,000 were asked for" in refused(capsys, before, after, "--width", 8, *text[:2], "--text-tokens", 10**6)
    assert not after.exists() and not (tmp_path / "after.scores.npz").exists()
