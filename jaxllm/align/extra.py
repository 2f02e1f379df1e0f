"""Packages of the extra `align`, imported when they are first needed: what does not need them runs without."""

from __future__ import annotations

import importlib
from typing import Any

from jaxllm.config import ConfigError


def require(module: str, what_for: str) -> Any:
    """The module of that dotted name.

    Raises:
      ConfigError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ConfigError(f"{what_for} needs the package {package}, which is not installed: pip install .[align]") from None
