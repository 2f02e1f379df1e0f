"""Where documents come from: every source is a sequence, so that any document can be read alone.

`open_source(config, cache)` gives `len(source)`, `source[i] -> Document`, and `source.fingerprint`, a hash of the
content. What cannot be indexed (a Hugging Face stream) is in `stream.py`.
"""

from __future__ import annotations

import glob
import importlib
import json
import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxllm.config import ConfigError, SourceConfig, nearest
from jaxllm.data import cache as caching
from jaxllm.files import how_to_get, is_remote, local_copies, path_of


@dataclass(frozen=True)
class Document:
    """One text; or a prompt and its completion; or a chat. `text` is the completion where there is a prompt."""

    text: str = ""
    prompt: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    split_key: str = ""
    """What decides whether the document is held out; empty means its content."""

    @property
    def content(self) -> str:
        """All of the document's text."""
        return self.prompt + self.text + "".join(message["content"] for message in self.messages)


class Source(Protocol):
    """A sequence of documents with the hash of their content."""

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def describe(self) -> dict[str, Any]:
        """What the run directory records about it."""
        ...


def open_source(config: SourceConfig, cache: Path, say: Callable[[str], None] = lambda line: None) -> Source:
    """The source that `config` names.

    Raises:
      ConfigError: a missing, empty, unreadable or binary file, an unknown data set, a field that is not there.
    """
    if config.loss_on == "completion" and not config.prompt_field:
        raise ConfigError(f"source '{config.path}' has loss_on 'completion' and no prompt_field; name the field that holds the prompt")
    if config.kind == "stdlib":
        if config.path:
            raise ConfigError(
                f"a source has the path '{config.path}' and kind 'stdlib', which is Python's own library and takes none; "
                "set its kind too, e.g. --data.sources.0.kind text"
            )
        from jaxllm.data.stdlib import Stdlib

        return Stdlib()
    if config.kind == "tfds":
        return Tfds(config, cache)
    if config.kind == "hf_stream":
        raise ConfigError("an hf_stream source cannot seek, so it must be the only source and cannot be held_out")
    paths = find_files(config, cache, say)
    if config.kind == "text":
        if (suffix := paths[0].suffix) in (".jsonl", ".parquet") and len(paths) == 1:
            raise ConfigError(f"{paths[0]} would be read as plain text; set its source's kind, e.g. --data.sources.0.kind {suffix[1:]}")
        return TextFiles(config, paths, cache)
    if config.kind == "jsonl":
        return JsonLines(config, paths, cache)
    return Parquet(config, paths, cache) if config.kind == "parquet" else ArrayRecords(config, paths, cache)


def find_files(config: SourceConfig, cache: Path, say: Callable[[str], None] = lambda line: None) -> list[Path]:
    """The files that `config.path` (a file, a folder or a glob) means, sorted; empty ones are named and left out.

    What is in an object store is copied into the cache.

    Raises:
      ConfigError: no path, nothing there, or nothing but empty files.
    """
    if not config.path:
        raise ConfigError(f"a {config.kind} source has no path; give a file, a folder or a glob in SourceConfig.path")
    path = Path(config.path) if is_remote(config.path) else path_of(config.path).expanduser()
    if is_remote(config.path):
        found = local_copies(config.path, cache, say)
    elif path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and not any(q.startswith(".") for q in p.relative_to(path).parts)]
    else:
        found = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    if not found:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = how_to_get(config.path) or nearest(path.name, siblings)
        raise ConfigError(f"data path '{config.path}' has no files{hint} (looked in {path.parent.absolute()})")
    full = [p for p in found if p.stat().st_size]
    if not full:
        raise ConfigError(f"data file {found[0]} is empty{f', and so are {len(found) - 1} more' if len(found) > 1 else ''}; put text in it")
    if len(full) < len(found):
        empty = [str(p) for p in found if not p.stat().st_size]
        say(f"data: {len(empty)} empty files left out: {', '.join(empty[:3])}{', …' if len(empty) > 3 else ''}")
    return full


# ------------------------------------------------------------------------------------------ records


def from_record(record: Mapping[str, Any], config: SourceConfig, where: Callable[[], str]) -> Document:
    """A record's fields as a Document. A dotted field goes into nested records.

    Args:
      where: says which record this is, for errors.

    Raises:
      ConfigError: a field that is missing or is neither text nor a chat.
    """
    value = _field(record, config.field, where)
    prompt = _text(_field(record, config.prompt_field, where), config.prompt_field, where) if config.prompt_field else ""
    if not isinstance(value, (list, tuple)):
        if config.loss_on == "assistant":
            raise ConfigError(
                f"{where()}: loss_on 'assistant' needs a chat in '{config.field}', a list of {{'role', 'content'}}; it is text"
            )
        return Document(text=_text(value, config.field, where), prompt=prompt)
    for turn, message in enumerate(value):
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise ConfigError(f"{where()}: turn {turn + 1} of the chat in '{config.field}' is not {{'role': text, 'content': text}}")
    if not value or prompt:
        raise ConfigError(f"{where()}: the chat in '{config.field}' {'cannot have a prompt_field beside it' if prompt else 'is empty'}")
    return Document(messages=tuple(dict(message) for message in value))


