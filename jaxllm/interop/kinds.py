"""What a value of their config may be, and a reader that gives out no other.

A config.json is written by people and by programs of all ages: null, a text for a number, a size that no model has. Every
value is taken with the `Kind` that it must be of, here and nowhere else, so that no other gets any further.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxllm.config import ConfigError, nearest


class Kind(NamedTuple):
    """What a value of theirs may be."""

    words: str
    """As they follow "it must be"."""
    holds: Callable[[Any], bool]
    spellings: tuple[str, ...] = ()
    """Those of which an error names the nearest, as they stand in the file."""


def whole(least: int, most: int) -> Kind:
    """A whole number between two bounds; true and false are none."""
    return Kind(f"a whole number from {least:,} to {most:,}", lambda x: type(x) is int and least <= x <= most)


def real(words: str, holds: Callable[[float], bool]) -> Kind:
    """A number (JSON may write it as a whole one) of which `holds` is true; of NaN no comparison is."""
    return Kind(words, lambda x: type(x) in (int, float) and holds(x))


def or_null(kind: Kind) -> Kind:
    """`kind`, or null."""
    return Kind(f"{kind.words}, or null", lambda x: x is None or kind.holds(x), kind.spellings)


def list_of(kind: Kind) -> Kind:
    """A list of which each entry is of `kind`."""
    return Kind(f"a list in which each entry is {kind.words}", lambda x: isinstance(x, list) and all(map(kind.holds, x)))


def either(*kinds: Kind) -> Kind:
    """One of several kinds."""
    return Kind(", or ".join(kind.words for kind in kinds), lambda x: any(kind.holds(x) for kind in kinds))


SIZE = whole(1, 1 << 24)
"""Widths, vocabularies, contexts: the largest of published models are below it."""
DEPTH = whole(1, 10_000)
"""Layers, each of which costs us time whether its tensors are there or not."""
COUNT = whole(0, 1 << 24)
POSITIVE = real("a positive number", lambda x: 0 < x < 1e30)
FROM_ZERO = real("a number from 0", lambda x: 0 <= x < 1e30)
CHANCE = real("a number from 0 to below 1", lambda x: 0 <= x < 1)
SHARE = real("a number above 0, at most 1", lambda x: 0 < x <= 1)
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("a text", lambda x: isinstance(x, str))
OBJECT = Kind("an object", lambda x: isinstance(x, dict))
ANYTHING = Kind("anything", lambda x: True)
TOKEN_ID = whole(-1, 1 << 24)
"""-1 has meant that there is none."""


def one_of(values: Iterable[Any]) -> Kind:
    """One of these words, or true or false."""
    allowed = tuple(values)
    return Kind(f"one of {', '.join(map(said, allowed))}", lambda x: isinstance(x, str | bool) and x in allowed, tuple(map(said, allowed)))


def only(value: Any) -> Kind:
    """The one value that is covered, or null."""
    return Kind(f"{said(value)}, the only value that jaxllm covers", lambda x: x is None or x == value)


def said(value: Any) -> str:
    """A value as their file has it, or the beginning of it.

    >>> said(None), said([1] * 99)
    ('null', '[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,…')
    """
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 40 else f"{text[:39]}…"


@dataclass
class Reader:
    """Their config, and which of its keys have been taken. The order of takes does not matter."""

    values: Mapping[str, Any]
    within: str = ""
    """What stands before its keys where it is a part of the config: 'rope_scaling.'."""
    taken: set[str] = field(default_factory=set)

    def take(self, key: str, kind: Kind, *default: Any) -> Any:
        """`values[key]`, or the default where the key is absent (null is a value).

        Raises:
          ConfigError: the key is absent and has no default; the value is of another kind.
        """
        self.taken.add(key)
        return self.look(key, kind, *default)

    def look(self, key: str, kind: Kind, *default: Any) -> Any:
        """`take` without taking: the key stays surplus until an option takes it."""
        if key not in self.values:
            if not default:
                raise ConfigError(f"the Hugging Face config has no '{self.within}{key}'{nearest(key, self.values)}")
            return default[0]
        value = self.values[key]
        if not kind.holds(value):
            near = nearest(said(value), kind.spellings)
            raise ConfigError(f"'{self.within}{key}' of the Hugging Face config is {said(value)}; it must be {kind.words}{near}")
        return value

    def surplus(self, neutral: AbstractSet[str] = frozenset()) -> list[str]:
        """Keys with a value that nothing took and that are not neutral."""
        return [key for key, value in self.values.items() if key not in self.taken | neutral and value is not None]
