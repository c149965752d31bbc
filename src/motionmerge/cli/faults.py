"""How a command ends when something is wrong: one message on stderr, an exit code, no traceback.

    2    the user's input, with a `Fix:` that names flags of the verb that was called
    1    all else: a full disk, an output that cannot be written, a fault of ours
    130  Ctrl-C

`motionmerge --debug VERB ..` prints the traceback before the message.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from motionmerge.cli.help import VerbGroup
from motionmerge.cli.options import print_version
from motionmerge.cli.printing import harmless, harmless_lines
from motionmerge.errors import MotionMergeError
from motionmerge.packages import missing_package

PYTHON_TO_FLAG: Mapping[str, str] = {
    "missing='keep'": "--missing keep",
    "overwrite=True": "--overwrite",
    "allow_nonfinite=True": "--allow-nan",
    "layout='pipeline'": "--layout pipeline",
    "legacy=True": "--legacy-weights",
    "add_adapter=True": "--add-adapter",
    "device='cpu'": "--device cpu",
    "dtype='bf16'": "--dtype bf16",
    "load_pocket()": "--model pocket",
    "base=MODEL": "--base MODEL",
    "recipe='lora-rescue', inputs={'base': MODEL, 'style': FILE}": (
        "--recipe lora-rescue --input base=MODEL --input style=FILE"
    ),
}
"""What errors below the command line advise in Python, and the flag that does the same."""

_RENAMED: Mapping[str, str] = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_scale_2": "--guidance-2",
    "image_guidance_scale": "--image-guidance",
    "num_workers": "--workers",
    "legacy": "--legacy-weights",
    "loras": "--lora",
    "parameters": "--set",
    "inputs": "--input",
}
"""Arguments and settings whose flag has another name."""

SETTINGS = (
    *("prompt", "negative_prompt", "height", "width", "num_frames", "frame_rate", "seed"),
    *("num_inference_steps", "guidance_scale", "guidance_scale_2", "start_step", "sigmas", "shift"),
    *(
        "image_guidance_scale",
        "frame_stride",
        "last_image",
        "boundary",
        "dtype",
        "device",
        "variant",
        "num_workers",
    ),
    "stochastic_rounding",
)
"""What errors name in backticks, as a manifest does; the flag is added."""

_ARGUMENT = re.compile(r"`(\w+)=`")
_INPUT = re.compile(r"inputs=\{'(\w+)': FILE\}")
_CHANGE = re.compile(r"pass changes=\{'([\w.]+)': VALUE\}")

_MACHINE_ERRORS = {
    errno.ENOSPC: "Make room on the disk.",
    errno.EDQUOT: "Make room on the disk.",
    errno.EROFS: "Choose a place that can be written.",
    errno.EACCES: "Check the rights of the file and its folder.",
    errno.EPERM: "Check the rights of the file and its folder.",
    errno.EIO: "Check the disk.",
    errno.EPIPE: "Let the reader of the output read all of it.",
    errno.EMFILE: "Allow more open files (ulimit -n).",
}
"""What the machine refuses, whatever we do, and what helps."""

_LONGEST_FAULT = 500
"""Characters; some errors repeat what they were given."""


def in_flags(fix: str, flags: Collection[str]) -> str:
    """Name the flags of a verb in a fix that was written for Python.

    Of alternatives (`.., or ..`), those for which the verb has no flag are left out.
    """
    ways = fix.removesuffix(".").split(", or ")
    possible = [way for way in ways if not _lacks_flag(way, flags)] or ways
    fix = ", or ".join(possible)
    fix = f"{fix[:1].upper()}{fix[1:]}."  # the first way may be one that was left out
    for python, flag in PYTHON_TO_FLAG.items():
        if flag.partition(" ")[0] in flags:
            fix = fix.replace(python, flag)
    for setting in SETTINGS:
        if (flag := flag_of(setting)) in flags:
            fix = fix.replace(f"`{setting}`", f"`{setting}` ({flag})")
    fix = _INPUT.sub(r"--input \1=FILE", fix) if "--input" in flags else fix
    fix = _CHANGE.sub(r"add --set \1=VALUE", fix) if "--set" in flags else fix
    return name_flags(fix, flags)


def name_flags(text: str, flags: Collection[str]) -> str:
    """Write the flags of a verb in place of Python's arguments: --motion for `motion=`."""

    def flag(found: re.Match[str]) -> str:
        name = flag_of(found[1])
        return name if name in flags else found[0]

    return _ARGUMENT.sub(flag, text)


