"""Which clip belongs to which prompt, image and dimension: VBench's own list, or the files' names.

With VBench's list a clip is `PROMPT-NUMBER.mp4`, numbers 0 to 4. Without, every clip is taken and
its prompt is its name without a number at its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionmerge.errors import DataError
from motionmerge.evaluation.vbench.total import DIMENSIONS
from motionmerge.io.decoding import SUFFIXES
from motionmerge.io.json_file import load_json
from motionmerge.io.paths import is_plain_file

NUM_SAMPLES = 5
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

CAMERA_MOVES: Mapping[str, str] = {
    "camera pans left": "pan_left",
    "camera pans right": "pan_right",
    "camera tilts up": "tilt_up",
    "camera tilts down": "tilt_down",
    "camera zooms in": "zoom_in",
    "camera zooms out": "zoom_out",
    "camera static": "static",
}


@dataclass(frozen=True)
class Entry:
    """A prompt of the suite.

    Attributes:
        prompt: Its text, the beginning of its clips' names.
        dimensions: What is measured on its clips.
        image_name: File of the first image in the images' folder.
    """

    prompt: str
    dimensions: tuple[str, ...]
    image_name: str


@dataclass(frozen=True, kw_only=True)
class SuiteClip:
    """A clip that was found.

    Attributes:
        path: Its file.
        prompt: Its prompt.
        dimensions: What is measured on it.
        image: The first image; None if there is none.
        camera: The move that its prompt names; None without one.
    """

    path: Path
    prompt: str
    dimensions: tuple[str, ...]
    image: Path | None
    camera: str | None


def read_suite(path: Path) -> list[Entry]:
    """Read VBench's list, `vbench2_i2v_full_info.json`.

    Raises:
        DataError: It cannot be read, or is no such list.
    """
    try:
        return [_entry(value) for value in load_json(path)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{path} is no list of VBench-I2V's prompts: {str(error)[:200]}",
            fix="Give vbench2_beta_i2v/vbench2_i2v_full_info.json of VBench's repository.",
        ) from error


def _entry(value: Mapping[str, Any]) -> Entry:
    dimensions = tuple(value["dimension"])
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    texts = (value["prompt_en"], value["image_name"])
    if unknown or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"an entry has the dimensions {dimensions} and the texts {texts}")
    return Entry(value["prompt_en"], dimensions, value["image_name"])


def videos_in(folder: Path) -> list[Path]:
    """List the videos of a folder, by name; hidden files are none.

    Raises:
        DataError: There is no such folder.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"Cannot list {folder}: {error}", fix="Give the folder of the videos."
        ) from error
    return [
        path
        for path in files
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and is_plain_file(path)
    ]


def prompt_of(path: Path) -> str:
    """Return a name without its ending and a number: `a cat-0.mp4` is `a cat`."""
    return re.sub(r"-\d+$", "", path.stem)


def camera_of(text: str) -> str | None:
    """Return the move that a prompt or name contains; None without one."""
    return next((move for words, move in CAMERA_MOVES.items() if words in text), None)


def clips_of_suite(
    entries: Iterable[Entry], folder: Path, *, images: Path | None
) -> list[SuiteClip]:
    """Find the clips of VBench's list, in its order; `check` says what is missing.

    Raises:
        DataError: There is no such folder.
    """
    videos = {path.stem: path for path in reversed(videos_in(folder))}
    clips = []
    for entry in entries:
        image = images / entry.image_name if images is not None else None
        for number in range(NUM_SAMPLES):
            path = videos.get(f"{entry.prompt}-{number}")
            if path is not None:
                found = image if image is not None and is_plain_file(image) else None
                camera = camera_of(entry.prompt)
                clips.append(
                    SuiteClip(
                        path=path,
                        prompt=entry.prompt,
                        dimensions=entry.dimensions,
                        image=found,
                        camera=camera,
                    )
                )
    return clips


def clips_of_folder(folder: Path, *, images: Path | None) -> list[SuiteClip]:
    """Return a clip for every video of a folder, with the dimensions that its name and image allow.

    Raises:
        DataError: There is no such folder.
    """
    known = {path.stem: path for path in _images_in(images)} if images is not None else {}
    clips = []
    for path in videos_in(folder):
        prompt = prompt_of(path)
        camera = camera_of(path.stem)
        image = known.get(prompt) or known.get(re.sub(r", camera .*$", "", prompt))
        dimensions = tuple(
            name
            for name in DIMENSIONS
            if not (name == "camera_motion" and camera is None)
            and not (name.startswith("i2v_") and image is None)
        )
        clips.append(
            SuiteClip(path=path, prompt=prompt, dimensions=dimensions, image=image, camera=camera)
        )
    return clips


def _images_in(folder: Path) -> list[Path]:
    try:
        return [p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES]
    except OSError as error:
        raise DataError(
            f"Cannot list {folder}: {error}", fix="Give the folder of the first images."
        ) from error
