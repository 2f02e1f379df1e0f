"""Print the docstrings of the compiled modules of the running Python as JSON: [[module, text], …].

A script, run by `stdlib.py` in a bare interpreter (`python -I -S`), so that the text depends on the Python alone;
it imports the standard library only.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Importing these sets up a terminal, or they exist for CPython's own tests.
_LEFT_OUT = re.compile(r"readline|_?xx.*|_test.*|_ctypes_test")


def modules() -> Iterator[tuple[str, str]]:
    """(name, text) of each compiled module that this Python can import."""
    folders = [Path(path) for path in sys.path if path.endswith("lib-dynload")]
    found = {path.name.split(".")[0] for folder in folders for path in folder.glob("*") if path.suffix in (".so", ".pyd")}
    for name in sorted(found | set(sys.builtin_module_names)):
        if _LEFT_OUT.fullmatch(name):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # some are deprecated
                module = importlib.import_module(name)
        except ImportError:  # built without the C library that it wraps
            continue
        entries = [f"{name}\n\n{inspect.cleandoc(module.__doc__)}"] if module.__doc__ else []
        for attribute, value in sorted(vars(module).items()):
            entries += docstrings(f"{name}.{attribute}", value, name)
        if entries:
            yield name, "\n\n\n".join(entries) + "\n"


def docstrings(name: str, value: Any, module: str) -> Iterator[str]:
    """`name(signature)` and docstring of a compiled function or class, and of the class's own members."""
    is_class = isinstance(value, type) and value.__module__ in (module, module.lstrip("_"))
    is_member = inspect.isbuiltin(value) or inspect.ismethoddescriptor(value) or inspect.isdatadescriptor(value)
    text = getattr(value, "__doc__", None)
    if (is_class or is_member) and isinstance(text, str) and text:
        signature = re.sub(r"\$module(, )?|\$", "", getattr(value, "__text_signature__", None) or "")
        yield f"{name}{signature}\n\n{inspect.cleandoc(text)}"
    if is_class:
        for attribute, member in sorted(vars(value).items()):
            if not attribute.startswith("__"):
                yield from docstrings(f"{name}.{attribute}", member, module)


if __name__ == "__main__":
    sys.stdout.buffer.write(json.dumps(list(modules())).encode())
