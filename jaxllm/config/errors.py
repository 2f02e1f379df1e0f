"""What a user is told: one error class, and the nearest value that would have worked."""

from __future__ import annotations

import difflib
import functools
import typing
from collections.abc import Iterable
from typing import Any, Literal


class ConfigError(ValueError):
    """A user's value that cannot work. The message says what was given, what is allowed, and the fix."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest allowed spelling, or an empty string.

    >>> nearest('swigul', ['swiglu', 'gelu'])
    "; did you mean 'swiglu'?"
    """
    match = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def nearest_divisors(number: int, divisor: int) -> str:
    """The multiples of `divisor` on either side of `number`, for an error message.

    >>> nearest_divisors(10, 4)
    '8 or 12'
    """
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def check_choices(config: Any, where: str) -> None:
    """Refuse a value that a field's Literal does not list: a config file is not type-checked."""
    for name, choices in _choices(config.__class__).items():
        value = getattr(config, name)
        if value not in choices:
            near = nearest(str(value), map(str, choices))
            raise ConfigError(f"{where}.{name} is {value!r}; choose one of {', '.join(map(str, choices))}{near}")


@functools.cache
def _choices(cls: Any) -> dict[str, tuple[Any, ...]]:
    """What each field with a Literal type may be; looked up once for a class, because hints are text until they are resolved."""
    hints = typing.get_type_hints(cls).items()
    return {name: typing.get_args(hint) for name, hint in hints if typing.get_origin(hint) is Literal}
