"""The loop from the command line, in this process: what a run directory holds, schedules, ramps, weights from another run."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest

from jaxllm import cli
from jaxllm.data import tokenizer
from tests.runs import TINY, corpus, digest, losses

LINEAR = ("--optim.schedule.kind", "linear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("loop")).parent


@pytest.fixture(autouse=True)
def environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLLM_TEST_TEXT", str(folder / "corpus.txt"))
    monkeypatch.setenv("JAXLLM_CACHE", str(folder / "cache"))


def train(folder: Path, name: str, *flags: str) -> Path:
    assert cli.main(["train", TINY, "--run_dir", str(folder / name), "--mesh.data", "1", *flags]) == 0
    return folder / name


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLLM_TEST_TEXT", str(folder / "corpus.txt"))
        patch.setenv("JAXLLM_CACHE", str(folder / "cache"))
        schedule = ("--eval_every", "4", "--sample_every", "6", "--eval_batches", "2", "--profile_steps", "3", "4")
        return train(folder, "finished", "--num_steps", "12", *LINEAR, *schedule)


def test_the_run_directory_holds_everything_that_is_needed_to_go_on(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["num_steps"] == 12 and len(config["hash"]) == 8 and config["precision"] == "float32"
    environment = json.loads((finished / "environment.json").read_text())
    assert {"versions", "git_commit", "corpus", "tokenizer", "precision", "mesh", "command", "peak_flops"} <= environment.keys()
    assert environment["batch_plan"] == ["batch 8 rows × 64 = 512 tokens"]
    results = json.loads((finished / "results.json").read_text())
    assert 0 < results["bits_per_byte"] < 8 and results["steps"] == 12 and "--num_steps 24" in results["go_on"]
    assert {row["name"] for row in results["baselines"]} == {"byte unigram", "lzma, per window", "lzma, whole text"}
    assert tokenizer.load(finished / "tokenizer").decode([104, 105]) == tokenizer.ByteTokenizer().decode([104, 105])
    assert "<html" in (finished / "report.html").read_text()[:200].lower()
    assert list((finished / "tensorboard").glob("events*"))
    assert list((finished / "profile").rglob("*.xplane.pb")), "the profiler wrote nothing"


def test_evaluations_and_samples_come_on_schedule(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [4, 8, 12]
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert sorted({s["step"] for s in samples}) == [6, 12]
    train_records = [r for r in records if r["kind"] == "train"]
    needed = {"loss", "ce", "z", "log_z", "grad_norm", "param_norm", "lr", "tokens_per_second", "mfu", "hfu", "memory_bytes"}
    assert needed <= train_records[-1].keys()


def test_the_loss_falls(finished: Path) -> None:
    values = losses(finished)
    assert values[12][0] < values[1][0] - 0.3


@pytest.mark.whole
def test_a_ramp_changes_the_batch_and_not_the_loss_of_a_token(folder: Path) -> None:
    ramp = ("--data.batch_ramp", "2", "4", "--optim.num_microbatches", "4", "--num_steps", "4", "--optim.noise_scale", "True")
    run = train(folder, "ramp", *ramp)
    plan = json.loads((run / "environment.json").read_text())["batch_plan"]
    assert plan == ["batch 4 rows × 64 = 256 tokens = 2 × 2 rows for 2 steps", "batch 8 rows × 64 = 512 tokens = 4 × 2 rows"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    seen = [b["tokens"] - a["tokens"] for a, b in itertools.pairwise(records)]
    assert seen[0] <= 256 < seen[1] <= 512
    assert {"noise_signal", "noise_variance"} <= records[-1].keys()


def test_more_steps_go_on_with_the_same_peak_and_clock_and_say_what_the_schedule_does(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, folder / "longer")
    before = json.loads((finished / "results.json").read_text()), json.loads((finished / "environment.json").read_text())
    run = train(folder, "longer", "--num_steps", "14", *LINEAR)
    assert "the learning rate followed a schedule of 12 steps, from here on that of 14: at step 12 it goes from" in capsys.readouterr().out
    after = json.loads((run / "results.json").read_text()), json.loads((run / "environment.json").read_text())
    assert after[1]["peak_flops"] == before[1]["peak_flops"], "MFU before and after would not compare"
    assert after[0]["steps"] == 14 and after[0]["wall_seconds"] > before[0]["wall_seconds"] > 0


def test_weights_from_another_run_start_a_new_one(folder: Path, finished: Path) -> None:
    run = train(folder, "tuned", "--init_from", str(finished), "--num_steps", "2", "--optim.freeze", "embed/.*", "True")
    assert json.loads((run / "config.json").read_text())["parent"] == str(finished)
    assert losses(run)[1][0] < losses(finished)[1][0] - 0.3, "it starts where the parent ended"
    leaves = digest(run)[1]
    assert not [path for path in leaves if "embed/tokens" in path], "a frozen leaf is in no checkpoint and has no moments"
