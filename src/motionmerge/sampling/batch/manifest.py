"""A manifest of videos to make: its lines are checked, and every video gets a name.

A video's name holds its id, its seed and a hash of everything that decides its bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from motionmerge.errors import ConfigError, DataError, MotionMergeError
from motionmerge.io.hashing import hash_file
from motionmerge.io.paths import is_plain_file, open_plain_file, path_of
from motionmerge.io.video import load_image
from motionmerge.sampling.families.limits import Limits, VideoFamily
from motionmerge.sampling.videos.checks import check_settings
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.text import lines_of

_MAX_NAME_BYTES = 240

MOST_VIDEOS = 100_000
"""Of one call: each takes about 2 KB of memory before the first is made."""

MOST_LIST_BYTES = 64 * 2**20
"""Size of a manifest or a file of prompts."""


class ManifestRow(VideoSettings):
    """One line of a manifest; what it leaves out is the same for all videos.

    Attributes:
        image: The first frame, relative to the manifest's folder.
        id: Letters, digits, `.`, `_` and `-`; by default the image's name.
    """

    image: str
    id: str | None = None

    def settings(self, defaults: VideoSettings) -> VideoSettings:
        """Return the line's settings, and the defaults of what it leaves out or says null of."""
        given = {
            name: value
            for name in VideoSettings.model_fields.keys() & self.model_fields_set
            if (value := getattr(self, name)) is not None
        }
        return defaults.changed(**given)


