"""Serve the studio on this machine alone: its page, and the files of what it made."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import fastapi
import gradio as gr
import uvicorn
from fastapi.responses import FileResponse, PlainTextResponse
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from motionmerge.errors import ConfigError, DataError
from motionmerge.io.atomic import prepare_folder
from motionmerge.studio.app import build_page
from motionmerge.studio.fragments import TEMPLATES
from motionmerge.studio.making import Maker
from motionmerge.studio.tabs import Studio
from motionmerge.studio.turns import MOST_WAITING
from motionmerge.studio.works import KINDS, Works

HOST = "127.0.0.1"
MAX_UPLOAD = "60mb"

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "sandbox allow-scripts allow-downloads",
}
"""Of files: a report runs its script, and has no way into the page."""


class OwnPageOnly:
    """Refuses what a page of another site sends: a browser names the site in `Origin`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what our own page, or no page at all, asks for."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and origin != f"http://{headers.get('host')}":
                refusal = PlainTextResponse("Forbidden\n", status_code=403)
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


def studio_app(folder: Path) -> fastapi.FastAPI:
    """Build the web application; works are kept in the folder.

    Raises:
        ConfigError: The folder cannot be written to.
    """
    prepare_folder(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("GRADIO_TEMP_DIR", str(folder.absolute() / ".uploads"))
    works = Works(folder)
    page = build_page(Studio(Maker(works)))
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=8)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(OwnPageOnly)
    # A page of another site that has its name point here is refused.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.get("/works/{identity}/{name}")
    def work_file(identity: str, name: str) -> fastapi.Response:
        try:
            path = works.file(identity, name)
        except DataError:
            return PlainTextResponse("Not Found\n", status_code=404)
        return FileResponse(path, media_type=KINDS[path.suffix], headers=_HEADERS)

    phone = (TEMPLATES / "phone.css").read_text(encoding="utf-8")
    names = ("players.js", "keys.js")
    script = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)
    mounted = gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=HOST,
        theme=_theme(),
        css=(TEMPLATES / "studio.css").read_text(encoding="utf-8"),
        head=f"<script>{script}</script><style>{phone}</style>",  # `css=` loses rules of @media
        footer_links=[],
        show_error=False,
        max_file_size=MAX_UPLOAD,
        allowed_paths=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    # Gradio looks whether a file that a page names was uploaded only in an app that was launched.
    page.has_launched = True
    return mounted


def _theme() -> gr.themes.Base:
    """Return colors with a contrast of at least 4.5 to 1, and fonts that are on the machine."""
    plain = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    return gr.themes.Soft(primary_hue="pink", font=plain, font_mono=mono).set(
        button_primary_background_fill="#b91c5a",
        button_primary_background_fill_hover="#9d174d",
        button_primary_background_fill_dark="#be185d",
        block_title_text_color="#9d174d",
        block_label_text_color="#9d174d",
        block_title_background_fill_dark="#9d174d",
        block_label_background_fill_dark="#9d174d",
        checkbox_label_background_fill_selected="#b91c5a",
        checkbox_label_background_fill_selected_dark="#9d174d",
        input_placeholder_color="#5d646e",
        input_placeholder_color_dark="#c3cad4",
        input_border_width="1px",
        input_border_color="#838b97",
        input_border_color_dark="#7b8492",
        checkbox_border_color="#838b97",
        checkbox_border_color_dark="#7b8492",
        body_text_color_subdued="#5d646e",
        body_text_color_subdued_dark="#b9c0ca",
        block_info_text_color="#565f6b",
        block_info_text_color_dark="#b3bac4",
    )


@contextlib.contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """Listen on this machine's own address; port 0 takes a free one.

    Raises:
        ConfigError: The port is taken.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"Cannot listen at {HOST}:{port}: {error}", fix="Choose another `port=`."
            ) from error
        yield listener


def server_of(app: fastapi.FastAPI) -> uvicorn.Server:
    """Return a server that writes no log of who asked for what, nor of tabs open at Ctrl-C."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    logging.getLogger("uvicorn.error").addFilter(_is_no_open_tab)
    return uvicorn.Server(config)


def _is_no_open_tab(record: logging.LogRecord) -> bool:
    """Return whether a line is about something else than a tab that was open at the end."""
    error = record.exc_info[1] if record.exc_info else None
    is_of_one = isinstance(error, asyncio.CancelledError) or "running task" in record.getMessage()
    return not is_of_one
