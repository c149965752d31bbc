"""`motionmerge studio`: a page on this machine where a photo, a prompt and a knob become videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from motionmerge.cli.options import ResultsOption
from motionmerge.cli.printing import harmless
from motionmerge.packages import missing_package

EXAMPLE = "Example: motionmerge studio -o my-videos"


def studio(
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="NUMBER", help="Where to listen.")
    ] = 8010,
    output: ResultsOption = Path("studio"),
) -> None:
    """Open a page in the browser: drop a photo, write a prompt, turn the motion knob.

    It listens on this machine alone and runs until Ctrl-C. Everything that it makes is kept in the
    folder, and is there again the next time.
    """
    try:
        from motionmerge.studio.server import listening, server_of, studio_app
    except ImportError as error:
        raise missing_package(error) or error from error

    with listening(port) as listener:
        server = server_of(studio_app(output))
        address, real = listener.getsockname()
        print(f"Open http://{address}:{real}/ in a browser (Ctrl-C ends it).", flush=True)
        print(f"Videos are kept in {harmless(str(output))}.", flush=True)
        server.run(sockets=[listener])
