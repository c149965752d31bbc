"""What the studio has made, as folders on disk: it survives a restart, and only it is served."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

from motionmerge.errors import DataError
from motionmerge.io.atomic import atomic_folder, disk_errors
from motionmerge.io.json_file import load_json
from motionmerge.io.paths import is_plain_file

WORK_FILE, RECIPE_FILE, REPORT_FILE = "work.json", "recipe.yaml", "report.html"
EXPORT_FILE = "comfyui.zip"
THUMBNAIL, PHOTO = "thumbnail.jpg", "photo.png"
KINDS = {
    ".mp4": "video/mp4",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".yaml": "text/yaml; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".zip": "application/zip",
}
"""What is served, by its ending."""

NUMBERS = {
    "motion_degree": "motion",
    "camera_degree": "camera",
    "object_motion": "objects",
    "first_frame_psnr": "first frame",
    "frozen_share": "frozen",
}
"""What is measured on every video, and what the page calls it."""

_ID = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(rf"[a-z0-9-]{{1,40}}({'|'.join(map(re.escape, KINDS))})")
_MOST_SHOWN, _MOST_VIDEOS = 60, 100
_MOST_BYTES = 4 << 20  # of a work's own file: recipes of 36 videos have 720,000 characters at most

_AS_WRITTEN = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class MadeVideo:
    """A video of a work.

    Args:
        name: Of the weights that made it, in words.
        file: Its file's name.
        seed: Of its noise.
        recipe: The text of a recipe that makes it; None where the model's own weights denoised.
        steps: Which expert had which steps, in words.
        numbers: What was measured on it; the names are of `NUMBERS`.
        failure: Why it could not be measured; None if it was.
        point: Value of the knob in a sweep.
    """

    __pydantic_config__ = _AS_WRITTEN

    name: str
    file: str
    seed: int
    recipe: str | None = None
    steps: str | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    point: float | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one press of a button made.

    Args:
        id: Its folder's name.
        kind: `motion`, `compare` or `sweep`.
        prompt, seed, model: What was asked for; the seed is the first one.
        seconds: That it took.
        videos: In the order in which they are shown.
    """

    __pydantic_config__ = _AS_WRITTEN

    id: str
    kind: str
    prompt: str
    seed: int
    model: str
    seconds: float
    videos: Annotated[tuple[MadeVideo, ...], Field(min_length=1, max_length=_MOST_VIDEOS)]

    @property
    def seeds(self) -> list[int]:
        """The seeds of its videos."""
        return sorted({one.seed for one in self.videos})


_WORK = TypeAdapter(Work)
"""Reads a work that somebody else may have written: everything has the type that it should."""


@dataclass(frozen=True)
class History:
    """What was made, the newest first.

    Args:
        works: Those that can be read.
        num_damaged: How many cannot.
    """

    works: list[Work]
    num_damaged: int = 0


@dataclass(frozen=True)
class Exported:
    """Files for another tool.

    Args:
        id: The folder's name that holds `EXPORT_FILE`.
        usage: What is in it and what to type there.
    """

    id: str
    usage: str


@dataclass(frozen=True)
class Works:
    """A folder of works."""

    folder: Path

    def new_id(self) -> str:
        """Draw a name that nobody can guess, also not another tab."""
        return secrets.token_hex(8)

    def path(self, identity: str) -> Path:
        """Return the folder of a work, which may not be there yet."""
        return self.folder / identity

    def save(self, work: Work, scratch: Path) -> None:
        """Keep a work whose files lie in a scratch folder."""
        with disk_errors(DataError, self.folder.name):
            (scratch / WORK_FILE).write_text(json.dumps(asdict(work), indent=1), encoding="utf-8")
            self.keep(work.id, scratch)

    def keep(self, identity: str, scratch: Path) -> None:
        """Move the files of a scratch folder, wherever it is, to where they are served."""
        with atomic_folder(self.path(identity)) as folder:
            for path in scratch.iterdir():
                shutil.move(path, folder / path.name)

    def history(self) -> History:
        """Read the newest works; what cannot be read is counted."""
        found = [
            path for path in self.folder.glob(f"*/{WORK_FILE}") if _ID.fullmatch(path.parent.name)
        ]
        works, num_damaged = [], 0
        for path in sorted(found, key=_age, reverse=True)[:_MOST_SHOWN]:
            try:
                works.append(work_of(load_json(path, most_bytes=_MOST_BYTES), path.parent.name))
            except (OSError, ValueError, RecursionError):
                num_damaged += 1
        return History(works, num_damaged)

    def file(self, identity: str, name: str) -> Path:
        """Return a file that may be served.

        Raises:
            DataError: There is no such file.
        """
        if _ID.fullmatch(identity) and _NAME.fullmatch(name):
            path = self.path(identity) / name
            if is_plain_file(path) and not path.is_symlink():
                return path
        raise DataError("There is no such file.", fix="Open the studio's page.")


def work_of(content: Any, identity: str) -> Work:
    """Build a work from JSON; ValueError where it is none, another one, or of another version."""
    if isinstance(content, dict) and isinstance(content.get("videos"), list):
        own = {"seed": content.get("seed")}  # of all videos, before there were several seeds
        videos = [{**own, **one} if isinstance(one, dict) else one for one in content["videos"]]
        content = {**content, "videos": videos}
    work = _WORK.validate_python(content)
    if work.id != identity or not all(_NAME.fullmatch(one.file) for one in work.videos):
        raise ValueError("it is another work")
    return work


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
