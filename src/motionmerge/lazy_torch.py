"""torch, imported when something of it is used: bf16, fp16 and fp32 files are merged without it.

    from motionmerge.lazy_torch import torch

Importing torch takes longer than merging two models of 3 GB.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from motionmerge.packages import missing_package

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(sys.modules.get("torch") or load(), name)

    torch = _Torch()


def is_imported() -> bool:
    """Return whether torch has been imported, by whomever."""
    return "torch" in sys.modules


def is_installed() -> bool:
    """Return whether torch can be imported; it is not."""
    return is_imported() or find_spec("torch") is not None


def load() -> Any:
    """Import torch now.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return import_module("torch")
    except ImportError as error:
        raise missing_package(error) or error from error
