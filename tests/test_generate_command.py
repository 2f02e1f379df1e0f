"""`jaxllm generate`: prompts, chats and files, on a tiny model of bytes."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import generate, sharding, tree
from jaxllm.config import ConfigError, MeshConfig, ModelConfig
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.generate import GenerateConfig, Text, Writer, command, limits, prepare, read_requests, run_chat, run_file, run_prompt
from jaxllm.generate.limits import cache_bytes
from jaxllm.models.decoding import for_cpu
from jaxllm.models.transformer import decoder

CONFIG = ModelConfig(num_layers=1, width=12, num_heads=2, num_kv_heads=1, head_size=4, ff_width=20, vocab_size=259, max_length=48)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@cache
def pretrained() -> Any:
    """Stands for pretrained.Pretrained: what the command reads of it."""
    lm, rng = decoder(CONFIG), np.random.default_rng(0)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    params = tree.map_with_path(
        lambda path, leaf: rng.normal(1.0 if "norm" in path else 0.0, 0.5, leaf.shape).astype(np.float32), shapes
    )  # fmt: skip
    return SimpleNamespace(
        config=CONFIG, params=params, tokenizer=ByteTokenizer(), chat_template=TEMPLATE, stop_ids=(257,),
        for_decoding=lambda mesh, precision: for_cpu(CONFIG, params, precision),
    )  # fmt: skip


@cache
def engine(temperature: float = 1.0) -> Writer:
    return prepare(pretrained(), GenerateConfig(prompt="x", temperature=temperature), sharding.make_mesh(MeshConfig(data=1)), "float32")


def writer(temperature: float = 1.0, **options: Any) -> Writer:
    """The tiny model with some flags; compiled once for each temperature."""
    given = {"prompt": "" if "file" in options else "x", "num_tokens": 8, "temperature": temperature}
    return replace(engine(temperature), config=GenerateConfig(**{**given, **options}))


def said(**options: Any) -> str:
    out = io.StringIO()
    run_prompt(writer(**options), out)
    return out.getvalue()


def test_a_prompt_is_continued_and_the_same_again():
    first = said(prompt="abc", seed=3)
    assert first.startswith("abc") and first.endswith("\n") and len(first) > 4
    assert said(prompt="abc", seed=3) == first != said(prompt="abc", seed=4)


def test_samples_are_numbered_and_the_first_is_what_one_sample_gives():
    text = said(prompt="abc", num_samples=2, seed=3)
    assert "--- sample 0, log-probability -" in text and "--- sample 1" in text
    assert said(prompt="abc", seed=3).strip("\n") in text


def test_streamed_text_is_the_whole_text_and_ends_before_a_stop_string():
    free, parts = writer(num_tokens=30, seed=1), []
    ids = free.encode("abc")
    whole = free.texts([ids], lambda row, text: parts.append(text))[0][0]
    assert "".join(parts) == whole.text and whole.finish == "length" and whole.logp == pytest.approx(sum(whole.logps))
    stop = next(
        whole.text[i : i + 2] for i in range(5, len(whole.text)) if "\ufffd" not in whole.text[i : i + 2] and len(whole.text) > i + 2
    )
    cut = writer(num_tokens=30, seed=1, stop=(stop,)).texts([ids])[0][0]
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish == "stop" and len(cut.ids) < len(whole.ids)


def test_beams_come_best_first():
    texts = writer(num_beams=3, num_samples=2).texts([writer().encode("abc")])[0]
    assert len(texts) == 2 and texts[0].logp / (len(texts[0].ids) or 1) >= texts[1].logp / (len(texts[1].ids) or 1) - 0.5
    assert texts[0].text != texts[1].text


def test_beams_end_at_a_stop_string_and_are_the_same_in_a_batch():
    free = writer(num_beams=3, num_samples=3).texts([writer().encode("abc")])[0]
    stop = next(text.text[1:3] for text in free if len(text.text) > 3 and "\ufffd" not in text.text[1:3])
    made = writer(num_beams=3, num_samples=3, stop=(stop,))
    alone, other = made.texts([made.encode("abc")]), made.encode("a longer one")
    assert any(text.finish == "stop" for text in alone[0]) and not any(stop in text.text for text in alone[0])
    assert [text.text for text in made.texts([other, made.encode("abc")])[1]] == [text.text for text in alone[0]]


def test_stop_tokens_of_the_flags_are_added_to_the_models():
    with_flags = prepare(pretrained(), GenerateConfig(prompt="x", stop_ids=(65, 66)), sharding.make_mesh(MeshConfig(data=1)), "float32")
    assert with_flags.stop_ids == (257, 65, 66)


def test_a_prompt_that_fills_the_context_is_refused_by_how_much():
    with pytest.raises(ConfigError, match="has 53 tokens, and a context of 48 leaves at most 47 for it: 6 too many"):
        said(prompt="x" * 52)
    assert len(writer().texts([writer().encode("x" * 45)])[0][0].ids) <= 2, "46 of 48 tokens are the prompt"


def test_nothing_of_a_prompt_that_is_refused_is_printed():
    for options, message in (
        ({"prompt": "x" * 52}, "6 too many"),
        ({"prompt": "x", "max_length": 10**13, "num_tokens": 10**12}, r"1 rows of 1,000,000,000,002 tokens need a cache of .* GB are free"),
        ({"prompt": "x", "num_samples": 10**12}, r"1,000,000,000,000 rows of 10 tokens need a cache"),
        ({"prompt": "x", "num_beams": 10**12}, r"1,000,000,000,000 rows of 10 tokens need a cache"),
    ):
        out = io.StringIO()
        with pytest.raises(ConfigError, match=message):
            run_prompt(writer(**options), out)
        assert out.getvalue() == ""


def test_the_cache_is_reckoned_as_it_would_be_allocated():
    lm = writer().lm
    for rows, slots in ((1, 16), (3, 48), (8, 1 << 24), (8, 1 << 26)):
        assert cache_bytes(lm, rows, slots) == rows * slots * (2 * 4 * 4 + 4), "k and v of one head of 4 float32, and a position"
    mesh = sharding.make_mesh(MeshConfig(data=1))
    assert 10**8 < limits.free_bytes(mesh) < 10**13


def test_lengths_and_tokens_that_the_model_does_not_have_are_refused():
    mesh = sharding.make_mesh(MeshConfig(data=1))
    with pytest.raises(ConfigError, match="--stop_ids has 259, and this model's tokens are 0 to 258"):
        prepare(pretrained(), GenerateConfig(prompt="x", stop_ids=(5, 259)), mesh, "float32")
    learned = SimpleNamespace(**{**vars(pretrained()), "config": replace(CONFIG, position="learned")})
    with pytest.raises(ConfigError, match="--max_length is 49, and this model's learned positions end at 48"):
        prepare(learned, GenerateConfig(prompt="x", max_length=49), mesh, "float32")


# ------------------------------------------------------------------------------------------------ chat


def test_a_line_that_is_not_utf_8_is_said_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    raw = io.TextIOWrapper(io.BytesIO(b"h\xe9 there\nhi\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", raw)
    monkeypatch.setattr(command, "_load", lambda checkpoint, config: writer(chat=True, prompt="", num_tokens=2))
    assert generate.main(["model", "--chat"]) == 0
    out, err = capsys.readouterr()
    assert "what you wrote has byte 0xe9 at character 1, which is not UTF-8" in err and out.count("\n") >= 1
    monkeypatch.setattr(sys, "stdin", None)  # closed
    assert generate.main(["model", "--chat"]) == 0


def test_a_chat_goes_on_from_what_was_said(monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    original = Writer.encode_chat
    monkeypatch.setattr(Writer, "encode_chat", lambda self, m: seen.append([dict(x) for x in m]) or original(self, m))
    out = io.StringIO()
    run_chat(writer(chat=True, prompt="", num_tokens=2), io.StringIO("hi\n\nyou\n/reset\nagain\n/exit\nnever\n"), out)
    assert [[m["role"] for m in messages] for messages in seen] == [["user"], ["user", "assistant", "user"], ["user"]]
    assert seen[1][2]["content"] == "you" and seen[2][0]["content"] == "again"
    assert out.getvalue().startswith(seen[1][1]["content"] + "\n")


def test_the_template_is_applied_and_a_plain_one_without(monkeypatch: pytest.MonkeyPatch):
    messages = [{"role": "user", "content": "hi"}]
    assert bytes(writer().encode_chat(messages)[1:]).decode() == "<user>hi\n<assistant>"
    assert writer().encode_chat(messages)[0] == 256
    plain = replace(writer(), chat_template=None).encode_chat(messages)
    assert bytes(plain[1:]).decode() == "<|user|>\nhi\n<|assistant|>\n"


def test_a_chat_that_outgrows_the_context_says_so_and_goes_on(capsys: pytest.CaptureFixture[str]):
    run_chat(writer(chat=True, prompt="", num_tokens=2), io.StringIO("x" * 60 + "\nhi\n"), io.StringIO())
    assert "too many" in capsys.readouterr().err


def test_a_turn_reads_what_is_new_in_it_and_says_the_same(monkeypatch: pytest.MonkeyPatch):
    memories: list[Any] = []
    original = Writer.texts

    def watched(self: Writer, prompts: Any, on_text: Any, memory: Any) -> Any:
        memories.append((memory, len(memory.ids)))
        got = original(self, prompts, on_text, memory)
        assert [text.text for text in original(self, prompts)[0]] == [text.text for text in got[0]]
        return got

    monkeypatch.setattr(Writer, "texts", watched)
    run_chat(writer(chat=True, prompt="", num_tokens=3), io.StringIO("hi\nyou\n"), io.StringIO())
    assert memories[0][0] is memories[1][0] and memories[0][1] == 0 and memories[1][1] > len("<user>hi")


# ----------------------------------------------------------------------------------------------- files

PROMPTS = ["one", "a longer prompt", "two", "", "é日"]


def file_writer(folder: Path, **options: Any) -> tuple[Writer, list[dict[str, Any]]]:
    path = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt, "id": n}) for n, prompt in enumerate(PROMPTS)]
    path.write_text("\n".join([*lines, json.dumps({"messages": [{"role": "user", "content": "hi"}]})]) + "\n\n")
    made = writer(file=str(path), out=str(folder / "out.jsonl"), **{"batch_size": 4, **options})
    return made, read_requests(path)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_a_file_gives_each_prompt_the_text_that_it_has_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made, requests = file_writer(tmp_path, logprobs=True, seed=2)
    run_file(made, requests, "model")
    found = results(tmp_path)
    assert [row["index"] for row in found] == list(range(6)) and [row.get("id") for row in found] == [0, 1, 2, 3, 4, None]
    for row, prompt in zip(found, PROMPTS, strict=False):
        alone = writer(seed=2).texts([made.encode(prompt)])[0][0]
        assert row["samples"][0]["text"] == alone.text and row["samples"][0]["ids"] == alone.ids
        np.testing.assert_allclose(row["samples"][0]["logprobs"], alone.logps, atol=1e-4)
    assert "6/6 prompts" in capsys.readouterr().err and not (tmp_path / "out.jsonl.partial").exists()


def test_an_interrupted_file_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, requests = file_writer(tmp_path)
    run_file(made, requests, "model")
    whole = results(tmp_path)
    (tmp_path / "out.jsonl").unlink()
    calls: list[int] = []
    original = Writer.texts

    def breaks(self: Writer, prompts: Any, *args: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, prompts, *args)

    monkeypatch.setattr(Writer, "texts", breaks)
    with pytest.raises(KeyboardInterrupt):
        run_file(made, requests, "model")
    partial = tmp_path / "out.jsonl.partial"
    assert not (tmp_path / "out.jsonl").exists() and len(partial.read_text().splitlines()) == 5
    partial.write_text(partial.read_text() + '{"index": 1, "torn')
    run_file(made, requests, "model")
    assert results(tmp_path) == whole and calls == [4, 4, 4], "four of six were there already"
    for foreign in ('{"command": "other"}\n', "garbage\n", "[1]\n", "mine, without an end"):
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        partial.write_text(foreign)
        with pytest.raises(ConfigError, match="not the unfinished work of this command with these weights"):
            run_file(made, requests, "model")
        assert partial.read_text() == foreign


def test_keys_of_a_request_travel_along_and_do_not_change_its_place(tmp_path: Path):
    made, requests = file_writer(tmp_path)
    run_file(made, [{**request, "index": 0, "samples": 1, "id": n} for n, request in enumerate(requests)], "model")
    found = results(tmp_path)
    assert [(one["index"], one["id"]) for one in found] == [(n, n) for n in range(len(requests))]
    assert all(isinstance(one["samples"], list) for one in found)


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "line 2: it is not JSON"),
        ("[]", "line 2: it is .., not a JSON object"),
        ('{"prompt": 1}', "line 2: it has not one of"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "line 2: it has not one of"),
        ('{"messages": [{"role": "user"}]}', "line 2: it has not one of"),
        (r'{"prompt": "a\ud800"}', "line 2: it has half a surrogate pair"),
        (r'{"messages": [{"role": "user", "content": "\udfff"}]}', "line 2: it has half a surrogate pair"),
        ("[" * 100_000, "line 2: it is not JSON"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, says: str):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ConfigError, match=says):
        read_requests(tmp_path / "p.jsonl")


def test_a_file_with_a_prompt_too_long_generates_nothing(tmp_path: Path):
    made, requests = file_writer(tmp_path)
    with pytest.raises(ConfigError, match=r"prompts.jsonl: prompt 6 has 61 tokens, .*14 too many"):
        run_file(made, [*requests, {"prompt": "x" * 60}], "model")
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_is_no_text_or_empty_is_named(tmp_path: Path):
    for content, says in ((b"", "p.jsonl is empty"), (b"\n \n", "p.jsonl is empty"), (b'\n{"prompt": "\xff"}', "line 2 .byte 0xff is not")):
        (tmp_path / "p.jsonl").write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            read_requests(tmp_path / "p.jsonl")


def test_one_process_at_a_time_writes_an_out_and_says_who_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["model", "--file", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    made, _ = file_writer(tmp_path)
    monkeypatch.setattr(command, "_load", lambda checkpoint, config: made)
    monkeypatch.setattr(command.manifest, "fingerprint", lambda checkpoint: "model")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out.jsonl")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin and holder.stdout and holder.stdout.readline() == b"held\n"
    assert f"process {holder.pid} on " in (said := refused(*words)) and "is writing" in said and "out.jsonl" in said
    assert not (tmp_path / "out.jsonl.partial").exists()
    holder.kill()  # its lock file stays, and is no obstacle
    holder.wait()
    assert (tmp_path / ".out.jsonl.lock").exists()
    assert generate.main(words) == 0 and len(results(tmp_path)) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]
    (tmp_path / "out.jsonl").unlink()
    monkeypatch.setattr(command, "_load", lambda checkpoint, config: (tmp_path / "out.jsonl").touch())  # another one finished
    monkeypatch.setattr(command, "hold", lambda path: contextlib.nullcontext(path.touch()))
    assert "exists already" in refused(*words)


HOLD = """
import pathlib, sys
from jaxllm.generate.lock import hold
with hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_more_rows_than_prompts_are_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, requests = file_writer(tmp_path, batch_size=10**12)
    calls: list[int] = []
    text = Text("said", "stop", [], [], 0.0)
    monkeypatch.setattr(Writer, "texts", lambda self, prompts: calls.append(len(prompts)) or [[text]] * len(prompts))
    run_file(made, requests, "model")
    assert calls == [6] and len(results(tmp_path)) == 6


