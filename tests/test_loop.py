"""The loop from the command line, in this process: what a run directory holds, schedules, ramps, weights from another run."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import cli, flops, loop, spike
from jaxllm.config import DataConfig, MeshConfig, SpikeConfig
from jaxllm.contract import STUDENT, Batch, Mean, Obs
from jaxllm.data import tokenizer
from jaxllm.data.batch import Item
from jaxllm.data.position import Position
from jaxllm.losses.core import LossTransform, stateless
from jaxllm.models.transformer import decoder
from jaxllm.step import Experiment
from tests import stepper
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


# ------------------------------------------------------------------------- spikes, and what an evaluation returns


class Numbered:
    """A data set whose rows say which batch they are of."""

    tokenizer, fingerprint, held_out_windows = tokenizer.ByteTokenizer(), "numbered", ("some",)

    def batch_size(self, batch_id: int) -> int:
        return 4

    def describe(self) -> dict[str, Any]:
        return {}

    def read(self, position: Position, rows: Callable[[int], Any]) -> Iterator[Item]:
        ones = np.ones((4, stepper.LENGTH), np.int32)
        while True:
            id = position.batch_id
            batch = Batch(ones * (id % 256), ones, ones.astype(np.float32), ones, ones * np.arange(stepper.LENGTH, dtype=np.int32))
            yield Item(id, batch, position.following())
            position = position.following()


NUMBERED_LM = decoder(replace(stepper.MODEL, vocab_size=259))


def spiking(bad: Collection[int]) -> LossTransform:
    """About 1, and 9 for a bad batch; enough of the model's own that the weights depend on which batches there were."""

    def update(obs: Obs, weights: dict[str, Any]) -> tuple[Any, dict[str, Mean]]:
        tall = jnp.isin(obs.batch.tokens[0, 0], jnp.array(list(bad) or [-1]))
        loss = 1.0 + 1e-3 * jnp.abs(obs.hidden[STUDENT]).mean() + 8.0 * tall
        return loss, {"loss": Mean(loss, jnp.float32(1.0))}

    return stateless(lambda batch: {"loss": jnp.float32(1.0)}, update)


def numbered(run_dir: Path, bad: Collection[int] = (), num_steps: int = 45, **fields: Any) -> Experiment:
    config = replace(
        stepper.CONFIG, model=NUMBERED_LM.config, data=DataConfig(sequence_length=stepper.LENGTH, batch_size=4), mesh=MeshConfig(data=1),
        optim=replace(stepper.SGD, name="adamw", lr=1e-3), num_steps=num_steps, save_every=10, log_every=1, run_dir=str(run_dir),
        spike=SpikeConfig(enabled=True, window=10, rewind_steps=10, skip_batches=20), remat="none",
    )  # fmt: skip
    config = replace(config, **fields.pop("config", {}))
    lm = NUMBERED_LM if config.remat == "none" else decoder(config.model, remat=config.remat)
    start = lambda mesh: stepper.place_params(stepper.initial(NUMBERED_LM), mesh)  # compiles less than a start from the seed
    return Experiment(config, lm, spiking(bad), lambda *a, **k: Numbered(), initial_params=start, **fields)


class Killed(Exception):
    pass


def run_until(experiment: Experiment, line: str = "", times: int = 1) -> list[str]:
    """Train; what was said. Die where `line` is said for the so-many-th time."""
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if line and sum(line in each for each in said) == times and line in text:
            raise Killed

    with pytest.raises(Killed) if line else nullcontext(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "measured_peak", lambda *a, **k: 1e9)
        loop.run(experiment, "float32", say=say)
    return said


def skipped(run_dir: Path) -> Any:
    return json.loads((run_dir / loop.REWINDS).read_text())["skipped"]


