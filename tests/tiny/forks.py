"""The command line in another process, without importing torch and diffusers once more."""

from __future__ import annotations

import os
from collections.abc import Sequence

from typer.testing import CliRunner

from motionmerge.cli import app


def forked(words: Sequence[str], **environment: str) -> int:
    """Run a command in a copy of this process; return its process id, for `os.waitpid`."""
    process = os.fork()
    if process:
        return process
    code = 99  # no exit code of ours
    try:
        code = CliRunner().invoke(app, words, env=environment).exit_code
    finally:
        os._exit(code)


def exit_code(process: int) -> int:
    """Wait until a forked command ends."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
