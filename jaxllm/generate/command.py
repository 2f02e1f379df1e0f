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
from jaxllm.generate import proxy, trace
from jaxllm.generate.files import read_requests, refuse_finished, run_file
from jaxllm.generate.lock import hold
from jaxllm.generate.writer import GenerateConfig, Writer, prepare
from jaxllm.models.generate import Memory

USAGE = """usage: jaxllm generate CHECKPOINT --prompt TEXT | --chat | --file PROMPTS.jsonl --out RESULTS.jsonl [--FLAG VALUE …]
       jaxllm generate --base CHECKPOINT --expert TUNED --anti_expert UNTUNED --prompt TEXT | …

CHECKPOINT is a run directory or what tools.convert wrote; TUNED and UNTUNED are small ones that steer it (proxy-tuning).
PROMPTS.jsonl has one {"prompt": TEXT} or {"messages": [{"role", "content"}, …]} a line. In a chat, /reset begins anew and /exit ends.
`jaxllm generate CHECKPOINT --help` lists every flag with its type and value."""


def main(words: list[str]) -> int:
    """Run the command; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        if words:
            parse_flags(GenerateConfig(), ["--help"], "jaxllm generate CHECKPOINT")
        return 0 if words else 2
    checkpoint, rest = _checkpoint(words)
    config = parse_flags(GenerateConfig(), rest, f"jaxllm generate {checkpoint}")
    if not (config.prompt or config.chat or config.file):
        raise ConfigError("nothing to continue; give --prompt TEXT, --chat, or --file PROMPTS.jsonl --out RESULTS.jsonl")
    if config.trace and not (config.trace.endswith(".html") and Path(config.trace).absolute().parent.is_dir()):
        raise ConfigError(f"--trace is {config.trace}; give a page in a folder that is there, e.g. --trace trace.html")
    tolerate(sys.stdout, "backslashreplace")  # a terminal in ASCII, say
    if config.file:
        requests = read_requests(Path(config.file))
        refuse_finished(Path(config.out))
        with hold(Path(config.out)):
            refuse_finished(Path(config.out))  # another process may have finished since
            writer = _load(checkpoint, config)
            steering = [f"{name} {value}" for name, value in proxy.describe(config).items()]
            run_file(writer, requests, " ".join([manifest.fingerprint(checkpoint), *steering]))
            write_trace(writer)
    elif config.chat:
        said = tolerate(sys.stdin, "surrogateescape") or io.StringIO()  # None where it is closed
        run_chat(_load(checkpoint, config), said, sys.stdout)
    else:
        writer = _load(checkpoint, config)
        run_prompt(writer, sys.stdout)
        write_trace(writer)
    return 0


def _checkpoint(words: list[str]) -> tuple[str, list[str]]:
    """(the checkpoint, the flags): it comes first, or as --base."""
    named = [n for n, word in enumerate(words) if word == "--base" or word.startswith("--base=")]
    if not words[0].startswith("-") and not named:
        return words[0], words[1:]
    if len(named) > 1 or (named and not words[0].startswith("-")):
        raise ConfigError("--base names the checkpoint that comes first otherwise; give it once")
    at = named[0] if named else len(words)
    _, equals, value = words[at].partition("=") if named else ("", "", "")
    if named and not equals and at + 1 < len(words) and not words[at + 1].startswith("--"):
        return words[at + 1], words[:at] + words[at + 2 :]
    if not value:
        raise ConfigError("jaxllm generate needs a checkpoint first, e.g. jaxllm generate runs/quickstart-1a2b3c4d --prompt 'def '")
    return value, words[:at] + words[at + 1 :]


def write_trace(writer: Writer) -> None:
    """The page of --trace, of all that this process wrote; nothing where none is asked for."""
    config = writer.config
    if not config.trace or writer.trio is None:
        return
    traces = trace.trace(writer.trio, writer.params, writer.written, batch_rows=config.batch_size, mesh=writer.mesh)
    note = f"{config.expert} − {config.anti_expert}, α = {config.alpha:g}"
    trace.write_page(Path(config.trace), traces, writer.written, writer.tokenizer, "Proxy-tuning, token by token", note)
    print(f"{config.trace}: {trace.share_changed(traces):.1%} of greedy predictions changed", file=sys.stderr)


def _load(checkpoint: str, config: GenerateConfig) -> Writer:
    """The model, ready. What there is to say of its checkpoint is no part of the text, and goes to standard error."""
    from jaxllm import pretrained

    mesh = sharding.make_mesh(config.mesh)
    precision = config.precision if config.precision != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
    with contextlib.redirect_stdout(sys.stderr):
        model = pretrained.load(checkpoint, mesh=mesh, precision=precision)
        if config.expert:
            model = proxy.steered(model, config, checkpoint=checkpoint, max_length=config.max_length, mesh=mesh, precision=precision)
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
