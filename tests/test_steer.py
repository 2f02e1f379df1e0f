"""`python -m tools.steer`: a large model of which only the best next tokens are known, steered by two small checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import pretrained, tree
from jaxllm.config import ModelConfig
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.models.transformer import decoder
from tools import steer

SMALL = ModelConfig(num_layers=1, width=12, num_heads=2, num_kv_heads=1, head_size=4, ff_width=16, vocab_size=259, max_length=64)
ASKED: list[dict[str, Any]] = [
    {"prompt": "1+1=", "choices": ["2", "3", "4"], "top": {"2": -0.1, "3": -3.0, "x": -4.0}, "answer": "2", "id": 7},
    {"prompt": "one:", "choices": ["a", "b"], "top": {"the": -0.1}, "answer": "b"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    """Name -> (checkpoint, its params)."""
    found = {}
    for seed, name in enumerate(("expert", "anti")):
        rng, shapes = np.random.default_rng(seed), decoder(SMALL).param_shapes
        params = tree.map_with_path(lambda path, x, rng=rng: rng.normal("norm" in path, 0.3, x.shape).astype(np.float32), shapes)
        folder = str(tmp_path_factory.mktemp("models") / name)
        pretrained.save(folder, SMALL, params, ByteTokenizer(), source={})
        found[name] = folder, params
    return found


def logits(params: Any, text: str) -> np.ndarray:
    lm, tokens = decoder(SMALL), jnp.asarray([[256, *text.encode()]])
    return np.asarray(jax.jit(lambda params: lm.unembed(params).logits(lm.apply(params, tokens).hidden)[0, -1])(params), np.float64)


def run(tmp_path: Path, folders: dict[str, tuple[str, Any]], asked: list[dict[str, Any]], *more: str) -> int:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    words = ["--expert", folders["expert"][0], "--anti_expert", folders["anti"][0], *more]
    return steer.main([str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), *words])


@pytest.mark.parametrize("missing", ["drop", "floor"])
def test_answers_are_what_the_formula_says(missing: str, folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path, folders, ASKED, "--alpha", "2", "--missing", missing) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for asked, line in zip(ASKED, lines, strict=True):
        expert, anti = (logits(folders[name][1], asked["prompt"]) for name in ("expert", "anti"))
        floor = min(asked["top"].values()) if missing == "floor" else -np.inf
        scores = {c: asked["top"].get(c, floor) + 2 * (expert[ord(c)] - anti[ord(c)]) for c in asked["choices"]}
        known = {c: value for c, value in scores.items() if value > -np.inf}
        assert line["steered"].keys() == known.keys() and line["chosen"] == max(known, key=known.__getitem__, default=None)
        total = np.logaddexp.reduce(list(known.values())) if known else 0.0
        np.testing.assert_allclose([line["steered"][c] for c in known], [value - total for value in known.values()], atol=1e-5)
        assert {name: line[name] for name in asked} == asked
    said = capsys.readouterr().out
    assert f"{1 if missing == 'drop' else 2} of 2 questions have a choice in `top`" in said and "steered" in said


@pytest.mark.parametrize(
    "change, says",
    [
        ({"choices": ["2"]}, "at least two different texts"),
        ({"choices": ["2", "33"]}, "the choice '33' is 2 tokens to"),
        ({"top": {"2": "x"}}, "which is no log-probability"),
        ({"answer": "9"}, "which is none of the choices"),
        ({"prompt": 3}, "'prompt' is 3; it must be"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], says: str, folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path, folders, [ASKED[0] | change]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_one_model_is_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert steer.main([str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--expert", "x"]) == 2
    assert "go together" in capsys.readouterr().err
    assert steer.main(["--expert", "x"]) == 2 and steer.main([]) == 2
