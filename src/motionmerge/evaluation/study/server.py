"""A small server for a study: it shows the study's own files, and appends answers to one file.

Whoever sends something may be anybody: only files of the manifest are shown, only answers that the
manifest allows are taken, in bounded sizes, rates and numbers. Nothing is kept of a visitor but the
answer.
"""

from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.row_files import append_rows
from motionmerge.evaluation.study.answers import AnswerKey, checked_answer, read_answers
from motionmerge.evaluation.study.build import MANIFEST_SCRIPT, PAGE_FILES, manifest_script
from motionmerge.evaluation.study.manifest import ANSWERS_FILE, SITE, Manifest, read_study

MAX_ANSWER_BYTES = 4096
ANSWERS_PER_SECOND, BURST = 5.0, 60
"""Of one address; a proxy is one address for everybody behind it."""

MAX_RATERS = 10_000
MAX_CONNECTIONS = 256
"""A browser keeps up to six open; each waits for its next request as long as for a slow one."""

SECONDS_TO_ASK = 10.0
"""In which a request has to come: visitors who send a byte now and then keep nobody out."""

_SLOWEST = 10_000  # bytes a second that a visitor has to take
_MOST_ADDRESSES = 10_000
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".mp4": "video/mp4",
    ".jpg": "image/jpeg",
}
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; media-src 'self'; "
    "style-src 'self'; script-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
}
_RANGE = re.compile(r"bytes=(\d{1,12})-(\d{1,12})?")


@dataclass
class RateLimit:
    """A bucket of tokens for each address; addresses that were quiet longest are forgotten."""

    clock: Callable[[], float] = time.monotonic
    buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def allows(self, address: str) -> bool:
        """Take a token, and return whether there was one."""
        now = self.clock()
        left, before = self.buckets.pop(address, (float(BURST), now))
        left = min(float(BURST), left + (now - before) * ANSWERS_PER_SECOND)
        is_allowed = left >= 1
        self.buckets[address] = (left - is_allowed, now)
        if len(self.buckets) > _MOST_ADDRESSES:
            self.buckets.popitem(last=False)
        return is_allowed


class AnswerBook:
    """The file of answers, written by one thread at a time; each answer is on disk once.

    A second server of the same study may append the same answer: whoever reads keeps the first.

    Args:
        path: The file; what is in it already counts.
        manifest: What may be answered.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._lock = threading.Lock()
        self._known: set[AnswerKey] = set()
        self._raters: Counter[str] = Counter()
        if path.exists() and path.stat().st_size:
            for answer in read_answers([path], manifest).answers:
                self._known.add(answer.key)
                self._raters[answer.rater] += 1

    def add(self, value: Any) -> HTTPStatus:
        """Append an answer, unless it is there.

        Returns:
            CREATED; OK if it was there; TOO_MANY_REQUESTS where there is no room for more raters.

        Raises:
            DataError: It is no answer of this study, or the disk refuses it.
        """
        answer = checked_answer(value, self.manifest)
        with self._lock:
            if answer.key in self._known:
                return HTTPStatus.OK
            if answer.rater not in self._raters and len(self._raters) >= MAX_RATERS:
                return HTTPStatus.TOO_MANY_REQUESTS
            try:
                append_rows(self.path, [answer.model_dump(mode="json")])
            except DataError as error:
                raise DiskRefusal(str(error)) from error
            self._known.add(answer.key)
            self._raters[answer.rater] += 1
        return HTTPStatus.CREATED


class DiskRefusal(DataError):
    """An answer was right, and the disk did not take it: whoever sent it keeps it."""


class StudyServer(ThreadingHTTPServer):
    """Serves one study's folder.

    Args:
        folder: What `build_study` wrote; answers go to `answers.jsonl` in it.
        host, port: Where it listens; port 0 takes a free one.

    Raises:
        ConfigError: It cannot listen there.
        DataError: There is no study, or its answers are damaged.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", port: int = 0) -> None:
        study = read_study(folder)
        self.book = AnswerBook(folder / ANSWERS_FILE, study.manifest)
        self.files = _public_files(folder / SITE, study.manifest)
        # The page sends answers only where somebody takes them.
        self.script = f"{manifest_script(study.manifest)}window.STUDY_SERVER = true;\n".encode()
        self.limit = RateLimit()
        self.limit_lock = threading.Lock()
        self.room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"Cannot listen at {host}:{port}: {error}", fix="Choose another `port=`."
            ) from error

    @property
    def url(self) -> str:
        """The page's address."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, unless there are too many."""
        if not self.room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the machine has no more threads for us
            self.room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, then make room for the next."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Forget a visitor who hung up."""


