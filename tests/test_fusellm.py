"""experiments/fusellm.py: its text, its arms, what the paper's preset says, and `debug` to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import domains
from experiments import fusellm
from jaxllm import distill
from jaxllm.config import ConfigError, TokenizerConfig, TrainConfig
from jaxllm.data.pieces import cut
from jaxllm.fusing import PAPER
from jaxllm.optim import schedule
from jaxllm.study.jobs import jobs_of
from tests.runs import ROOT


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="ab \n", max_size=3000))
def test_pieces_are_the_text_in_order_and_short(text: str) -> None:
    pieces = [*cut(text, 60)]
    whole = "".join(pieces)
    assert text.startswith(whole) and not text[len(whole) :].strip() and all(len(piece) <= 60 for piece in pieces)


def test_what_is_evaluated_is_neither_trained_on_nor_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of documents that the domain's model holds out; each half as large as asked, and no piece in both."""
    from jaxllm.data import batch as batches

    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    folder = fusellm.texts(fusellm._debug)
    for name, config in fusellm._debug_domains:
        held = "".join(batches.load(config.data, seed=0).held_out_texts())
        parts = {
            part: [json.loads(line)["text"] for line in (folder / f"{part}-{name}.jsonl").read_text().splitlines()]
            for part in ("mix", "held")
        }
        assert all(piece in held for some in parts.values() for piece in some) and not set(parts["mix"]) & set(parts["held"])
        assert 8_000 <= sum(len(piece.encode()) for piece in parts["mix"]) < 8_600
        assert 2_000 <= sum(len(piece.encode()) for piece in parts["held"]) < 2_600
    assert fusellm.texts(fusellm._debug) == folder
    with pytest.raises(ConfigError, match="code holds out too little text"):
        fusellm.texts(replace(fusellm._debug, mix_bytes=10**9))


def test_small_fits_its_hour_and_a_half() -> None:
    """At 2,200 tokens a second for 6 M parameters, and half a minute a run for the rest."""
    trained = [job for arm in fusellm.small.arms for job in jobs_of(fusellm.small, arm, []) if job.config is not None]
    searched = sum(len(arm.rates) > 1 for arm in fusellm.small.arms)
    configs = [job.config for job in trained if job.config is not None]
    tokens = [config.num_steps * config.data.batch_size * config.data.sequence_length for config in configs]
    runs = len(trained) - searched  # the winner of a search is the run of its seed
    assert min(tokens) >= 200_000 and runs == 34
    assert runs * (max(tokens) / (2 * 2200) + 30) + 300 < 90 * 60


def test_every_arm_that_trains_on_the_mixed_text_searches_the_same_rates_from_the_same_model() -> None:
    arms = {arm.name: arm for arm in fusellm.small.arms}
    searching = [arm for arm in arms.values() if arm.rates]
    assert len(searching) == 5 and len({arm.rates for arm in searching}) == 1 and all(arm.seeds == (0, 1, 2) for arm in searching)
    plain = {replace(arm.config, distill=distill.DistillConfig()) for arm in searching if arm.config}
    assert len(plain) == 1
    for name in (fusellm.MIN_CE, fusellm.AVG_CE, fusellm.PAPERS, fusellm.KD):
        learns = arms[name].config.distill  # type: ignore[union-attr]
        assert (learns.ce, learns.kind) == (0.9, "soft_ce") and learns.stored[0][1] == pytest.approx(0.1)
    described = [arm.config.distill.stored[0][0] for arm in searching[1:] if arm.config]
    assert len(set(described)) == 4, "the options of a fusion are in the name of its rows"
    assert json.loads(described[2])[1] | {"k": 10} == PAPER.options()


def test_the_domains_are_three_tokenizers_of_three_million() -> None:
    from jaxllm.interop.layout import leaf_shapes

    for config, vocab in ((domains.code, 2048), (domains.bible, 3072), (domains.sotu, 4096)):
        assert config.data.tokenizer == TokenizerConfig(vocab_size=vocab) and config.model.vocab_size == vocab
        params = sum(int(np.prod(shape)) for shape in leaf_shapes(config.model).values())
        assert 2.7e6 < params < 3.5e6


def test_the_paper_preset_is_the_cards() -> None:
    config = fusellm.PRESETS["paper"]
    assert isinstance(config, TrainConfig)
    assert config.data.batch_size * config.data.sequence_length == 128 * 2048
    assert config.num_steps * 128 * 2048 == pytest.approx(1.8e9, rel=1e-3)
    rate = schedule(config.optim, config.num_steps)
    assert float(max(rate(k) for k in (54, 55, 56))) == pytest.approx(1e-5, rel=1e-2)
    assert config.optim.schedule.warmup_steps / config.num_steps == pytest.approx(0.008, rel=0.01)
    assert (config.optim.b1, config.optim.b2, config.optim.weight_decay, config.optim.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert config.distill.ce == 0.9 and config.distill.stored[0][1] == pytest.approx(0.1)
    assert (PAPER.k, PAPER.how, PAPER.fuse, PAPER.per, PAPER.strict) == (10, "soft", "min_ce", "token", False)


def test_the_paper_is_planned_without_its_stored_predictions() -> None:
    """The paper's step on a small model: traced from batches whose extras are known by their shapes."""
    from jaxllm.plan.lower import lowered

    config = fusellm.PRESETS["paper"]
    assert isinstance(config, TrainConfig)
    small = replace(
        config, model=domains.debug_code.model, data=replace(config.data, sequence_length=64, batch_size=8), init_from="",
        optim=replace(config.optim, num_microbatches=1), mesh=replace(config.mesh, data=1),
    )  # fmt: skip
    made = lowered(fusellm.build(small, precision="float32"), jax.devices()[:1])
    assert "stored" in made.traced.out_info[1], "a metric of the step"


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "docs/results/fusellm-debug.jsonl").read_text().splitlines()]
    return {line["arm"]: line for line in lines}


@pytest.mark.whole
def test_debug_runs_to_its_end(tmp_path: Path) -> None:
    """Three models trained, taught, fused, merged: an arm of each kind, with those it needs, has its numbers, and shares sum to 1."""
    of_each_kind = (fusellm.CLM, fusellm.MIN_CE, "merged, TIES", fusellm.ENSEMBLE, fusellm.SPANS)
    command = [sys.executable, "-m", "experiments.fusellm", "debug", "--only", "|".join(of_each_kind)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAXLLM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = _rows(tmp_path)
    assert set(of_each_kind) < set(rows) and {"code", "bible", "sotu"} < set(rows)
    metrics = rows[fusellm.MIN_CE]["metrics"]
    assert sum(metrics[f"won_{domain}"] for domain in ("code", "bible", "sotu")) == pytest.approx(1.0)
    aligned = rows[fusellm.SPANS]["metrics"]
    assert 0 < aligned["accept"] <= 1 and 0 < aligned["mapped"] <= 1
    for name in ("merged, TIES", fusellm.ENSEMBLE, fusellm.CLM):
        metrics = rows[name]["metrics"]
        mean = np.mean([metrics[f"bpb_{domain}"] for domain in ("code", "bible", "sotu")])
        assert metrics["bits_per_byte"] == pytest.approx(mean, rel=0.1)