# ------------------------------------------------------------------------------------------------ flags


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        generate.main(list(words))
    return str(error.value)


def test_mistakes_are_refused_before_the_model_is_read(tmp_path: Path):
    assert "needs a checkpoint first" in refused("--prompt", "x")
    assert "nothing to continue" in refused("model")
    assert "--num_samples is 0" in refused("model", "--prompt", "x", "--num_samples", "0")
    assert "top_p 2" in refused("model", "--prompt", "x", "--top_p", "2")
    assert "did you mean '--temperature'" in refused("model", "--prompt", "x", "--temprature", "2")
    assert "needs --out" in refused("model", "--file", "p.jsonl")
    assert "--file does not use --prompt; leave out" in refused("model", "--file", "p", "--out", "o", "--prompt", "x")
    assert "cannot read" in refused("model", "--file", str(tmp_path / "no"), "--out", "o")
    (tmp_path / "p").write_text('{"prompt": "x"}\n')
    assert "exists already" in refused("model", "--file", str(tmp_path / "p"), "--out", str(tmp_path / "p"))
    assert "no folder" in refused("model", "--file", str(tmp_path / "p"), "--out", str(tmp_path / "a" / "o"))


@pytest.mark.parametrize(
    "words, says",
    [
        ("--prompt x --out o", "--prompt does not use --out"),
        ("--prompt x --batch_size 3", "--prompt does not use --batch_size"),
        ("--prompt x --logprobs", "--prompt does not use --logprobs"),
        ("--prompt x --system y", "--prompt does not use --system"),
        ("--chat --num_samples 2", "--chat does not use --num_samples"),
        ("--chat --out o", "--chat does not use --out"),
        ("--file f --out o --system y", "--file does not use --system"),
        ("--file f --out o --chat", "--file does not use --chat"),
        ("--prompt x --num_beams 4 --temperature 0.5", "--num_beams does not use --temperature"),
        ("--prompt x --num_beams 4 --seed 5", "--num_beams does not use --seed"),
        ("--file f --out o --num_beams 4 --logprobs", "--num_beams does not use --logprobs"),
        ("--prompt x --length_penalty 0.6", "--num_beams 1 does not use --length_penalty"),
        ("--prompt x --temperature 0 --top_k 5", "--temperature 0 does not use --top_k"),
        ("--prompt x --temperature 0 --num_samples 2", "--temperature 0 does not use --num_samples"),
        ("--prompt x --temperature nan", "--temperature is nan; it must be finite"),
        ("--prompt x --length_penalty inf --num_beams 2", "--length_penalty is inf; it must be finite"),
        ("--prompt x --seed -1", "--seed is -1; it must be from 0"),
        ("--prompt \udcff", "--prompt has byte 0xff at character 0, which is not UTF-8"),
        ("--prompt x --stop a\udcfe", "--stop has byte 0xfe at character 1"),
        ("--chat --system \ud800", r"--system has half a surrogate pair (\ud800) at character 0"),
    ],
)
def test_a_flag_that_changes_nothing_or_is_no_text_is_refused_by_name(words: str, says: str):
    assert says in refused("model", *words.split())


def test_an_empty_stop_is_refused():
    assert "--stop has an empty text" in refused("model", "--prompt", "x", "--stop", "")


def test_what_is_said_of_a_damaged_checkpoint_is_no_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from jaxllm import pretrained as rooms

    monkeypatch.setattr(rooms, "load", lambda folder, **options: print("checkpoint 3 is damaged") or pretrained())
    assert generate.main(["model", "--prompt", "hi", "--num_tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("hi") and "damaged" not in out and "checkpoint 3 is damaged" in err


def test_the_command_loads_and_writes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from jaxllm import pretrained as rooms

    asked: dict[str, Any] = {}
    monkeypatch.setattr(rooms, "load", lambda folder, **options: asked.update(options, folder=folder) or pretrained())
    assert generate.main(["model", "--chat", "--prompt", "hi", "--num_tokens", "2", "--stop", "a b", "c", "--temperature", "0"]) == 0
    assert asked["folder"] == "model" and asked["precision"] == "float32" and asked["mesh"].size == 1
    assert capsys.readouterr().out.endswith("\n")


def test_without_words_it_explains_itself(capsys: pytest.CaptureFixture[str]):
    assert generate.main([]) == 2 and "usage: jaxllm generate" in capsys.readouterr().out
