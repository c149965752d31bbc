"""`motionmerge version`: what is installed."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

from motionmerge.cli.options import JsonOption
from motionmerge.cli.printing import print_json

EXAMPLE = "Example: motionmerge version --json"

_LIBRARIES = ("motionmerge", "torch", "diffusers", "transformers", "numpy", "av")


def version(
    as_json: JsonOption = False,
) -> None:
    """Print the versions of motionmerge and of what its results depend on."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version_of(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    if as_json:
        print_json(found)
    else:
        for library, number in found.items():
            print(f"{library:13}{number}")