def _field(record: Mapping[str, Any], name: str, where: Callable[[], str]) -> Any:
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            fields = ", ".join(map(str, record)) or "none"
            raise ConfigError(
                f"{where()} has no field '{name}'{nearest(name, map(str, record))} (its fields: {fields}); set SourceConfig.field"
            )
        value = value[part]
    return value


def _text(value: Any, name: str, where: Callable[[], str]) -> str:
    try:
        text = value.decode() if isinstance(value, bytes) else value
        if isinstance(text, str):
            text.encode()  # a lone surrogate, which JSON can spell, is in no UTF-8 text
            return text
    except UnicodeError as error:
        raise ConfigError(f"{where()}: field '{name}' is not valid Unicode ({error}); repair it or leave the record out") from None
    raise ConfigError(f"{where()}: field '{name}' holds {type(value).__name__}, not text or a chat; choose another with SourceConfig.field")


# ------------------------------------------------------------------------------------------- files


class _Files:
    """What sources over files share."""

    def __init__(self, config: SourceConfig, paths: Sequence[Path], cache: Path) -> None:
        self.config, self.paths, self.name = config, list(paths), f"{config.kind}:{config.path}"
        self.fingerprint = caching.fingerprint(paths, cache, text=config.kind in ("text", "jsonl"))

    def describe(self) -> dict[str, Any]:
        """Path and content hash."""
        return {"path": self.config.path, "num_files": len(self.paths), "content_hash": self.fingerprint}


class TextFiles(_Files):
    """UTF-8 files, cut into lines, into paragraphs (runs of lines that are not blank), or not at all."""

    def __init__(self, config: SourceConfig, paths: Sequence[Path], cache: Path) -> None:
        super().__init__(config, paths, cache)
        self._spans = _Spans(self.paths, self.fingerprint, config.document, cache)
        if not len(self._spans):
            raise ConfigError(f"data path '{config.path}' holds nothing but blank lines; put text in it")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Document:
        text = self._spans.read(index).decode()
        return Document(text=text if self.config.document == "file" else text.rstrip("\r\n"))


class JsonLines(_Files):
    """One JSON object a line, read by byte offset."""

    def __init__(self, config: SourceConfig, paths: Sequence[Path], cache: Path) -> None:
        super().__init__(config, paths, cache)
        self._spans = _Spans(self.paths, self.fingerprint, "line", cache)
        if not len(self._spans):
            raise ConfigError(f"data path '{config.path}' holds nothing but blank lines; put JSON objects in it, one a line")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Document:
        where = lambda: self._spans.location(index)
        try:
            record = json.loads(self._spans.read(index))
        except ValueError as error:
            raise ConfigError(f"{where()} is not JSON ({error}); repair the line or remove it") from None
        if not isinstance(record, dict):
            raise ConfigError(f'{where()} is a JSON {type(record).__name__}, not an object; write {{"{self.config.field}": …}}')
        return from_record(record, self.config, where)


