"""The node pack of `comfyui/`, imported as ComfyUI imports it: a folder by its path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PACK = Path(__file__).parents[2] / "comfyui"
NAME = "motionmerge_nodes"


def load_pack() -> ModuleType:
    """Return the pack; `comfy` and `comfy_api` must be there, or doubles of them."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[NAME]
