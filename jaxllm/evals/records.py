"""Text and JSON-lines files that people wrote: what is wrong with one is said with its name and its line.

questions = parse(path, lambda record: (field(record, "question", str), field(record, "answer", int)))
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.config import ConfigError, nearest

_BLOCK_BYTES = 1 << 16
_WORDS: dict[Any, str] = {str: "a text", int: "a whole number", dict: "an object", list: "a list"}


def read(path: Path) -> str:
    """The text of a file, gzipped or not.

    Raises:
      ConfigError: no such file; one that is damaged, or not text (with the line).
    """
    data = bytearray()
    try:
        with open(path, "rb") as plain:
            zipped = plain.peek(2)[:2] == b"\x1f\x8b"  # a pipe cannot go back
            with gzip.GzipFile(fileobj=plain) if zipped else plain as file:
                while block := file.read(_BLOCK_BYTES):
                    data += block
        return data.decode()
    except UnicodeDecodeError as error:
        where, why = f", line {data.count(b'\n', 0, error.start) + 1}", f"byte 0x{data[error.start]:02x} is not UTF-8"
    except (OSError, EOFError, zlib.error) as error:
        where, why = f" after line {data.count(b'\n')}" if data else "", getattr(error, "strerror", None) or str(error)
    raise ConfigError(f"cannot read {path}{where} ({why}); give a text or JSON-lines file, gzipped or not")


def numbered(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of the lines that are not blank.

    Raises:
      ConfigError: as `read`, and where there is none.
    """
    found = False
    for number, line in enumerate(read(path).removeprefix("\ufeff").split("\n"), start=1):
        if line.strip():
            found = True
            yield number, line
    if not found:
        raise ConfigError(f"{path} is empty; give a file with a line at least")


def parse[T](path: Path, make: Callable[[dict[str, Any]], T]) -> list[T]:
    """What `make` makes of each object of a JSON-lines file.

    Raises:
      ConfigError: as `numbered`; a line that is no object, or of which `make` says what is wrong.
    """
    return [at(path, number, line, lambda line: make(record(line))) for number, line in numbered(path)]


def at[T](path: Path, number: int, line: str, make: Callable[[str], T]) -> T:
    """`make(line)`, whose errors get the file and the line."""
    try:
        return make(line)
    except ConfigError as error:
        raise ConfigError(f"{path}, line {number}: {error}") from None


def record(line: str) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
      ConfigError: there is none, or it holds half of a surrogate pair, which no tokenizer reads.
    """
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ConfigError("it has half a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"it is {shown(value)}, not a JSON object; give one object a line")
    return value


def field(values: Mapping[str, Any], name: str, kind: type) -> Any:
    """`values[name]`, which must be there and of this type.

    Raises:
      ConfigError: it is not.
    """
    if name not in values:
        raise ConfigError(f"it has no field '{name}'{nearest(name, values)}; it has {', '.join(values) or 'none'}")
    value = values[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"'{name}' is {shown(value)}; it must be {_WORDS[kind]}")
    return value


def shown(value: Any) -> str:
    """A value as JSON, or the beginning of it."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def tolerate[S](stream: S, errors: str) -> S:
    """A standard stream that turns what it cannot encode or decode into something else, as `errors` says, instead of failing."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=errors)
    return stream


def encodable(text: str, what: str) -> str:
    """`text`, if it is one: a terminal's bytes that are not UTF-8 come as halves of surrogate pairs.

    Raises:
      ConfigError: it is not, with the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        found = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a surrogate pair (\\u{code:04x})"
        raise ConfigError(f"{what} has {found} at character {error.start}, which is not UTF-8 text; write it in UTF-8") from None
    return text
