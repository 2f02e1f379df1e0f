"""Tasks judged by what is written: answers, stop strings, pass@k, and programs that mean no good."""

from __future__ import annotations

import itertools
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import tree
from jaxllm.config import ConfigError, ModelConfig
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.evals import generation, records, sandbox, tasks
from jaxllm.evals.generation import Prompt, Writer, cut, final_number, pass_at_k, write
from jaxllm.evals.tasks import Options
from jaxllm.models.generate import Completion, generator, sampler
from jaxllm.models.transformer import decoder

DATA = os.environ.get("JAXLLM_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="JAXLLM_DATA is not set: the folder with gsm8k and human_eval")

# --------------------------------------------------------------------------------------------- pass@k


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(num: int, data: st.DataObject):
    right, k = data.draw(st.integers(0, num)), data.draw(st.integers(1, num))
    draws = list(itertools.combinations(range(num), k))
    share = sum(any(i < right for i in draw) for draw in draws) / len(draws)
    assert pass_at_k(num, right, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_the_paper_s_product_at_its_sizes():
    product = 1.0 - np.prod(1.0 - 100 / np.arange(200 - 20 + 1, 200 + 1))
    assert pass_at_k(200, 20, 100) == pytest.approx(product, rel=1e-9)
    with pytest.raises(ConfigError, match="pass@10 needs at least 10 samples"):
        pass_at_k(5, 1, 10)


# --------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "text, number",
    [
        ("9 * 2 = 18.\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### $5.50\nQuestion: 7", "5.5"),
        ("#### -3", "-3"),
        ("She has 3 apples and 4 pears, so 7.", "7"),
        ("The answer is 70,000.", "70000"),
        ("x 0.50", "0.5"),
        ("1000", "1000"),
        ("no number", None),
        ("#### none, though 5 was", "5"),
    ],
)
def test_final_number(text: str, number: str | None):
    assert final_number(text) == number


@needs_data
def test_gsm8k_gold_answers_and_prompts():
    path = Path(DATA) / "gsm8k" / "test.jsonl.gz"
    task = tasks.load(f"gsm8k:{path}", ByteTokenizer(), 4096, Options(num_shots=3))
    found = records.parse(path, dict)
    assert task.num_documents == len(found) == 1319
    shots = task.items[0].text.split("\n\n")  # type: ignore[union-attr]
    assert len(shots) == 4 and shots[-1] == f"Question: {found[0]['question']}\nAnswer:"
    train = {generation.worked(record) for record in records.parse(path.with_name("train.jsonl.gz"), dict)}
    assert all(shot in train for shot in shots[:3]) and "<<" not in "".join(shots)
    assert task.items[0].text != task.items[1].text  # type: ignore[union-attr]
    right = [[f"so {record['answer'].split('####')[1]}."] for record in found]
    assert task.report(right)["exact_match"].value == 1.0
    assert task.report([["so 0.123"]] * len(found))["exact_match"].value == 0.0


# --------------------------------------------------------------------------------------------- writing


def stub(monkeypatch: pytest.MonkeyPatch, said: dict[str, str]) -> list[list[str]]:
    """A model that continues each prompt with a text that is known, one byte a token; notes its batches."""
    batches: list[list[str]] = []
    tokenizer = ByteTokenizer()

    def completions(generate: Any, params: Any, rows: Any, *, num_tokens: Any, num_samples: int, watch: Any, **_: Any) -> list[Completion]:
        batches.append([tokenizer.decode(row) for row in rows])
        out = []
        for i, row in enumerate(rows):
            for sample in range(num_samples):
                ids: list[int] = []
                for token in tokenizer.encode(said[tokenizer.decode(row)])[: num_tokens[i]]:
                    ids.append(token)
                    if watch(i * num_samples + sample, token):
                        break
                out.append(Completion(i, sample, ids))
        return out

    monkeypatch.setattr(generation, "completions", completions)
    return batches


def writer(max_length: int = 100, batch_rows: int = 2) -> Writer:
    return Writer(None, None, ByteTokenizer(), (257,), max_length, batch_rows)  # type: ignore[arg-type]


def test_texts_end_before_their_stop_string_and_come_in_order(monkeypatch: pytest.MonkeyPatch):
    batches = stub(monkeypatch, {"a": "one STOP two", "bbb": "never ends", "cc": "é. x"})
    prompts = [Prompt("a", ("STOP",), 40), Prompt("bbb", ("STOP",), 5), Prompt("cc", ("x", "."), 40)]
    assert write(writer(), prompts) == [["one "], ["never"], ["é"]]
    assert batches == [["bbb", "cc"], ["a"]] or sum(map(len, batches)) == 3


def test_every_sample_is_written_and_a_done_batch_is_left_out(monkeypatch: pytest.MonkeyPatch):
    batches = stub(monkeypatch, {"a": "1", "b": "2", "c": "3"})
    prompts = [Prompt(text, (), 4) for text in "abc"]
    notes: list[dict[int, list[str]]] = []
    whole = write(writer(batch_rows=4), prompts, num_samples=2, on_batch=notes.append)
    assert whole == [["1", "1"], ["2", "2"], ["3", "3"]] and len(notes) == 2
    batches.clear()
    assert write(writer(batch_rows=4), prompts, num_samples=2, done=notes[0]) == whole
    assert len(batches) == 1


def test_a_long_prompt_loses_its_beginning_and_an_impossible_one_is_refused():
    row = generation.encode_prompt(writer(10), 0, Prompt("abcdefghij", (), 4))
    assert ByteTokenizer().decode(row) == "efghij" and len(row) == 6
    with pytest.raises(ConfigError, match="leaves no room for a prompt in a context of 4"):
        generation.encode_prompt(writer(4), 0, Prompt("abc", (), 4))


class Letters:
    """A tokenizer of five letters, the last of which ends a text."""

    bos_id = None

    def encode(self, text: str, special: bool = False) -> list[int]:
        return ["abcd.".index(letter) for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join("abcd."[i] for i in ids)


LETTERS = ModelConfig(num_layers=1, width=12, num_heads=2, num_kv_heads=1, head_size=4, ff_width=20, vocab_size=5, max_length=16)
NUM = 4


@cache
def letters(seed: int) -> Any:
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(decoder(LETTERS).init, jax.random.key(0))
    return tree.map_with_path(lambda path, leaf: rng.normal("norm" in path, 0.5, leaf.shape).astype(np.float32), shapes)


@jax.jit
def forward(params: Any, tokens: Any) -> Any:
    lm = decoder(LETTERS)
    return jax.nn.log_softmax(lm.unembed(params).logits(lm.apply(params, tokens).hidden), -1)


def exhaustive(prompt: str, stop: str, seed: int, offset: int) -> list[tuple[float, str]]:
    """(score, text with what ended it) of every continuation that ends, by full forward passes; best first."""
    texts = ["".join(text) for length in range(1, NUM + 1) for text in itertools.product("abcd.", repeat=length)]
    ends = lambda text: text[-1] == "." or stop in text
    texts = [text for text in texts if not any(ends(text[:n]) for n in range(1, len(text))) and (len(text) == NUM or ends(text))]
    rows = np.array([Letters().encode(f"{prompt}{text}".ljust(4 + NUM, "a")) for text in texts])
    logps = np.take_along_axis(np.asarray(forward(letters(seed), rows), np.float64)[:, :-1], rows[:, 1:, None], 2)[:, len(prompt) - 1 :, 0]
    norm = lambda n: ((offset + n) / (offset + 1)) ** 0.6
    return sorted(((row[: len(text)].sum() / norm(len(text)), text) for row, text in zip(logps, texts, strict=True)), reverse=True)


def test_beam_search_with_gpt_3_s_penalty_is_exhaustive_search():
    prompts, told, differ = ["abca", "bd", "c"], [], 0
    engine = generator(decoder(LETTERS), sampler(0.0))
    for seed in range(3):
        wide = Writer(engine, letters(seed), Letters(), (4,), 16, 200, num_beams=64)  # type: ignore[arg-type]
        told += write(wide, [Prompt(prompt, ("cb",), NUM) for prompt in prompts])
        for prompt in prompts:
            best = exhaustive(prompt, "cb", seed, offset=5)
            assert best[0][0] > best[1][0] + 1e-4, "no draw"
            assert told[len(told) - len(prompts) + prompts.index(prompt)] == [cut(best[0][1].removesuffix("."), ["cb"])]
            differ += best[0][1] != exhaustive(prompt, "cb", seed, offset=0)[0][1]
    assert differ, "the offset of 5 decides somewhere"


def test_cut_takes_the_first_stop():
    assert cut("a;b.c", (".", ";")) == "a" and cut("abc", ("x",)) == "abc"


# --------------------------------------------------------------------------------------------- programs


def test_a_program_passes_when_its_last_line_is_reached():
    assert sandbox.run("import math, typing\nassert math.sqrt(4) == 2").why == "passed"


@pytest.mark.parametrize(
    "source",
    [
        "assert False",
        "syntax error",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "x = bytearray(2**31)",
        "x = []\nwhile True: x.append(bytearray(2**20))",
        "open('big', 'wb').write(bytes(2**25))",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    ],
)
def test_a_program_that_leaves_early_or_takes_too_much_has_failed(source: str):
    outcome = sandbox.run(source, timeout_seconds=20, memory_bytes=2**28)
    assert (outcome.passed, outcome.why) == (False, "failed")


def test_an_endless_loop_is_ended():
    started = time.monotonic()
    assert sandbox.run("while True: pass", timeout_seconds=1).why == "timed out"
    assert (
        sandbox.run("import time\ntry:\n  while True: time.sleep(9)\nexcept BaseException:\n  pass", timeout_seconds=1).why == "timed out"
    )
    assert time.monotonic() - started < 10


def test_files_are_written_in_a_folder_that_goes_away(tmp_path: Path):
    where = tmp_path / "said"
    inside = sandbox.run("import os\nopen('mine', 'w').write('x')\nassert os.listdir('.') == ['mine']")
    assert inside.passed
    outside = sandbox.run(f"open({str(where)!r}, 'w').write('x')")
    if "files" not in outside.guards:
        pytest.skip("this kernel has no Landlock: writing elsewhere is not prevented")
    assert not outside.passed and not where.exists()
    (tmp_path / "precious").write_text("x")
    assert not sandbox.run(f"import os; os.remove({str(tmp_path / 'precious')!r})").passed
    assert (tmp_path / "precious").exists()


def test_there_is_no_network_and_no_process_outlives_its_program(tmp_path: Path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection({server.getsockname()!r}, timeout=2)"
        outcome = sandbox.run(program)
        if "network" not in outcome.guards:
            pytest.skip("this system allows no user namespaces: the network is not cut off")
        assert not outcome.passed
        with socket.create_connection(server.getsockname(), timeout=2):
            pass  # it was not the server's fault
    fork = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(60)\nelse:\n  time.sleep(60)"
    before = _processes()
    assert sandbox.run(fork, timeout_seconds=1).why == "timed out"
    time.sleep(0.3)
    assert not _processes() - before


def _processes() -> set[str]:
    """Processes of the sandbox that are alive now."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"sandbox_child" in path.read_bytes():
                found.add(path.parent.name)
        except OSError:
            continue
    return found


@needs_data
def test_human_eval_s_own_solutions_pass_and_empty_ones_do_not(tmp_path: Path):
    path = Path(DATA) / "human_eval" / "HumanEval.jsonl.gz"
    task = tasks.load(f"human_eval:{path}", ByteTokenizer(), 4096, Options(run_code=True, limit=4, num_samples=2))
    found = records.parse(path, dict)[:4]
    solved = task.report([[record["canonical_solution"], "    return None\n"] for record in found])
    assert solved["pass@1"].value == 0.5
    assert task.report([["    pass\n", ""] for _ in found])["pass@1"].value == 0.0
