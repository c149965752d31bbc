"""torch, imported when something of it is used: bf16 and fp32 files are merged without it.

    from motionmerge.lazy_torch import torch

Importing torch takes longer than merging two models of 3 GB.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(sys.modules.get("torch") or import_module("torch"), name)

    torch = _Torch()


def is_imported() -> bool:
    """Tell whether torch has been imported, by whomever."""
    return "torch" in sys.modules


def load() -> None:
    """Import it now."""
    import_module("torch")
