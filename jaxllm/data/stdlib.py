"""The running Python's standard library as a corpus: real text on every machine, with no download.

Sources outside tests, one document a file; docstrings of the modules that are compiled, one document a
module; and the language reference's topics. About 9 MB. Generated tables (codecs, configuration) are left out.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import platform
import re
import subprocess
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.config import ConfigError
from jaxllm.data.source import Document

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
_GENERATED = re.compile(
    "(?i)auto-?generated|generated from|(file|tables) (is|was|were|are) (automatically )?generated|configuration generated"
    "|Character Mapping Codec"
)


class Stdlib:
    """Documents in the order of their names. Every file is split off for evaluation as a whole."""

    name = "stdlib"

    def __init__(self) -> None:
        self._documents = [*_sources(), *_compiled_modules(), *_topics()]
        if sum(len(document.text) for document in self._documents) < 1_000_000:
            raise ConfigError(
                f"this Python ships without its sources ({sysconfig.get_path('stdlib')}); "
                "use text of your own: SourceConfig(kind='text', path=FOLDER)"
            )
        digest = hashlib.sha256()
        for document in self._documents:
            digest.update(document.text.encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        return self._documents[index]

    def describe(self) -> dict[str, Any]:
        """What the run directory records: another Python's library is another corpus."""
        return {"python": platform.python_version(), "text_sha256": self.fingerprint}


def _twin(name: str) -> str:
    """One name for a module and its other implementation, so that both land on one side of the split.

    >>> _twin('_pydecimal') == _twin('decimal') == _twin('_decimal')
    True
    """
    return re.sub(r"^_+(py)?", "", name)


def _sources() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _LEFT_OUT.intersection(parts) or parts[0] in ("config", "pydoc_data") or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        with tokenize.open(path) as file:
            text = file.read()
        if text and not _GENERATED.search(text[:600]):
            yield Document(text=text, split_key="/".join([*parts[:-1], _twin(path.stem)]))


def _compiled_modules() -> Iterator[Document]:
    """In an interpreter of its own: this one may have imported or patched anything."""
    script = Path(__file__).with_name("docstrings.py")
    out = subprocess.run([sys.executable, "-I", "-S", str(script)], capture_output=True, text=True, encoding="utf-8")
    if out.returncode:
        raise ConfigError(
            f"the docstrings of this Python's compiled modules cannot be read: {(out.stderr.splitlines() or ['no message'])[-1]}"
        )
    for name, text in json.loads(out.stdout):
        yield Document(text=text, split_key=_twin(name))


def _topics() -> Iterator[Document]:
    if importlib.util.find_spec("pydoc_data") is None:  # some distributions leave it out
        return
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(text=text, split_key=f"topics/{name}")