def flag_of(name: str) -> str:
    """Return the flag of an argument or a setting."""
    return _RENAMED.get(name, f"--{name.replace('_', '-')}")


def _verb(ctx: Any) -> list[str]:
    """Return the words that a group has set aside; click 8.1 had another name for them."""
    return getattr(ctx, "_protected_args", None) or getattr(ctx, "protected_args", [])


def _lacks_flag(way: str, flags: Collection[str]) -> bool:
    """Check whether an advice is for Python, and the verb has no flag that does the same."""
    return any(
        python in way and flag.partition(" ")[0] not in flags
        for python, flag in PYTHON_TO_FLAG.items()
    )


def flags_of(group: Any, words: Iterable[str]) -> set[str]:
    """Return the flags of the verb that words of the command line begin with."""
    command = group
    for word in words:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
    return {spelled for parameter in command.params for spelled in parameter.opts}


class Verbs(VerbGroup):
    """The verbs, and one end for everything that can go wrong in them."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; see the top of the file for what becomes of errors."""
        words = [*_verb(ctx), *ctx.args]
        if "--version" in words:  # no verb has such a flag, and many people type it behind one
            print_version(wanted=True)
        with _one_message(flags_of(self, words), debug=ctx.params.get("debug", False)):
            result = super().invoke(ctx)
            sys.stdout.flush()  # a full disk shows only now if little was printed
            return result

    def main(self, *args: Any, **options: Any) -> Any:
        """Parse the command line and run a verb; printing a help text can fail as well."""
        try:
            with _one_message(()):
                return super().main(*args, **options)
        except typer.Exit as end:
            sys.exit(end.exit_code)


@contextmanager
def _one_message(flags: Collection[str], *, debug: bool = False) -> Iterator[None]:
    """Turn what is raised inside into one message and an exit code.

    Args:
        flags: Those of the verb.
        debug: Whether the traceback is printed first.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        _tell("Stopped.")
        raise typer.Exit(130) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in (
            "typer",
            "click",
        ):  # usage errors, Exit: its own ends
            raise
        if debug:
            _tell(traceback.format_exc().rstrip())
        if isinstance(error, ImportError):
            error = missing_package(error) or error
        if isinstance(error, MotionMergeError):
            fix = "" if error.fix is None else f"\n  Fix: {in_flags(error.fix, flags)}"
            _tell(f"Error: {name_flags(error.message, flags)}{fix}")
            raise typer.Exit(2) from error
        _tell(_unwritable_output() or _machine_error(error) or _fault(error))
        raise typer.Exit(1) from error


def _machine_error(error: Exception) -> str | None:
    """Describe what the machine refused; None if it was something else."""
    if isinstance(error, MemoryError):
        return "Error: Out of memory.\n  Fix: Close other programs, or ask for less at a time."
    if not isinstance(error, OSError) or error.errno not in _MACHINE_ERRORS:
        return None
    where = "" if error.filename is None else f": {error.filename}"
    return f"Error: {error.strerror}{where}\n  Fix: {_MACHINE_ERRORS[error.errno]}"


def _fault(error: Exception) -> str:
    """Describe in one line an error that nobody foresaw."""
    text = harmless(" ".join(str(error).split()))[:_LONGEST_FAULT]
    name = type(error).__name__ + (f": {text}" if text else "")
    return (
        f"Fault: {name.removesuffix('.')}. This should not happen; report it with the output of "
        "the same command under --debug: motionmerge --debug VERB .."
    )


def _unwritable_output() -> str | None:
    """Describe why nothing can be printed, and let the rest go nowhere; None if all was printed."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _into_nothing(sys.stdout)
        return f"Error: Cannot write to the standard output: {error.strerror or error}."
    return None


def _tell(text: str) -> None:
    """Print to stderr, if that can be written; messages repeat names from strangers."""
    try:
        typer.echo(harmless_lines(text), err=True)
    except OSError:
        _into_nothing(sys.stderr)


def _into_nothing(stream: Any) -> None:
    """Drop what a stream still holds; Python would complain of it at its end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)
