"""Tests of the node pack with a real ComfyUI: run by hand, see docs/how-to/comfyui.md.

MOTIONMERGE_COMFYUI names a checkout; without it nothing here is collected, as ComfyUI is in no
package registry.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("MOTIONMERGE_COMFYUI")
collect_ignore_glob = [] if CHECKOUT else ["test_*.py"]


def pytest_report_header() -> str:
    if not CHECKOUT:
        return "ComfyUI: none (MOTIONMERGE_COMFYUI)"
    version = {}
    exec((Path(CHECKOUT) / "comfyui_version.py").read_text(encoding="utf-8"), version)
    command = ["git", "-C", CHECKOUT, "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"ComfyUI: {version['__version__']}, commit {commit or 'unknown'}"


if CHECKOUT:
    sys.path.insert(0, CHECKOUT)
    words, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # reads the arguments

    sys.argv = words


@pytest.fixture(autouse=True)
def as_comfyui_runs_nodes():
    import torch

    with torch.inference_mode():
        yield
