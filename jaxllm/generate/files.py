"""A file of prompts in batches: read, continued, kept through an interruption, written whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import ConfigError
from jaxllm.evals import records
from jaxllm.files import write_atomic
from jaxllm.generate.writer import Text, Writer


def read_requests(path: Path) -> list[dict[str, Any]]:
    """The prompts of a JSONL file.

    Raises:
      ConfigError: no such file, or a line that is not a prompt (says which).
    """
    return records.parse(path, _request)


def _request(values: dict[str, Any]) -> dict[str, Any]:
    asked = [key for key in ("prompt", "messages") if key in values]
    if len(asked) != 1 or not (isinstance(values.get("prompt"), str) or _is_chat(values.get("messages"))):
        raise ConfigError('it has not one of "prompt", a text, and "messages", a list of {"role", "content"}; give one of them')
    return values


def _is_chat(messages: Any) -> bool:
    """Whether these are messages with a role and a content each, at least one."""
    return (
        isinstance(messages, list) and bool(messages)
        and all(isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str) for one in messages)
    )  # fmt: skip


def run_file(writer: Writer, requests: Sequence[Mapping[str, Any]], checkpoint: str) -> None:
    """Continue every request in batches of like length; finished ones are kept in OUT.partial until OUT is whole.

    Args:
      checkpoint: `manifest.fingerprint` of the weights.

    Raises:
      ConfigError: a prompt that fills the context (before anything is generated), or an unfinished file of another command.
    """
    config = writer.config
    prompts = [writer.encode(r["prompt"]) if "prompt" in r else writer.encode_chat(r["messages"]) for r in requests]
    num_rows = min(config.batch_size, len(prompts))
    try:
        writer.check(prompts, num_rows)
    except ConfigError as error:
        raise ConfigError(f"{config.file}: {error}") from None
    partial = Path(f"{config.out}.partial")
    command = [dataclasses.asdict(config), checkpoint, list(writer.stop_ids), prompts]
    wanted = hashlib.sha256(json.dumps(command).encode()).hexdigest()
    done = _resume(partial, wanted, len(prompts))
    left = sorted((n for n in range(len(prompts)) if n not in done), key=lambda n: len(prompts[n]))
    bar = Progress(len(prompts), len(done))
    with open(partial, "a") as file:
        if not done:
            file.truncate(0)
            file.write(json.dumps({"command": wanted}) + "\n")
        for start in range(0, len(left), num_rows):
            batch = left[start : start + num_rows]
            filled = [prompts[n] for n in batch] + [prompts[batch[-1]]] * (num_rows - len(batch))  # one shape for all
            for number, texts in zip(batch, writer.texts(filled), strict=False):
                done[number] = _result(number, requests[number], texts, config.logprobs)
                file.write(json.dumps(done[number]) + "\n")
                bar.add(sum(len(text.ids) for text in texts))
            file.flush()
    write_atomic(Path(config.out), "".join(json.dumps(done[n]) + "\n" for n in range(len(prompts))).encode())
    partial.unlink()
    bar.end(config.out)


def _result(number: int, request: Mapping[str, Any], texts: Sequence[Text], logprobs: bool) -> dict[str, Any]:
    samples = []
    for text in texts:
        sample = {"text": text.text, "finish": text.finish, "num_tokens": len(text.ids), "logprob": text.logp}
        samples.append(sample | ({"ids": text.ids, "logprobs": text.logps} if logprobs else {}))
    return {**request, "index": number, "samples": samples}


def _resume(partial: Path, wanted: str, num_prompts: int) -> dict[int, dict[str, Any]]:
    """Results that an interrupted run of the same command left; a torn last line is cut off."""
    if not partial.exists():
        return {}
    whole, _, torn = partial.read_bytes().rpartition(b"\n")
    try:
        found = [json.loads(line) for line in whole.split(b"\n") if line]
        ours = bool(found or not torn) and all(record["command"] == wanted for record in found[:1])
        ours = ours and all(0 <= record["index"] < num_prompts for record in found[1:])
    except (ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise ConfigError(
            f"{partial} is not the unfinished work of this command with these weights and prompts; choose another --out, or delete it"
        )
    if torn:
        with open(partial, "r+b") as file:
            file.truncate(len(whole) + 1 if whole else 0)
    return {record["index"]: record for record in found[1:]}


def refuse_finished(out: Path) -> None:
    """Raise ConfigError where results are already, or have no folder to go to."""
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another --out, or delete it")
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent} for --out; make it first")


class Progress:
    """A bar on stderr: prompts done, tokens a second. Only its last line where stderr is no terminal."""

    def __init__(self, total: int, before: int) -> None:
        self._total, self._done, self._tokens, self._start = total, before, 0, time.perf_counter()

    def add(self, num_tokens: int) -> None:
        """One more prompt, continued by this many tokens."""
        self._done += 1
        self._tokens += num_tokens
        if sys.stderr.isatty():
            full = 30 * self._done // self._total
            print(f"\r[{'█' * full}{' ' * (30 - full)}] {self._line()}", end="", file=sys.stderr, flush=True)

    def end(self, out: str) -> None:
        """Say where the results are."""
        print(f"{chr(10) if sys.stderr.isatty() else ''}{self._line()}: {out}", file=sys.stderr, flush=True)

    def _line(self) -> str:
        return f"{self._done}/{self._total} prompts, {self._tokens / (time.perf_counter() - self._start):,.0f} tokens/s"
