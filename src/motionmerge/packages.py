"""Which extra installs a package, and the error where one is missing.

pip install motionmerge             merge, show, compare and export bf16, fp16 and fp32 files
pip install 'motionmerge[videos]'   videos, LoRAs, fp8, and all else that needs torch
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from motionmerge.errors import ConfigError

_EXTRAS = {
    "videos": (
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "peft",
        "av",
        "PIL",
        "ftfy",
    ),
    "eval": ("cv2", "scipy", "matplotlib", "jinja2"),
    "study": ("evalica", "pandas"),
    "studio": ("gradio", "fastapi", "uvicorn", "starlette"),
    "tune": ("optuna",),
    "ray": ("ray",),
    "adamw8bit": ("bitsandbytes",),
    "wandb": ("wandb",),
}
_PROJECTS = {"PIL": "pillow", "cv2": "opencv-python-headless"}
"""Names of packages on the index where they differ from those that are imported."""


def missing_package(error: ImportError) -> ConfigError | None:
    """Return the error that names the extra of a package which could not be imported.

    Args:
        error: What an import raised.

    Returns:
        None if the module belongs to no extra, or is there and failed by itself.
    """
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError):
        return None
    for extra, packages in _EXTRAS.items():
        if package in packages:
            return ConfigError(
                f"This needs {_PROJECTS.get(package, package)}, which is not installed.",
                fix=f"Run `pip install 'motionmerge[{extra}]'`.",
            )
    return None


def public_name(package: str, homes: Mapping[str, str], name: str) -> Any:
    """Import a public name of a package on first use, for its `__getattr__`.

    Args:
        package: `__name__` of the package.
        homes: The module of each public name, below the package.
        name: What is asked for.

    Raises:
        AttributeError: The package has no such name.
        ConfigError: Its module needs a package that an extra installs.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    try:
        module = import_module(f"{package}.{homes[name]}")
    except ImportError as error:
        raise missing_package(error) or error from error
    return getattr(module, name)
