"""Multiple choice by likelihood: each measure by hand, prompts as GPT-3 wrote them."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import ConfigError
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.evals import choice, tasks
from jaxllm.evals.choice import Question, accuracy, chosen, cloze, last_word, mean, shots
from jaxllm.evals.likelihood import Score
from jaxllm.evals.tasks import Options

# Two characters of two bytes each, and four characters of one byte: every measure sees other lengths.
QUESTION = Question(("Q: ?\nA:",) * 3, (" éü", " abcd", " x"), 1)


def scores(*log_probs: float, num_tokens: tuple[int, ...] = (4, 2, 1)) -> list[Score]:
    return [Score(p, False, n) for p, n in zip(log_probs, num_tokens, strict=True)]


def test_each_measure_by_hand():
    picks = chosen(QUESTION, scores(-8.0, -9.0, -7.0), scores(-1.0, -9.5, -2.0))
    # sum: -7 is largest. per token: -2, -4.5, -7. per character: -4, -2.25, -7. per byte: -2, -2.25, -7. answer: -7, +0.5, -5.
    assert picks == {"sum": 2, "per_token": 0, "per_char": 1, "per_byte": 0, "answer": 1}
    assert choice._normalised("per_byte", QUESTION, scores(-8.0, -9.0, -7.0), ()) == [-2.0, -2.25, -7.0]
    assert choice._normalised("per_char", QUESTION, scores(-8.0, -9.0, -7.0), ()) == [-4.0, -2.25, -7.0]


def test_a_constant_log_prob_per_token_makes_length_matter_to_the_sum_alone():
    """A stub model in which every token costs one nat (gpt.md, 9)."""
    constant = [Score(-float(n), False, n) for n in (4, 2, 1)]
    assert chosen(QUESTION, constant)["sum"] == 2
    per_token = [score.log_prob / score.num_tokens for score in constant]
    assert len(set(per_token)) == 1 and chosen(QUESTION, constant)["per_token"] == 0, "equals: the first"


def test_answer_is_the_difference_of_two_sums():
    with_question, alone = scores(-5.0, -6.0, -7.0), scores(-1.0, -4.0, -2.5)
    assert choice._normalised("answer", QUESTION, with_question, alone) == [-4.0, -2.0, -4.5]
    assert "answer" not in chosen(QUESTION, with_question)
    assert choice.answer_pairs(QUESTION)[1] == ("Answer: ", "abcd"), "one space between, not two"


def test_accuracy_and_its_standard_error():
    questions = [QUESTION] * 4
    out = accuracy(questions, [{"sum": i} for i in (1, 1, 0, 1)])
    assert out["accuracy_sum"].value == 0.75
    assert out["accuracy_sum"].standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))  # p(1-p)/(n-1), as lm-eval has it
    assert math.isnan(mean([1.0]).standard_error)


# ------------------------------------------------------------------------------------------- few shots


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 5))
def test_shots_never_hold_the_question_and_depend_on_nothing_else(number: int, num_shots: int, seed: int):
    pool = [f"Q{i} A{i}" for i in range(10)]
    text = shots(pool, number, num_shots, seed, inside=True)
    drawn = text.split("\n\n")[:-1]
    assert pool[number] not in drawn and len(set(drawn)) == num_shots == len(drawn)
    assert text == shots(pool, number, num_shots, seed, inside=True)


def test_no_shots_are_the_zero_shot_prompt_and_two_differ_from_question_to_question():
    pool = [f"Q{i}" for i in range(40)]
    assert shots(pool, 3, 0, 0, inside=True) == ""
    assert choice.pairs(QUESTION) == choice.pairs(QUESTION, shots(pool, 3, 0, 0, inside=True))
    assert len({shots(pool, i, 2, 0, inside=False) for i in range(20)}) > 15


def test_a_double_of_the_question_is_not_drawn():
    with pytest.raises(ConfigError, match="1 shots cannot be drawn from 0 other examples"):
        shots(["same", "same"], 0, 1, 0, inside=True)


def test_lambada_forms():
    assert last_word("Alice went to visit her friend Bob\n") == ("Alice went to visit her friend", " Bob")
    assert cloze("Alice went to visit her friend Bob") == ("Alice went to visit her friend ____. →", " Bob")
    with pytest.raises(ConfigError, match="no word before its last one"):
        last_word("Bob")


# ------------------------------------------------------------------------------------------------ files


def write(path: Path, records: list[Any], *, zipped: bool = False) -> Path:
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


def texts(task: tasks.Task) -> list[tuple[str, str]]:
    decode = ByteTokenizer().decode
    return [(decode(r.context), decode(r.continuation)) for r in task.items]  # type: ignore[union-attr]


def test_a_choice_file(tmp_path: Path):
    path = write(
        tmp_path / "c.jsonl",
        [{"question": "1+1=", "choices": ["2", " 3"], "answer": 0}, {"context": "Sky:", "choices": ["blue"], "gold": 0}],
    )
    task = tasks.load(f"choice:{path}", ByteTokenizer(), 64)
    assert texts(task) == [("1+1=", " 2"), ("1+1=", " 3"), ("Sky:", " blue")]
    assert task.labels[1] == {"document": 0, "choice": 1} and task.num_documents == 2
    assert task.report(scores(-1.0, -2.0, -3.0))["accuracy_sum"].value == 1.0
    few = tasks.load(f"choice:{path}", ByteTokenizer(), 64, Options(num_shots=1))
    assert texts(few)[0] == ("Sky: blue\n\n1+1=", " 2")


def test_answer_contexts_are_asked_after_all_questions(tmp_path: Path):
    path = write(
        tmp_path / "c.jsonl", [{"question": "a", "choices": ["x", "y"], "answer": 1}, {"question": "b", "choices": ["z", "w"], "answer": 0}]
    )
    task = tasks.load(f"choice:{path}", ByteTokenizer(), 64, Options(answer_context=True))
    assert texts(task)[4:] == [("Answer:", " x"), ("Answer:", " y"), ("Answer:", " z"), ("Answer:", " w")]
    score = lambda p: Score(p, False, 1)
    out = task.report([score(p) for p in (-1, -2, -1, -2, -9, -2, -9, -1)])  # differences: 8 and 0, 8 and -1
    assert out["accuracy_sum"].value == 0.5 and out["accuracy_answer"].value == 0.5
    out = task.report([score(p) for p in (-1, -2, -1, -2, -1, -9, -9, -1)])  # 0 and 7, 8 and -1
    assert out["accuracy_sum"].value == 0.5 and out["accuracy_answer"].value == 1.0


def olmo(document: int, index: int, context: str, continuation: str, label: int) -> dict[str, Any]:
    return {"request_type": "loglikelihood", "doc_id": document, "idx": index, "label": label,
            "request": {"context": context, "continuation": continuation}}  # fmt: skip


def test_an_olmo_requests_file_by_its_path(tmp_path: Path):
    records = [
        olmo(0, 1, "Q", " no", 0), olmo(0, 0, "Q", " yes", 0),  # out of order
        olmo(1_000_000, 0, "Answer:", " yes", 0),  # unconditional
        olmo(1, 0, "left", " went", 1), olmo(1, 1, "right", " went", 1),  # contexts of their own
    ]  # fmt: skip
    path = write(tmp_path / "requests.jsonl.gz", records, zipped=True)
    task = tasks.load(str(path), ByteTokenizer(), 64)
    assert texts(task) == [("Q", " yes"), ("Q", " no"), ("left", " went"), ("right", " went")]
    assert task.report([Score(p, False, 1) for p in (-1, -2, -1, -2)])["accuracy_sum"].value == 0.5
    assert len(tasks.load(str(path), ByteTokenizer(), 64, Options(limit=1)).items) == 2


def test_lambada_wants_every_token_to_be_greedy(tmp_path: Path):
    path = tmp_path / "l.txt"
    path.write_text("He saw Bob\nShe met Ann\n")
    task = tasks.load(f"lambada:{path}", ByteTokenizer(), 64)
    assert texts(task) == [("He saw", " Bob"), ("She met", " Ann")]
    out = task.report([Score(-2.0, True, 4), Score(-4.0, False, 4)])
    assert out["accuracy"].value == 0.5
    assert out["perplexity"].value == pytest.approx(math.exp(3.0)) and out["perplexity"].standard_error == pytest.approx(math.exp(3.0))
    few = tasks.load(f"lambada:{path}", ByteTokenizer(), 64, Options(num_shots=1))
    assert texts(few)[0] == ("She met ____. → Ann\n\nHe saw ____. →", " Bob")


def test_perplexity_of_a_text(tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_text("héllo worl")  # 11 bytes
    task = tasks.load(f"text:{path}", ByteTokenizer(), 4)
    assert [len(r.continuation) for r in task.items] == [4, 4, 3]  # type: ignore[union-attr]
    out = task.report([Score(-4.0, False, 4), Score(-8.0, False, 4), Score(-10.0, False, 3)])
    assert out["loss"].value == pytest.approx(2.0)
    assert out["perplexity"].value == pytest.approx(math.exp(2.0))
    assert out["bits_per_byte"].value == pytest.approx(22 / math.log(2) / 11)


GOOD = '{"question": "a", "choices": ["x"], "answer": 0}\n'
OLMO = json.dumps(olmo(0, 0, "Q", " a", 0))


@pytest.mark.parametrize(
    "content, spec, message",
    [
        ("", "choise:F", "no task 'choise:F'; did you mean 'choice'"),
        ("", "choice", "needs a file"),
        ("", "choice:missing.jsonl", "cannot read missing.jsonl"),
        (f"{GOOD}not json\n", "choice:F", "line 2: it is not JSON"),
        (f"{GOOD}[1]\n", "choice:F", r"line 2: it is \[1\], not a JSON object"),
        (f"{GOOD}{'[' * 100_000}\n", "choice:F", "line 2: it is not JSON .maximum recursion"),
        (f"{GOOD}\n" + r'{"question": "\ud800", "choices": ["x"], "answer": 0}', "choice:F", "line 3: it has half a surrogate pair"),
        ("", "choice:F", "f.jsonl is empty"),
        (f'{GOOD}{{"question": "a", "choices": ["x"], "answer": 1}}', "choice:F", "line 2: .* counted from 0"),
        (f'{GOOD}{{"question": "a", "choices": ["x"]}}', "choice:F", "line 2: it has no field 'answer'"),
        (f'{GOOD}{{"question": "a", "choices": [1, 2], "answer": 0}}', "choice:F", "line 2: 'choices' has 1; each must be a text"),
        (f'{GOOD}{{"question": "a", "choices": ["x", " "], "answer": 0}}', "choice:F", "line 2: 'choices' has \" \"; each must be"),
        (f'{GOOD}{{"question": "a", "choices": "xy", "answer": 0}}', "choice:F", "line 2: 'choices' is \"xy\"; it must be a list"),
        (f'{GOOD}{{"question": 5, "choices": ["x"], "answer": 0}}', "choice:F", "line 2: 'question' is 5; it must be a text"),
        (f'{GOOD}{{"question": "a", "choices": ["x"], "answer": true}}', "choice:F", "line 2: 'answer' is true; it must be a whole number"),
        ('{"txt": "a"}', "lambada:F", "line 1: it has no field 'text'; did you mean 'txt'"),
        ('{"text": "a b"}\n{"text": "a"}', "lambada:F", "line 2: 'a' has no word before its last one"),
        ("one two\n\nthree\n", "lambada:F", "line 3: 'three' has no word before its last one"),
        ('{"text": "a b"}\n{"text": null}', "text:F", "line 2: 'text' is null; it must be a text"),
        ('{"text": ""}\n', "text:F", "f.jsonl has no text to score"),
        ('{"question": "a", "answer": 5}', "gsm8k:F", "line 1: 'answer' is 5; it must be a text"),
        ('{"question": "a", "answer": "none"}', "gsm8k:F", "line 1: 'answer' is \"none\"; it must have a number in it"),
        ('{"request_type": "generate_until", "request": {}}', "choice:F", "line 1: it is a request of type 'generate_until'"),
        (OLMO.replace('"doc_id": 0, ', ""), "F", "line 1: it has no field 'doc_id'"),
        (OLMO.replace('"doc_id": 0', '"doc_id": "0"'), "F", "line 1: 'doc_id' is \"0\"; it must be a whole number"),
        (OLMO.replace('"idx": 0, ', ""), "F", "line 1: it has no field 'idx'"),
        (OLMO.replace('" a"', "null"), "F", "line 1: 'continuation' is null; it must be a text"),
        (OLMO.replace('"label": 0', '"label": 3'), "F", "doc_id 0: a question's right answer is 3"),
        (OLMO.replace('"doc_id": 0', '"doc_id": 1000000'), "F", "after 'Answer:' alone"),
        ('{"prompt": ""}', "human_eval:F", "--run_code True"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: str, spec: str, message: str):
    path = tmp_path / "f.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        tasks.load(spec.replace("F", str(path)) if spec != "choise:F" else spec, ByteTokenizer(), 64)
    assert "\n" not in str(error.value) and ("line" not in message or "f.jsonl, line" in str(error.value))


@pytest.mark.parametrize("spec", ["text", "choice", "lambada", "gsm8k"])
def test_a_damaged_file_is_named_with_the_line(tmp_path: Path, spec: str):
    lines = "".join(json.dumps({"text": f"{i} and so on, {i * i}"}) + "\n" for i in range(5000)).encode()
    zipped, path = gzip.compress(lines), tmp_path / "f.jsonl"
    middle = len(zipped) // 2
    flipped = zipped[:middle] + bytes([zipped[middle] ^ 0xFF]) + zipped[middle + 1 :]
    broken = {
        r"after line \d+ .Compressed file ended": zipped[: len(zipped) // 2],
        r"after line \d+ .(CRC check failed|Error -3)": flipped,
        "Error -3 while decompressing": zipped[:10] + b"\xff" + zipped[11:],  # no kind of block
        r"after line [1-9]\d* .Not a gzipped file": zipped + b"more",
        "Compressed file ended": zipped[:5],
        "line 3 .byte 0xff is not UTF-8": b'{"text": "a b"}\n\n{"text": "\xff"}\n',
    }
    for message, data in broken.items():
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=f"cannot read .*f.jsonl.*{message}"):
            tasks.load(f"{spec}:{path}", ByteTokenizer(), 64)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path):
    (tmp_path / "f.jsonl").write_text("\ufeff" + GOOD)
    assert tasks.load(f"choice:{tmp_path / 'f.jsonl'}", ByteTokenizer(), 64).num_documents == 1


def test_a_line_separator_within_a_passage_ends_no_passage(tmp_path: Path):
    (tmp_path / "l.txt").write_text("He\u2028saw Bob\r\nShe met Ann\n")
    assert texts(tasks.load(f"lambada:{tmp_path / 'l.txt'}", ByteTokenizer(), 64)) == [("He\u2028saw", " Bob"), ("She met", " Ann")]