class _Spans:
    """Byte ranges of the documents in some files: an index [num, (file, start, end)], cached and memory-mapped."""

    def __init__(self, paths: Sequence[Path], fingerprint: str, unit: str, cache: Path) -> None:
        self.paths = paths
        if unit == "file":
            self._index = np.array([[i, 0, path.stat().st_size] for i, path in enumerate(paths)], np.int64)
            return
        target = cache / "index" / caching.key("v1", fingerprint, unit)
        built = caching.folder(target, lambda to: np.save(to / "spans.npy", _index(paths, paragraphs=unit == "paragraph")))
        self._index = np.load(built / "spans.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> bytes:
        file, start, end = map(int, self._index[index])
        with self.paths[file].open("rb") as stream:
            stream.seek(start)
            return stream.read(end - start)

    def location(self, index: int) -> str:
        """`FILE line N`."""
        file, start, _ = map(int, self._index[index])
        with self.paths[file].open("rb") as stream:
            return f"{self.paths[file]} line {1 + stream.read(start).count(b'\n')}"


def _index(paths: Sequence[Path], *, paragraphs: bool) -> np.ndarray:
    """(file, start, end) of every line, or every paragraph, that is not blank."""
    spans = array("q")
    for number, path in enumerate(paths):
        with path.open("rb") as file:
            start, end, offset = -1, 0, 0
            for line in file:
                if line.isspace():
                    if start >= 0:
                        spans.extend((number, start, end))
                        start = -1
                elif start < 0 or not paragraphs:
                    if start >= 0:
                        spans.extend((number, start, end))
                    start = offset
                offset += len(line)
                end = end if line.isspace() else offset
            if start >= 0:
                spans.extend((number, start, end))
    return np.frombuffer(spans, np.int64).reshape(-1, 3) if spans else np.zeros((0, 3), np.int64)


class Parquet(_Files):
    """Rows of Parquet files; the row group of the last row read stays in memory."""

    def __init__(self, config: SourceConfig, paths: Sequence[Path], cache: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        super().__init__(config, paths, cache)
        groups: list[tuple[Any, int]] = []
        for path in self.paths:
            try:
                file = pyarrow.parquet.ParquetFile(path)
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise ConfigError(f"data file {path} is not Parquet ({error}); narrow the path or set the source's kind") from None
            names = file.schema_arrow.names
            for field in filter(None, (config.field, config.prompt_field)):
                if field not in names and field.split(".")[0] not in names:
                    raise ConfigError(
                        f"data file {path} has no column '{field}'{nearest(field, names)} "
                        f"(its columns: {', '.join(names)}); set SourceConfig.field"
                    )
            groups += [(file, group) for group in range(file.num_row_groups)]
        self._groups = groups
        self.ends = np.cumsum([file.metadata.row_group(group).num_rows for file, group in groups], dtype=np.int64)
        """[num_groups] one past the last row of each row group."""
        self._columns = sorted({name.split(".")[0] if name not in names else name for name in (config.field, config.prompt_field) if name})
        self._loaded: tuple[int, list[dict[str, Any]]] = (-1, [])
        if not len(self):
            raise ConfigError(f"data path '{config.path}' has no rows; put some in it")

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Document:
        number = int(np.searchsorted(self.ends, index, side="right"))
        if self._loaded[0] != number:
            file, group = self._groups[number]
            self._loaded = (number, file.read_row_group(group, columns=self._columns).to_pylist())
        start = int(self.ends[number - 1]) if number else 0
        return from_record(self._loaded[1][index - start], self.config, lambda: f"row {index} of {self.config.path}")


class ArrayRecords(_Files):
    """Records of array-record files: JSON objects if the first one is an object that has the field, else UTF-8 text."""

    def __init__(self, config: SourceConfig, paths: Sequence[Path], cache: Path) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        super().__init__(config, paths, cache)
        try:
            self._records = ArrayRecordDataSource([str(path) for path in self.paths])
            self._length = len(self._records)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"'{config.path}' is not array-record ({error}); narrow the path or set the source's kind") from None
        if not self._length:
            raise ConfigError(f"data path '{config.path}' has no records; put some in it")
        try:
            first = json.loads(self._records[0])
            self._json = isinstance(first, dict) and config.field.split(".")[0] in first
        except ValueError:
            self._json = False

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Document:
        where = lambda: f"record {index} of {self.config.path}"
        value = self._records[index]
        if not self._json:
            return from_record({self.config.field: value}, self.config, where)
        try:
            return from_record(json.loads(value), self.config, where)
        except ValueError as error:
            raise (
                error if isinstance(error, ConfigError) else ConfigError(f"{where()} is not JSON ({error}); the first record is")
            ) from None


class Tfds:
    """A TensorFlow Datasets data set by random access, `name[/config]:split@data_dir`; needs no TensorFlow."""

    def __init__(self, config: SourceConfig, cache: Path) -> None:
        match = re.fullmatch(r"(?P<name>[^:@]+):(?P<split>[^@]+)(@(?P<folder>.+))?", config.path)
        if match is None:
            raise ConfigError(f"tfds path '{config.path}' is not name[/config]:split@data_dir, e.g. 'lm1b:train@/data/tfds'")
        try:
            tfds: Any = importlib.import_module("tensorflow_datasets")
        except ImportError as error:
            raise ConfigError(f"a tfds source needs TensorFlow Datasets ({error}); pip install 'jaxllm[tfds]'") from None
        self.config, self.name = config, f"tfds:{config.path}"
        folder = os.path.expanduser(match["folder"]) if match["folder"] else None
        try:
            builder = tfds.builder(match["name"], data_dir=folder, file_format="array_record")
        except tfds.core.DatasetNotFoundError:
            known = tfds.list_builders(with_community_datasets=False)
            raise ConfigError(
                f"no data set '{match['name']}' in TensorFlow Datasets{nearest(match['name'], known)}; "
                "give its data_dir, or import its builder"
            ) from None
        if not builder.is_prepared():
            raise ConfigError(
                f"data set '{match['name']}' is not prepared as array_record in {builder.data_path}; "
                f"run tfds.builder('{match['name']}', file_format='array_record', data_dir=…).download_and_prepare() first"
            )
        try:
            self._records = builder.as_data_source(split=match["split"])
        except (ValueError, KeyError):
            raise ConfigError(
                f"data set '{match['name']}' has no split '{match['split']}'{nearest(match['split'], builder.info.splits)} "
                f"(its splits: {', '.join(builder.info.splits)})"
            ) from None
        files = sorted(Path(builder.data_path).glob("*.array_record*"))
        self.fingerprint = caching.key(caching.fingerprint(files, cache, text=False), builder.info.full_name, match["split"])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        return from_record(self._records[index], self.config, lambda: f"record {index} of {self.config.path}")

    def describe(self) -> dict[str, Any]:
        """Name and content hash."""
        return {"path": self.config.path, "content_hash": self.fingerprint}
