"""The command itself: its words, one prompt, a chat in the terminal."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax

from jaxllm import manifest, sharding
from jaxllm.config import ConfigError
from jaxllm.evals.records import encodable, tolerate
from jaxllm.flags import parse_flags
from jaxllm.generate.files import read_requests, refuse_finished, run_file
from jaxllm.generate.lock import hold
from jaxllm.generate.writer import GenerateConfig, Writer, prepare
from jaxllm.models.generate import Memory

USAGE = """usage: jaxllm generate CHECKPOINT --prompt TEXT | --chat | --file PROMPTS.jsonl --out RESULTS.jsonl [--FLAG VALUE …]

CHECKPOINT is a run directory or what tools.convert wrote. PROMPTS.jsonl has one {"prompt": TEXT} or {"messages": [{"role", "content"}, …]}
a line. In a chat, /reset begins anew and /exit ends. `jaxllm generate CHECKPOINT --help` lists every flag with its type and value."""


def main(words: list[str]) -> int:
    """Run the command; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        if words:
            parse_flags(GenerateConfig(), ["--help"], "jaxllm generate CHECKPOINT")
        return 0 if words else 2
    if words[0].startswith("-"):
        raise ConfigError("jaxllm generate needs a checkpoint first, e.g. jaxllm generate runs/quickstart-1a2b3c4d --prompt 'def '")
    config = parse_flags(GenerateConfig(), words[1:], f"jaxllm generate {words[0]}")
    if not (config.prompt or config.chat or config.file):
        raise ConfigError("nothing to continue; give --prompt TEXT, --chat, or --file PROMPTS.jsonl --out RESULTS.jsonl")
    tolerate(sys.stdout, "backslashreplace")  # a terminal in ASCII, say
    if config.file:
        requests = read_requests(Path(config.file))
        refuse_finished(Path(config.out))
        with hold(Path(config.out)):
            refuse_finished(Path(config.out))  # another process may have finished since
            run_file(_load(words[0], config), requests, manifest.fingerprint(words[0]))
    elif config.chat:
        said = tolerate(sys.stdin, "surrogateescape") or io.StringIO()  # None where it is closed
        run_chat(_load(words[0], config), said, sys.stdout)
    else:
        run_prompt(_load(words[0], config), sys.stdout)
    return 0


def _load(checkpoint: str, config: GenerateConfig) -> Writer:
    """The model, ready. What there is to say of its checkpoint is no part of the text, and goes to standard error."""
    from jaxllm import pretrained

    mesh = sharding.make_mesh(config.mesh)
    precision = config.precision if config.precision != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
    with contextlib.redirect_stdout(sys.stderr):
        model = pretrained.load(checkpoint, mesh=mesh, precision=precision)
    return prepare(model, config, mesh, precision)


def run_prompt(writer: Writer, out: TextIO) -> None:
    """Continue --prompt: streamed when there is one continuation, else one after the other."""
    config = writer.config
    ids = writer.encode(config.prompt)
    writer.check([ids])
    if config.num_samples == 1:
        out.write(config.prompt)
        writer.texts([ids], lambda row, text: _say(out, text))
        _say(out, "\n")
        return
    for number, text in enumerate(writer.texts([ids])[0]):
        _say(out, f"--- sample {number}, log-probability {text.logp:.2f}\n{config.prompt}{text.text}\n")


def run_chat(writer: Writer, words: TextIO, out: TextIO) -> None:
    """Turn by turn until the input ends; with --prompt, that one turn. A turn computes what is new in it alone."""
    opening = [{"role": "system", "content": writer.config.system}] if writer.config.system else []
    messages, memory = list(opening), Memory()
    for said in [writer.config.prompt] if writer.config.prompt else _turns(words):
        if said == "/reset":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": said})
        try:
            encodable(said, "what you wrote")
            ids = writer.encode_chat(messages)
            answer = writer.texts([ids], lambda row, text: _say(out, text) if row == 0 else None, memory)[0][0]
        except ConfigError as error:
            if writer.config.prompt:
                raise
            print(f"jaxllm: {error}; /reset begins anew", file=sys.stderr)
            messages.pop()
            continue
        _say(out, "\n")
        messages.append({"role": "assistant", "content": answer.text})


def _turns(words: TextIO) -> Iterator[str]:
    while True:
        if words.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = words.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()


def _say(out: TextIO, text: str) -> None:
    out.write(text)
    out.flush()