def test_a_second_rewind_remembers_what_the_first_one_skipped_and_so_does_a_killed_process(tmp_path: Path) -> None:
    """Both rewinds go back to step 10, whose checkpoint knows of neither."""
    bad = (25, 36)
    said = [line for line in run_until(numbered(tmp_path / "whole", bad)) if line.startswith("the loss spiked")]
    assert said == [
        "the loss spiked at step 26: back to step 10, skipping batches 10–29",
        "the loss spiked at step 17: back to step 10, skipping batches 30–49",
    ]
    assert skipped(tmp_path / "whole") == [[10, 50]]
    for number, (line, times) in enumerate((("the loss spiked", 2), ("step  13/45", 3))):
        run_dir = tmp_path / f"killed-{number}"
        run_until(numbered(run_dir, bad), line, times)
        run_until(numbered(run_dir, bad))
        assert digest(run_dir) == digest(tmp_path / "whole") and losses(run_dir) == losses(tmp_path / "whole")
        assert (run_dir / loop.REWINDS).read_text() == (tmp_path / "whole" / loop.REWINDS).read_text()


def test_rewinds_that_do_not_help_come_to_an_end(tmp_path: Path) -> None:
    experiment = numbered(tmp_path / "run", range(25, 256))
    with pytest.raises(loop.TrainingFailed, match=r"spiked again at step 11 .*after 5 rewinds to the checkpoint of step 10.*--optim\.lr"):
        run_until(experiment)
    assert json.loads((tmp_path / "run" / loop.REWINDS).read_text())["restarts"] == [10] * spike.MAX_RESTARTS
    with pytest.raises(loop.TrainingFailed, match="spiked again"):  # the same command does not begin to count anew
        run_until(experiment)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run_until(numbered(tmp_path / "run"))
    assert not (tmp_path / "run" / loop.REWINDS).exists(), "a run from the start has skipped nothing"


def test_the_record_of_a_failed_step_has_the_tokens_of_the_run(tmp_path: Path) -> None:
    experiment = numbered(tmp_path / "run", num_steps=6, config={"spike": SpikeConfig()})
    broken = lambda obs, weights: (jnp.where(obs.batch.tokens[0, 0] == 4, jnp.nan, 0.0 * obs.hidden[STUDENT].mean()), {})
    with pytest.raises(loop.TrainingFailed, match="not finite at step 5"):
        run_until(replace(experiment, loss=stateless(lambda batch: {}, broken)))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["tokens"] for r in records] == [4 * stepper.LENGTH * step for step in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    "numbers, shown",
    [
        ({"loss": 2.0, "bits_per_byte": 1.5, "perplexity": 7.4}, "step  2/2  held-out loss 2.000  1.500 bits/byte"),
        ({"loss": 0.5, "accuracy": 0.75}, "step  2/2  held-out loss 0.500  accuracy 0.75"),
        ({"accuracy": np.float32(0.75)}, "step  2/2  accuracy 0.75"),
        ({}, None),
    ],
)
def test_whatever_an_evaluation_returns_is_shown_and_kept(tmp_path: Path, numbers: dict[str, Any], shown: str | None) -> None:
    said = run_until(numbered(tmp_path, num_steps=2, evaluate=lambda *a: numbers))
    assert [line for line in said if line.startswith("step  2/2") and "tokens/s" not in line] == ([shown] if shown else [])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 2 and {name: float(results[name]) for name in numbers} == numbers


@pytest.mark.parametrize("remat", ["full", "offload", "offload_inputs"])
def test_a_run_counts_the_work_of_a_token_as_its_remat_policy_says(tmp_path: Path, remat: str) -> None:
    """One layer of width 16 and 2 heads of 8, rows of 8: p = 2 · 16 · 8; the feed-forward kernels are frozen, a teacher takes 1,000."""
    frozen = replace(stepper.SGD, freeze=((r"layers/mlp/.*", True),))
    experiment = numbered(tmp_path, num_steps=1, other_flops_per_token=1000.0, config={"remat": remat, "optim": frozen})
    said = run_until(experiment)
    [record] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    p, num_params, num_frozen = 2 * 16 * 8, int(said[1].split()[0].replace(",", "")), 3 * 16 * 32
    model = 6 * num_params - 2 * num_frozen + 6 * p + 1000
    again = 2 * p + (0 if remat == "offload" else 2 * (4 * 16 * 16 + 2 * 16 * 32))
    assert record["mfu"] * 1e9 / record["tokens_per_second"] == pytest.approx(model)
    assert record["hfu"] * 1e9 / record["tokens_per_second"] == pytest.approx(model + again)