def _public_files(site: Path, manifest: Manifest) -> dict[str, Path]:
    """Return the files that are shown, by their addresses: those of the page and the manifest."""
    named = {
        name for task in manifest.tasks for name in (task.first, task.second, task.photo) if name
    }
    files = {f"/{name}": site / name for name in (*PAGE_FILES, MANIFEST_SCRIPT)}
    files |= {f"/files/{name}": site / "files" / name for name in named}
    files["/"] = files["/index.html"]
    lacking = [path for path in files.values() if not path.is_file()]
    if lacking:
        raise DataError(f"The study lacks {lacking[0]}.", fix="Build it again.")
    return files


class _Visitor(io.RawIOBase):
    """What a visitor sends, up to a moment, however slowly it comes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.ends = connection, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    server: StudyServer
    server_version, sys_version = "motionmerge", ""
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.visitor = _Visitor(self.connection)
        self.rfile = io.BufferedReader(self.visitor)

    def handle_one_request(self) -> None:
        self.visitor.ends = time.monotonic() + SECONDS_TO_ASK
        super().handle_one_request()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        # A body is not read, and what follows must not be taken for a request of somebody else's.
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True
        path = self.server.files.get(self.path.partition("?")[0])
        if path is None:
            self._say(HTTPStatus.NOT_FOUND)
            return
        try:
            is_manifest = path.name == MANIFEST_SCRIPT
            content = self.server.script if is_manifest else path.read_bytes()
        except OSError:
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        status, headers = HTTPStatus.OK, {"Accept-Ranges": "bytes"}
        wanted = _RANGE.fullmatch(self.headers.get("Range") or "")
        if wanted and int(wanted[1]) < len(content):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            if first <= last:
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                status, content = HTTPStatus.PARTIAL_CONTENT, content[first : last + 1]
        is_named_by_content = "/files/" in self.path
        headers["Cache-Control"] = "max-age=31536000" if is_named_by_content else "no-cache"
        self._answer(status, content, _KINDS[path.suffix], headers)

    def do_POST(self) -> None:
        with self.server.limit_lock:
            is_allowed = self.server.limit.allows(self.client_address[0])
        length = self.headers.get("Content-Length") or ""
        self.close_connection = True  # whatever was not read must not be taken for a request
        if self.path != "/answers":
            self._say(HTTPStatus.NOT_FOUND)
        elif not is_allowed:
            self._say(HTTPStatus.TOO_MANY_REQUESTS)
        elif self.headers.get_content_type() != "application/json":
            # A page of somebody else cannot send this type without asking us first.
            self._say(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        elif not re.fullmatch(r"\d{1,9}", length):
            self._say(HTTPStatus.LENGTH_REQUIRED)
        elif int(length) > MAX_ANSWER_BYTES:
            self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            self._take(self.rfile.read(int(length)))

    def _take(self, body: bytes) -> None:
        try:
            self._say(self.server.book.add(json.loads(body)))
        except DiskRefusal:
            self._say(HTTPStatus.INSUFFICIENT_STORAGE)
        except (ValueError, RecursionError, DataError):
            self._say(HTTPStatus.BAD_REQUEST)

    def _say(self, status: HTTPStatus) -> None:
        """Answer with the status alone: nothing that was sent comes back."""
        self._answer(status, status.phrase.encode() + b"\n", "text/plain; charset=utf-8", {})

    def _answer(
        self, status: HTTPStatus, content: bytes, kind: str, headers: dict[str, str]
    ) -> None:
        self.connection.settimeout(SECONDS_TO_ASK + len(content) / _SLOWEST)
        self.send_response(status)
        sent = {"Content-Type": kind, "Content-Length": str(len(content)), **_HEADERS, **headers}
        for name, value in sent.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request without repeating it."""
        self.close_connection = True
        self._say(HTTPStatus(code))

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: who came from where is nobody's business."""
