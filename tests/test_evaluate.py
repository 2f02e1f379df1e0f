"""`jaxllm eval` on a tiny checkpoint: what it writes, and that a killed command goes on to the same results."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import evaluate as command
from jaxllm import manifest, pretrained, sharding, tree
from jaxllm.config import ConfigError, ModelConfig
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.evals import likelihood
from jaxllm.evaluate import EvalConfig, evaluate, main
from jaxllm.generate import limits
from jaxllm.generate.lock import hold
from jaxllm.models.beam import beam_search
from jaxllm.models.transformer import decoder

MODEL = ModelConfig(num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_size=8, ff_width=24, vocab_size=259, max_length=64)
LOAD = command._load
QUESTIONS = [{"question": f"{a}+{b}=", "choices": [str(a + b), "many", str(a)], "answer": 0} for a in range(3) for b in range(3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pretrained.save(folder, MODEL, weights(0), ByteTokenizer(), stop_ids=(257,), source={})
    return folder


def weights(seed: int) -> Any:
    """Random params that nothing is compiled for."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(decoder(MODEL).init, jax.random.key(0))
    return tree.map_with_path(lambda path, leaf: rng.normal("norm" in path, 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module", autouse=True)
def one_program_each() -> Iterator[None]:
    """A model is loaded once and a program compiled once for all evaluations here, which differ in what they ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_load", cache(command._load))
        patch.setattr(pretrained.Pretrained, "for_decoding", lambda self, mesh, precision: (self.lm, self.params))
        patch.setattr(command, "sampler", cache(command.sampler))
        patch.setattr(command, "generator", cache(command.generator))
        patch.setattr(likelihood, "scorer", cache(likelihood.scorer))
        yield


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in QUESTIONS))
    (tmp_path / "t.txt").write_text("To be, or not to be, that is the question. " * 12)
    (tmp_path / "g.jsonl").write_text("".join(json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) + "\n" for i in range(5)))
    return {"choice": f"choice:{tmp_path / 'c.jsonl'}", "text": f"text:{tmp_path / 't.txt'}", "gsm8k": f"gsm8k:{tmp_path / 'g.jsonl'}"}


def config(tmp_path: Path, *tasks: str, **options: Any) -> EvalConfig:
    return EvalConfig(tasks=tasks, out=str(tmp_path / "out.json"), batch_tokens=64, max_new_tokens=4, **options)


def quiet() -> io.StringIO:
    return io.StringIO()


def metrics(results: dict[str, Any]) -> dict[str, Any]:
    return {name: result["metrics"] for name, result in results["tasks"].items()}


def test_results_are_those_of_the_parts(checkpoint: Path, files: dict[str, str], tmp_path: Path):
    got = evaluate(str(checkpoint), config(tmp_path, files["choice"], files["text"]), bar=quiet())
    model = command._load(str(checkpoint), "auto", sharding.make_mesh(pretrained.ONE_DEVICE))
    pairs = [(q["question"], " " + choice) for q in QUESTIONS for choice in q["choices"]]
    scorer = likelihood.scorer(model.lm, max_length=64, batch_tokens=64, row_multiple=1)
    scores = likelihood.score(scorer, model.params, likelihood.encode_pairs(model.tokenizer, pairs))
    rows = np.array([score.log_prob for score in scores]).reshape(-1, 3)
    found = metrics(got)[files["choice"]]
    assert found["accuracy_sum"]["value"] == np.mean(rows.argmax(1) == 0)
    lines = [json.loads(line) for line in (tmp_path / "out.answers.jsonl").read_text().splitlines()]
    mine = {(line["document"], line["choice"]): line["score"][0] for line in lines if line["task"] == files["choice"]}
    np.testing.assert_allclose([mine[d, c] for d in range(9) for c in range(3)], rows.reshape(-1), atol=1e-4)
    stored = json.loads((tmp_path / "out.json").read_text())
    assert list(stored.values()) == [got] and got["checkpoint_hash"] in stored
    bits, nats = metrics(got)[files["text"]]["bits_per_byte"]["value"], metrics(got)[files["text"]]["loss"]["value"]
    assert bits == pytest.approx(nats / np.log(2)), "one byte is one token here"


@pytest.mark.parametrize("kind", ["choice", "gsm8k"])
def test_a_killed_command_goes_on_and_gives_the_same_results(
    checkpoint: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    options: dict[str, Any] = {"temperature": 1.0, "num_samples": 2, "batch_rows": 2} if kind == "gsm8k" else {}
    (tmp_path / "whole").mkdir()
    whole = evaluate(str(checkpoint), config(tmp_path / "whole", files[kind], **options), bar=quiet())
    answers = (tmp_path / "whole" / "out.answers.jsonl").read_bytes().splitlines(keepends=True)
    assert len(answers) > 4
    # Killed while the fourth line was being written.
    (tmp_path / "out.answers.jsonl").write_bytes(b"".join(answers[:3]) + answers[3][:-9])
    added: list[int] = []
    add = command.Answers.add
    monkeypatch.setattr(command.Answers, "add", lambda self, new: added.append(add(self, new)) or added[-1])
    again = evaluate(str(checkpoint), config(tmp_path, files[kind], **options), bar=quiet())
    assert metrics(again) == metrics(whole)
    assert sum(added) == len(answers) - 3, "what was there is not asked again"
    both = [sorted(lines.splitlines()) for lines in ((tmp_path / "out.answers.jsonl").read_bytes(), b"".join(answers))]
    assert both[0] == both[1], "to the bit"
    added.clear()
    assert metrics(evaluate(str(checkpoint), config(tmp_path, files[kind], **options), bar=quiet())) == metrics(whole)
    assert sum(added) == 0


def test_other_weights_questions_or_sampling_take_no_old_answers(checkpoint: Path, files: dict[str, str], tmp_path: Path):
    keys = lambda: {json.loads(line)["key"] for line in (tmp_path / "out.answers.jsonl").read_text().splitlines()}
    evaluate(str(checkpoint), config(tmp_path, files["choice"], limit=1), bar=quiet())
    assert len(keys()) == 1
    evaluate(str(checkpoint), config(tmp_path, files["choice"], limit=1, num_shots=1), bar=quiet())
    assert len(keys()) == 2
    other = tmp_path / "other"
    pretrained.save(other, MODEL, weights(1), ByteTokenizer(), source={})
    assert manifest.fingerprint(str(other)) != manifest.fingerprint(str(checkpoint))
    evaluate(str(other), config(tmp_path, files["choice"], limit=1), bar=quiet())
    assert len(keys()) == 3
    stored = json.loads((tmp_path / "out.json").read_text())
    assert [sorted(value["tasks"]) for value in stored.values()] == [
        [f"{files['choice']} --limit 1", f"{files['choice']} --num_shots 1 --limit 1"],
        [f"{files['choice']} --limit 1"],
    ], "earlier results stay"


def test_each_result_says_how_it_was_made_and_another_precision_is_another_result(checkpoint: Path, files: dict[str, str], tmp_path: Path):
    for precision in ("auto", "bfloat16_matmul", "float32"):
        evaluate(str(checkpoint), config(tmp_path, files["choice"], limit=2, precision=precision), bar=quiet())
    (stored,) = json.loads((tmp_path / "out.json").read_text()).values()
    name = f"{files['choice']} --limit 2".replace(" ", " --precision {} ", 1)
    assert list(stored["tasks"]) == [name.replace("--precision {} ", ""), name.format("bfloat16_matmul"), name.format("float32")]
    how = [result["settings"] for result in stored["tasks"].values()]
    assert [one["precision"] for one in how] == ["float32", "bfloat16_matmul", "float32"] and how[0] == how[2]
    assert how[0]["limit"] == 2 and how[0]["backend"] == jax.default_backend()
    answers = [json.loads(line) for line in (tmp_path / "out.answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2 * 6 and len({answer["key"] for answer in answers}) == 2, "auto is float32 here, so that its answers serve"
    by_key = [sorted(a["score"][0] for a in answers if a["key"] == key) for key in {answer["key"] for answer in answers}]
    assert by_key[0] != by_key[1]


@pytest.mark.fault
def test_a_real_process_killed_twice_in_the_middle_of_its_tasks(checkpoint: Path, files: dict[str, str], tmp_path: Path):
    problems = [{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(40)]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))

    def start(out: Path) -> subprocess.Popen[str]:
        words = [str(checkpoint), "--tasks", *files.values(), "--out", str(out), "--batch_tokens", "64", "--batch_rows", "1"]
        words += ["--max_new_tokens", "8", "--temperature", "1.0"]
        return subprocess.Popen([sys.executable, "-m", "jaxllm.cli", "eval", *words], stdout=subprocess.PIPE, text=True)

    def lines(out: Path) -> list[str]:
        path = out.with_suffix(".answers.jsonl")
        return path.read_text().splitlines() if path.exists() else []

    out = tmp_path / "killed.json"
    for least in (3, 12):
        with start(out) as process:
            while sum("texts" in line for line in lines(out)) < least:
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -9 and sum("texts" in line for line in lines(out)) < len(problems)
    killed = len(lines(out))
    tables = []
    for path in (out, tmp_path / "unbroken.json"):
        with start(path) as process:
            tables.append(process.communicate(timeout=300)[0])
        assert process.returncode == 0
    assert tables[0] == tables[1] and "exact_match" in tables[0] and "bits_per_byte" in tables[0]
    assert sorted(lines(out)) == sorted(lines(tmp_path / "unbroken.json")), "to the bit, and nothing was asked twice"
    assert 12 < killed < len(lines(out))


def test_the_command_prints_a_table_and_draws_a_bar(checkpoint: Path, files: dict[str, str], tmp_path: Path, capsys: Any):
    words = [
        str(checkpoint),
        "--tasks",
        f"{files['choice']},{files['text']}",
        "--out",
        str(tmp_path / "o.json"),
        "--limit",
        "2",
        "--batch_tokens",
        "64",
    ]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert re.search(r"accuracy_per_byte +\d\.\d{4} +\d\.\d{4} +2\n", out) and "bits_per_byte" in out and "± standard error" in out
    assert "| 6/6 in" in err and "█" in err


def test_results_lie_in_the_run_directory_unless_told_otherwise(checkpoint: Path, files: dict[str, str]):
    got = evaluate(str(checkpoint), EvalConfig(tasks=(files["choice"],), limit=1, batch_tokens=64), bar=quiet())
    assert (checkpoint / "evals" / f"{got['checkpoint_hash']}.json").exists()


def test_results_of_a_cached_checkpoint_lie_beside_it_and_of_a_remote_one_here(
    checkpoint: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAXLLM_CACHE", str(checkpoint.parent))
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.iterdir()}
    name = f"cache://{checkpoint.name}"
    got = evaluate(name, EvalConfig(tasks=(files["choice"],), limit=2, batch_tokens=64), bar=quiet())
    assert json.loads((checkpoint / "evals" / f"{got['checkpoint_hash']}.json").read_text())[got["checkpoint_hash"]]["checkpoint"] == name
    assert {*tmp_path.iterdir()} == before
    assert command._results_file("gs://bucket/run", "1234abcd", "") == Path("evals/1234abcd.json")
    assert command._results_file("gs://bucket/run", "1234abcd", "cache://a.json") == checkpoint.parent / "a.json"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tasks", "text:x"], "needs a checkpoint first"),
        (["C"], "nothing to evaluate"),
        (["C", "--task", "text:x"], "did you mean .*--tasks"),
        (["C", "--tasks", "text:nowhere.txt"], "cannot read nowhere.txt"),
        (["C", "--tasks", "text:x", "--limit", "-1"], "must be at least 0"),
        (["C", "--tasks", "text:x", "--num_samples", "3"], "would write one text 3 times"),
        (["C", "--tasks", "text:x", "--out", "results"], "is not a .json file"),
        (["C", "--tasks", "text:x", "--out", "gs://bucket/a.json"], "is in an object store, where nothing can be appended; name a local"),
        (["nowhere", "--tasks", "text:x"], "nowhere does not exist"),
        (["HF", "--tasks", "text:x"], "is a Hugging Face folder; convert it first"),
    ],
)
def test_what_is_wrong_is_said(checkpoint: Path, words: list[str], message: str, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=message):
        main([{"C": str(checkpoint), "HF": str(tmp_path)}.get(word, word) for word in words])


def test_a_context_beyond_learned_positions_is_refused_before_the_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrained, "model_config", lambda checkpoint: replace(MODEL, position="learned"))
    with pytest.raises(ConfigError, match="--max_length is 65, and this model's learned positions end at 64"):
        evaluate("nowhere", EvalConfig(tasks=("text:x",), max_length=65), bar=quiet())


def test_two_processes_do_not_write_the_same_results(checkpoint: Path, files: dict[str, str], tmp_path: Path):
    with hold(tmp_path / "out.json"), pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* is writing .*out.json; wait"):
        evaluate(str(checkpoint), config(tmp_path, files["choice"]), bar=quiet())


def test_a_command_that_fails_leaves_nothing_and_a_lock_of_the_dead_is_no_obstacle(checkpoint: Path, files: dict[str, str], tmp_path: Path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".out.json.lock").write_text("process 1 on a machine that is gone")
    for folder in ("new", "new/and/deeper"):
        with pytest.raises(ConfigError, match="cannot read"):
            evaluate(str(checkpoint), config(tmp_path / folder, "text:nowhere.txt"), bar=quiet())
    assert not list((tmp_path / "new").iterdir())
    evaluate(str(checkpoint), config(tmp_path / "new", files["choice"], limit=1), bar=quiet())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.answers.jsonl", "out.json"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("out.json", '{"name": "somebody else", "version": 1}', "out.json was not written by jaxllm eval"),
        ("out.json", '{"0123abcd": {"checkpoint_hash": "0123abcd", "tasks": 5}}', "out.json was not written by jaxllm eval"),
        ("out.json", "[1, 2]", "out.json is damaged"),
        ("out.answers.jsonl", "a text without an end of line", "answers.jsonl was not written by jaxllm eval"),
        ("out.answers.jsonl", '{"question": "a"}\n{"torn', "answers.jsonl, line 1 was not written by jaxllm eval"),
        ("out.answers.jsonl", '{"key": "k", "task": "t", "item": 0, "score": [-1.0, false]}\n', "answers.jsonl, line 1 was not written"),
        ("out.answers.jsonl", '{"key": "k", "task": "t", "item": 0, "texts": [5]}\n', "answers.jsonl, line 1 was not written"),
    ],
)
def test_files_of_others_are_refused_and_stay(
    checkpoint: Path, files: dict[str, str], tmp_path: Path, name: str, content: str, message: str
):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        evaluate(str(checkpoint), config(tmp_path, files["choice"], limit=1), bar=quiet())
    assert (tmp_path / name).read_text() == content and not list(tmp_path.glob(".*"))


def test_a_comma_in_the_name_of_a_file_separates_nothing(checkpoint: Path, tmp_path: Path):
    for name in ("a,b.txt", "c", "x,y"):
        (tmp_path / name).write_text(f"{name} is a text")
    specs = [f"text:{tmp_path / name}" for name in ("a,b.txt", "c", "x,y")]
    got = evaluate(str(checkpoint), config(tmp_path, ",".join(specs), f"{specs[0]},"), bar=quiet())
    assert list(got["tasks"]) == specs
    (tmp_path / "empty,x.txt").touch()
    with pytest.raises(ConfigError, match=r"empty,x\.txt has no text to score"):
        evaluate(str(checkpoint), config(tmp_path, f"text:{tmp_path / 'empty,x.txt'}"), bar=quiet())


@pytest.mark.parametrize(
    "task, flags, message",
    [
        ("text", ["--num_shots", "2"], r"no task here reads --num_shots \(text\)"),
        ("text", ["--max_new_tokens", "2"], r"no task here reads --max_new_tokens"),
        ("choice", ["--stride", "2"], r"no task here reads --stride \(choice\)"),
        ("choice", ["--num_beams", "4"], r"no task here reads --num_beams"),
        ("choice", ["--include_path", "x"], "no task here reads --include_path"),
        ("gsm8k", ["--answer_context"], "no task here reads --answer_context"),
        ("gsm8k", ["--num_beams", "4", "--temperature", "1"], "draws nothing; leave out --num_samples and --temperature"),
        ("gsm8k", ["--top_p", "0.5"], "changes nothing at --temperature 0"),
        ("gsm8k", ["--temperature", "nan"], "need a finite temperature"),
        ("gsm8k", ["--seed", "-1"], "--seed is -1; it must be from 0"),
    ],
)
def test_a_flag_that_changes_nothing_is_refused_by_name(checkpoint: Path, files: dict[str, str], task: str, flags: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        main([str(checkpoint), "--tasks", files[task], *flags])


def test_a_cache_that_memory_does_not_hold_is_refused_with_the_numbers(checkpoint: Path, files: dict[str, str], tmp_path: Path):
    with pytest.raises(ConfigError, match=r"5 rows of \S+ tokens need a cache of [\d,.]+ GB, and [\d,.]+ GB are free"):
        evaluate(str(checkpoint), replace(config(tmp_path, files["gsm8k"]), max_length=10**13, max_new_tokens=10**12), bar=quiet())


def test_a_batch_that_memory_does_not_hold_is_refused_with_the_numbers(
    checkpoint: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(limits, "free_bytes", lambda mesh: 1_000)
    with pytest.raises(ConfigError, match=r"a batch of 64 tokens needs hidden states of 0\.0 GB, and 0\.0 GB are free; lower --batch"):
        evaluate(str(checkpoint), config(tmp_path, files["choice"]), bar=quiet())
    monkeypatch.setattr(limits, "free_bytes", lambda mesh: None)  # a system that does not say
    evaluate(str(checkpoint), config(tmp_path, files["choice"], limit=1), bar=quiet())


def test_what_is_said_of_a_damaged_checkpoint_is_no_result(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: print("checkpoint 3 is damaged"))
    LOAD("anywhere", "auto")
    out, err = capsys.readouterr()
    assert out == "" and "checkpoint 3 is damaged" in err


def test_beam_search_writes_what_its_width_finds(checkpoint: Path, files: dict[str, str], tmp_path: Path):
    got = evaluate(str(checkpoint), config(tmp_path, files["gsm8k"], num_beams=3, limit=2), bar=quiet())
    (result,) = got["tasks"].values()
    assert result["settings"]["num_beams"] == 3 and result["settings"]["length_penalty"] == 0.6
    lines = [json.loads(line) for line in (tmp_path / "out.answers.jsonl").read_text().splitlines()]
    model = command._load(str(checkpoint), "auto", sharding.make_mesh(pretrained.ONE_DEVICE))
    engine = command.generator(model.lm, command.sampler(0.0, top_p=1.0))
    prompts = [[256, *model.tokenizer.encode(f"Question: {i}?\nAnswer:")] for i in range(2)]
    assert model.tokenizer.bos_id == 256
    found = beam_search(engine, model.params, prompts, num_tokens=4, num_beams=3, stop_ids=(257,), length_penalty=0.6, offset=5)
    assert [line["texts"] for line in lines] == [[model.tokenizer.decode(beams[0].ids)] for beams in found]
