"""The command line: one file per verb, imported without torch so that `--help` is quick.

Bad input ends with the error's message and its `Fix:` line on stderr, and exit code 2; see
`faults.py` for all other ends.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import os
import sys
from typing import Annotated

import typer

from motionmerge.cli.faults import Verbs
from motionmerge.cli.help import Verb
from motionmerge.cli.options import VersionOption

VERBS = {
    "generate": "Videos",
    "batch": "Videos",
    "demo": "Videos",
    "studio": "Videos",
    "recipes": "Weights",
    "merge": "Weights",
    "extrapolate": "Weights",
    "show": "Weights",
    "compare": "Weights",
    "export": "Weights",
    "convert": "Weights",
    "measure": "Measuring",
    "report": "Measuring",
    "evaluate": "Measuring",
    "sweep": "Measuring",
    "compare-knobs": "Measuring",
    "tune": "Measuring",
    "probe": "Measuring",
    "study": "Measuring",
    "data": "Training",
    "train": "Training",
    "version": "Installation",
}
"""In the order of `--help`, and the panel that each is shown in."""

app = typer.Typer(
    cls=Verbs,
    name="motionmerge",
    help="More motion, and motion that obeys the prompt, for image-to-video models.",
    epilog='Example: motionmerge generate photo.jpg --prompt "the camera pans left"',
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def before_the_verb(
    version: VersionOption = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", envvar="MOTIONMERGE_DEBUG", help="Print the traceback of any error."
        ),
    ] = False,
) -> None:
    """Declare the flags that stand before a verb; `Verbs` acts on them."""


for verb, panel in VERBS.items():
    name = verb.replace("-", "_")
    module = importlib.import_module(f"motionmerge.cli.{name}")
    if hasattr(module, f"{name}_app"):
        app.add_typer(getattr(module, f"{name}_app"), name=verb, rich_help_panel=panel)
    else:
        register = app.command(verb, cls=Verb, epilog=module.EXAMPLE, rich_help_panel=panel)
        register(getattr(module, name))


def main() -> None:
    """Run the command line (the `motionmerge` console script)."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):  # names and prompts that a terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Python looks for cycles among a million objects of torch when it ends, for half a second.
    atexit.register(gc.freeze)
    app()
