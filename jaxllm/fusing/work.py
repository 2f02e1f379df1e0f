"""A fusion's folder: which shards are missing, processes that make them, and what they count together."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TextIO

from jaxllm.config import ConfigError, TrainConfig
from jaxllm.data import taught
from jaxllm.data.taught import Meta
from jaxllm.evals.display import Bar
from jaxllm.files import path_of, write_atomic
from jaxllm.fusing.shards import Fuser, Tally, tally_file
from jaxllm.fusing.values import FuseConfig, Job

FUSION, STATISTICS = "fusion.json", "statistics.json"
_COUNTED = ("won", "rows", "accepted", "named", "mapped", "nats", "tokens")


def fuse_taught(
    target: TrainConfig, out: str, sources: Sequence[tuple[str, TrainConfig]], config: FuseConfig, *, bar: TextIO | None = None
) -> dict[str, Any]:
    """Make the shards of `out` that are not there, or not as they were written; returns the statistics, which lie beside them.

    Args:
      target: the student's configuration, of which the data are used.
      sources: (folder that `jaxllm teach` wrote, the configuration that it was given) of each teacher: the same text in its tokens.
      bar: where the progress bar goes; None means standard error.

    Raises:
      ConfigError: stored predictions of another tokenizer than their configuration's (both fingerprints are named), or incomplete;
        documents that differ; a folder of another fusion, with what differs.
    """
    job = Job(target, out, tuple(sources), config)
    say = lambda line: print(line, file=sys.stderr, flush=True)
    fuser = Fuser(job, say)
    folder = path_of(out)
    _claim(folder, out, fuser)
    missing = [*_missing(folder, fuser, say)]
    num_tokens = sum(int(corpus.meta["num_tokens"]) for corpus in fuser.corpora)
    progress = Bar(f"{out}: {num_tokens:,} tokens, {len(fuser.teachers)} teachers", len(missing), bar)
    try:
        for _ in _work(job, fuser, missing):
            progress.add(1)
    finally:
        progress.close()
    return _write_statistics(folder, fuser)


def _missing(folder: Path, fuser: Fuser, say: Callable[[str], None]) -> Iterator[tuple[int, int]]:
    """(corpus, shard) of what this command has to make."""
    for index, corpus in enumerate(fuser.corpora):
        for number in range(taught.num_shards(corpus))[taught.part_of(fuser.config.part)]:
            file = taught.shard_file(folder, corpus, number)
            problem = taught.problem_of(file, contents=True) or ("" if tally_file(file).exists() else "has lost its tally")
            if problem and file.exists():
                say(f"{file} {problem}: making it again")
            if problem:
                yield index, number


def _work(job: Job, fuser: Fuser, missing: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Makes each shard, here or in worker processes, and yields after each."""
    if not job.config.workers or len(missing) < 2:
        for one in missing:
            fuser.make(*one)
            yield
        return
    workers = min(job.config.workers, len(missing))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _in_worker)
    try:
        for done in as_completed([pool.submit(_make, job, *one) for one in missing]):
            done.result()
            yield
    finally:
        pool.shutdown(cancel_futures=True)


def _in_worker() -> None:
    """The command alone hears Ctrl-C; a worker ends when it is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _opened(job: Job) -> Fuser:
    return Fuser(job, lambda line: None)


def _make(job: Job, index: int, number: int) -> None:
    _opened(job).make(index, number)


# ------------------------------------------------------------------------------------- on disk


def _claim(folder: Path, out: str, fuser: Fuser) -> None:
    """Say what the folder is of, or refuse one that is of something else."""
    there = taught.read_meta(folder)
    if there is None:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{out} is not empty, and no fusion wrote it; choose another folder")
        taught.write_meta(folder, fuser.meta)
    elif there != fuser.meta:
        raise ConfigError(f"{out} holds other predictions: {_difference(folder, there, fuser)}; choose another folder, or remove it")
    write_atomic(folder / FUSION, json.dumps(fuser.description, indent=1).encode())


def _difference(folder: Path, there: Meta, fuser: Fuser) -> str:
    try:
        before = json.loads((folder / FUSION).read_text())
    except (OSError, ValueError):
        return f"of teacher {there.teacher} ({there.teacher_fingerprint}), not of this fusion ({fuser.meta.teacher_fingerprint})"
    if there.tokenizer_fingerprint != fuser.meta.tokenizer_fingerprint:
        return f"tokenizer was {there.tokenizer_fingerprint[:12]}, is {fuser.meta.tokenizer_fingerprint[:12]}"
    options = fuser.description["options"]
    lines = [
        f"{name} was {before['options'].get(name)}, is {value}" for name, value in options.items() if before["options"].get(name) != value
    ]
    fingerprints = [[one["teacher_fingerprint"] for one in sources] for sources in (before["sources"], fuser.description["sources"])]
    if fingerprints[0] != fingerprints[1]:
        lines.append(f"teachers were {', '.join(fingerprints[0])}, are {', '.join(fingerprints[1])}")
    return "; ".join(lines) or "the teachers' k, context or tokenizer"


def _write_statistics(folder: Path, fuser: Fuser) -> dict[str, Any]:
    """`statistics.json` over all shards that are there, by whichever part of the work ends last."""
    while True:
        files = sorted(folder.glob("*/*.tally"))
        tallies: dict[str, list[Tally]] = {"all": []}
        for file in files:
            tally = json.loads(file.read_text())
            index = next((i for i, corpus in enumerate(fuser.corpora) if corpus.folder.name == file.parent.name), None)
            if index is not None:
                tallies["all"].append(tally)
                tallies.setdefault(f"{index} {fuser.texts[index].name}", []).append(tally)
        out = {name: summary(some, [teacher.path for teacher in fuser.teachers]) for name, some in tallies.items()}
        write_atomic(folder / STATISTICS, json.dumps(out, indent=1).encode())
        if sorted(folder.glob("*/*.tally")) == files:
            return out


def summary(tallies: Sequence[Tally], names: Sequence[str]) -> dict[str, Any]:
    """Of some shards: documents, rows that predict something, and of each teacher

    share: of the documents that it won (its mean weight with avg_ce); rows: where it was used; accept_rate: of them that had a row of the
    teacher; mapped_mass: of the probability that these named, what has a target id; nats_per_token; bits_per_byte.
    """
    total = lambda key: sum(tally[key] for tally in tallies)
    documents, rows, num_bytes = total("documents"), total("rows"), total("bytes")
    ratio = lambda a, b: a / b if b else None
    sources = {}
    for j, name in enumerate(names):
        s: Mapping[str, float] = {key: sum(t["sources"][j][key] for t in tallies) for key in _COUNTED}
        sources[name] = {
            "share": ratio(s["won"], documents), "rows": s["rows"], "accept_rate": ratio(s["accepted"], s["rows"]),
            "mapped_mass": ratio(s["mapped"], s["named"]), "nats_per_token": ratio(s["nats"], s["tokens"]),
            "bits_per_byte": ratio(s["nats"] / math.log(2), num_bytes),
        }  # fmt: skip
    return {"documents": documents, "rows": rows, "sources": sources}
