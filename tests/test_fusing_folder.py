"""The folder of a fusion: kills, damage, parts, what is refused, and the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxllm.config import ConfigError
from jaxllm.data import batch as batches
from jaxllm.fusing import fuse_taught
from tests.fusions import HERE, NAMES, K, config_of, fused, place, records, sources
from tests.runs import ROOT
from tools import fuse as command

pytestmark = pytest.mark.whole  # whole commands: `make faults` runs them

__all__ = ["place"]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A fusion of three shards."""
    fuse_taught(config_of(place, "bytes"), str(place / "whole"), sources(place, "p400", "p520"), HERE)
    assert len([*(place / "whole").glob("*/*.bin")]) == 3
    return place / "whole"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "tally"])
def test_a_damaged_shard_is_made_again_alone(place: Path, whole: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    files = sorted(out.glob("*/*.bin"))
    data = bytearray(files[1].read_bytes())
    data[1000] ^= 4
    if damage == "gone":
        files[1].unlink()
    elif damage == "tally":
        files[1].with_suffix(".tally").unlink()
    else:
        files[1].write_bytes(data[:-7] if damage == "truncated" else data)
    before = {path: path.stat().st_mtime_ns for path in files if path != files[1]}
    found = fuse_taught(config_of(place, "bytes"), str(out), sources(place, "p400", "p520"), HERE)
    assert records(out) == records(whole) and found == json.loads((whole / "statistics.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in before}, "whole shards are left alone"


def test_parts_together_make_the_whole_and_a_student_waits_for_all(place: Path, whole: Path, tmp_path: Path) -> None:
    out, target = str(tmp_path / "out"), config_of(place, "bytes")
    fuse_taught(target, out, sources(place, "p400", "p520"), replace(HERE, part="0/2"))
    with pytest.raises(ConfigError, match="lacks 1 of 2 shards"):
        batches.load(target.data, seed=0, taught={"t": out})
    found = fuse_taught(target, out, sources(place, "p400", "p520"), replace(HERE, part="1/2"))
    assert records(tmp_path / "out") == records(whole) and found == json.loads((whole / "statistics.json").read_text())


def test_what_does_not_go_together_is_refused(place: Path, whole: Path, tmp_path: Path) -> None:
    target, pair = config_of(place, "bytes"), sources(place, "p400", "p520")
    ours, theirs = (batches.load(config_of(place, name).data, seed=0).tokenizer.fingerprint[:12] for name in ("p400", "p520"))
    (tmp_path / "code.txt").write_text((place / "code.txt").read_text() + "\n\none more\n")
    (tmp_path / "other.txt").write_text((place / "other.txt").read_text().replace("Übung 7:", "Übung 8:"))
    other = lambda i: replace(target, data=replace(target.data, sources=tuple(  # type: ignore[misc]
        replace(s, path=str(tmp_path / Path(s.path).name)) if n == i else s for n, s in enumerate(target.data.sources)
    )))  # fmt: skip
    one = replace(target, data=replace(target.data, sources=target.data.sources[:1]))
    run = lambda config=target, out=tmp_path / "out", given=pair, **options: fuse_taught(  # type: ignore[misc]
        config, str(out), given, replace(HERE, **options)
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    cases: list[tuple[Any, str]] = [
        (lambda: run(given=[(pair[0][0], pair[1][1])]), f"taught-p400 is of teacher .* with tokenizer {ours}.* in tokens of {theirs}"),
        (
            lambda: run(other(0)),
            r"made of other documents: source 0 has \d+ there and \d+ in the target, and they differ from document \d+",
        ),
        (lambda: run(other(1)), r"source 1 has 60 there and 60 in the target, and they differ from document 7 on .* 1 of 60 differ"),
        (lambda: run(one), "taught-p400 is of 2 sources and the target has 1"),
        (
            lambda: run(out=whole, k=4, how="hard"),
            "holds other predictions: k was 6, is 4; how was spans, is hard; vocab was first, is exact",
        ),
        (lambda: run(out=whole, given=pair[:1]), "teachers were .*, .*, are "),
        (lambda: run(config_of(place, "p400"), out=whole), "tokenizer was .*, is "),
        (lambda: run(out=place / "taught-p400"), "holds other predictions: of teacher made up 1 .fingerprint 1."),
        (lambda: run(out=tmp_path / "mine"), "mine is not empty, and no fusion wrote it"),
        (lambda: run(given=[]), "needs a teacher at least"),
        (lambda: run(part="2/2"), "--part is '2/2'"),
        (lambda: run(k=0), "--k is 0"),
        (lambda: run(how="span"), "'span'"),
        (lambda: command.act(["A", "B", "--source", "x"]), "--source takes two words"),
        (lambda: command.act(["A", "--k", "3"]), "1 words were given"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            raise AssertionError(f"not refused: {message}", call())


def test_a_document_too_long_for_the_dynamic_programme_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxllm.fusing.shards._MOST_CELLS", 10_000)
    with pytest.raises(ConfigError, match=r"document \d+ of text:.*code.txt has .* tokens.*cut the text finer"):
        fused(place, "bytes", "p400", config=replace(HERE, how="soft")).shard(0, 0)


def words_of(place: Path, folder: Path, out: Path) -> list[str]:
    """The command line of the fusion `whole`, with a file of configurations."""
    names = "\n".join(f"{name} = config_of(Path({str(place)!r}), {name!r})" for name in NAMES)
    (folder / "targets.py").write_text(f"from pathlib import Path\nfrom tests.fusions import config_of\n{names}\n")
    words = [f"{folder}/targets.py:bytes", str(out)]
    for name in ("p400", "p520"):
        words += ["--source", str(place / f"taught-{name}"), f"{folder}/targets.py:{name}"]
    return [*words, "--k", str(K)]


def test_the_command(place: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice: the second does nothing. In this process, and what it prints is the statistics."""
    words = [*words_of(place, tmp_path, tmp_path / "out"), "--workers", "0"]
    assert command.main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((whole / "statistics.json").read_text())["all"] and records(tmp_path / "out") == records(whole)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*")}
    assert command.main(words) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert command.main([*words, "--paper"]) == 2 and "how was spans, is soft" in capsys.readouterr().err


@pytest.mark.fault
def test_kill_9_loses_no_shard_and_leaves_no_worker(place: Path, whole: Path, tmp_path: Path) -> None:
    """Killed at the first mark; its workers end by themselves; the same command ends with the bytes of an unbroken one."""
    out = tmp_path / "out"
    line = [sys.executable, "-m", "tools.fuse", *words_of(place, tmp_path, out), "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAXLLM_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)
    deadline = time.monotonic() + 240
    while not [*out.glob("*/*.json")] and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, process.stderr and process.stderr.read()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    gone = lambda pid: not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    while not all(map(gone, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, children)), "a worker outlived its command"
    assert subprocess.run(line, env=environment, capture_output=True, timeout=300, cwd=ROOT).returncode == 0
    assert records(out) == records(whole)