@dataclass(frozen=True, kw_only=True)
class VideoJob:
    """One video to make.

    Attributes:
        line: The manifest's line, from 1.
        id: Of the line.
        number: The how-many-th video of its prompt, from 0.
        image: Path of the first frame.
        settings: Everything else.
    """

    line: int
    id: str
    number: int
    image: Path
    settings: VideoSettings

    def check(self, family: VideoFamily, limits: Limits) -> None:
        """Refuse what the family cannot make.

        Raises:
            DataError: Names the line, the setting and the nearest right values.
        """
        with self.named_errors():
            check_settings(self.settings, family, limits)

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Name the line in what is wrong with it.

        Raises:
            DataError: In place of any error of ours.
        """
        try:
            yield
        except MotionMergeError as error:
            raise DataError(f"Line {self.line}: {error.message}", fix=error.fix) from error

    def request(self) -> tuple[Image.Image, VideoSettings]:
        """Read the image.

        Raises:
            DataError: It cannot be read.
        """
        return load_image(self.image), self.settings


@dataclass(frozen=True)
class PlannedVideo:
    """A job with the file that it becomes.

    Attributes:
        job: The video.
        path: Its file.
        configuration: Hash of all that decides its bytes.
    """

    job: VideoJob
    path: Path
    configuration: str


def read_manifest(
    path: Path, *, defaults: VideoSettings | None = None, num_videos: int = 1
) -> list[VideoJob]:
    """Read a manifest as `parse_manifest` does; images are relative to its folder.

    Raises:
        DataError: It cannot be read, or as `parse_manifest`.
    """
    return parse_manifest(
        read_list(path),
        source=str(path),
        folder=path.parent,
        defaults=defaults,
        num_videos=num_videos,
    )


def parse_manifest(
    text: str,
    *,
    source: str,
    folder: Path,
    defaults: VideoSettings | None = None,
    num_videos: int = 1,
) -> list[VideoJob]:
    """Parse a manifest, one JSON mapping a line, and check every line.

    Args:
        text: The lines.
        source: Where they come from, for error messages.
        folder: What images are relative to.
        defaults: What a line leaves out.
        num_videos: Videos of each line, with seeds from its own on.

    Raises:
        DataError: A line is no such mapping, its image is missing, two lines are the same video, or
            there are more than `MOST_VIDEOS`.
    """
    lines = lines_of(text)
    check_number(sum(bool(line.strip()) for line in lines) * num_videos, source=source)
    jobs: list[VideoJob] = []
    seen: dict[tuple[str, Path, VideoSettings], int] = {}
    counts: dict[str | None, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        row = _row(line, where=where)
        image = folder / path_of(row.image)
        if not is_plain_file(image):
            raise DataError(f"{where}: there is no {str(image)[:300]}.", fix="Check `image`.")
        settings = row.settings(defaults or VideoSettings())
        name = _checked_id(row.id or image.stem, where=where, own=row.id)
        for own in _seeded(settings, num_videos, where=where):
            twin = seen.setdefault((name, image, own), number)
            if twin != number:
                raise DataError(
                    f"{source}: lines {twin} and {number} are the same video.",
                    fix="Remove one, or give them different seeds.",
                )
            order = counts[own.prompt] = counts.get(own.prompt, -1) + 1
            jobs.append(VideoJob(line=number, id=name, number=order, image=image, settings=own))
    if not jobs:
        raise DataError(
            f"{source} is empty.", fix='Write lines such as {"image": ..., "prompt": ..}.'
        )
    return jobs


def plan(
    jobs: Sequence[VideoJob],
    folder: Path,
    *,
    fingerprint: Mapping[str, object],
    name_of: Callable[[VideoJob, str], str] | None = None,
) -> list[PlannedVideo]:
    """Name the file of every job; images are hashed, each once.

    Args:
        jobs: The videos.
        folder: Where they go.
        fingerprint: What decides the bytes of all of them: model, experts, versions.
        name_of: Names a file from its job and configuration; by default `configuration_name`.

    Raises:
        DataError: Two videos would have the same name, or one has no possible name.
    """
    hashes: dict[Path, str] = {}
    planned: dict[str, PlannedVideo] = {}
    for job in jobs:
        if job.image not in hashes:
            hashes[job.image] = _hash_image(job.image)
        everything = {"image": hashes[job.image], **job.settings.model_dump(), **fingerprint}
        text = json.dumps(everything, sort_keys=True, ensure_ascii=False)
        configuration = hashlib.sha256(text.encode()).hexdigest()[:16]
        name = (name_of or configuration_name)(job, configuration)
        if name in planned:
            raise DataError(
                f"Lines {planned[name].job.line} and {job.line} would both become {name}.",
                fix="Give each line an id of its own.",
            )
        planned[name] = PlannedVideo(job, folder / name, configuration)
    return list(planned.values())


def configuration_name(job: VideoJob, configuration: str) -> str:
    """Name a video by id, seed and configuration: `cat-seed0-1f2e3d4c5b6a7988.mp4`."""
    return f"{job.id}-seed{job.settings.seed}-{configuration}.mp4"


def vbench_name(job: VideoJob, configuration: str) -> str:
    """Name a video as VBench-I2V looks for it: `PROMPT-NUMBER.mp4`, the number from 0.

    Raises:
        DataError: The prompt cannot be a file's name.
    """
    name = f"{job.settings.prompt}-{job.number}.mp4"
    is_possible = job.settings.prompt and not {"/", "\0"} & set(name)
    if not is_possible or len(name.encode()) > _MAX_NAME_BYTES:
        raise DataError(
            f"Line {job.line}: the prompt {job.settings.prompt!r} cannot be a file's name.",
            fix="Use the prompts of VBench-I2V, or leave VBench's names out.",
        )
    return name


def check_number(num_videos: int, *, source: str) -> None:
    """Refuse more videos than `MOST_VIDEOS`, before memory is taken for any.

    Raises:
        DataError: There are more.
    """
    if num_videos > MOST_VIDEOS:
        raise DataError(
            f"{source} asks for {num_videos:,} videos; one call makes {MOST_VIDEOS:,} at most.",
            fix="Make fewer videos of each prompt, or share the prompts between several calls.",
        )


def read_list(path: Path) -> str:
    """Read a manifest or a file of prompts, in UTF-8.

    Raises:
        DataError: It cannot be read, is no UTF-8, or is larger than `MOST_LIST_BYTES`.
    """
    try:
        with open_plain_file(path) as file:
            data = file.read(MOST_LIST_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror or error}.", fix="Check the path."
        ) from error
    if len(data) > MOST_LIST_BYTES:
        raise DataError(
            f"{path} is larger than the {MOST_LIST_BYTES >> 20} MiB that a list of videos may "
            "have.",
            fix="Check that it is the right file, or share its lines between several.",
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: {error}", fix="Save it as UTF-8.") from error


def read_prompts(text: str, *, source: str) -> list[str]:
    """Read prompts, one a line; empty lines are left out.

    Raises:
        DataError: There is none.
    """
    prompts = [line.strip() for line in lines_of(text) if line.strip()]
    if not prompts:
        raise DataError(f"{source} holds no prompt.", fix="Write one prompt a line.")
    return prompts


def _hash_image(path: Path) -> str:
    """Hash an image; of one that cannot be read now, what is wrong, which fails the video alone."""
    try:
        return hash_file(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key `{twice}` appears twice")
    return values


def _row(line: str, *, where: str) -> ManifestRow:
    try:
        values = json.loads(line, object_pairs_hook=_refuse_twice)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}", fix="Write one JSON mapping a line.") from error
    if not isinstance(values, dict):
        raise DataError(
            f"{where} is a {type(values).__name__}.", fix="Write one JSON mapping a line."
        )
    try:
        return ManifestRow.model_validate(values)
    except ConfigError as error:
        raise DataError(f"{where}: {error.message}", fix=error.fix) from error


def _seeded(settings: VideoSettings, num_videos: int, *, where: str) -> Iterator[VideoSettings]:
    """Return the settings of a line's videos, with seeds from its own on."""
    for offset in range(num_videos):
        try:
            yield settings.changed(seed=settings.seed + offset)
        except ConfigError as error:
            raise DataError(f"{where}: {error.message}", fix=error.fix) from error


def _checked_id(name: str, *, where: str, own: str | None) -> str:
    """Make an image's name an id; refuse an own id that is none."""
    allowed = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)
    allowed = allowed.lstrip(".")[:100]
    if own is not None and allowed != own:
        raise DataError(
            f"{where}: `{own[:80]}` is no id.",
            fix="Use up to 100 letters, digits, `.`, `_` and `-`.",
        )
    return allowed or "video"
