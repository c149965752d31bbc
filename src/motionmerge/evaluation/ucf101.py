"""Choose clips of UCF101 for image-to-video without training on it, and record the protocol.

The order of the videos and the first frame of each clip come from the seed and the file's name
alone, so `--num 512` takes the first 512 clips of `--num 2048`, on every machine.

Papers do not agree on split, prompt and stride; `protocol.json` records all that was chosen.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.row_files import append_rows, read_row_file
from motionmerge.evaluation.ucf101_layout import Candidate, PromptRule, find_candidates
from motionmerge.io.atomic import atomic_path, write_whole
from motionmerge.io.hashing import hash_file
from motionmerge.io.paths import is_plain_file
from motionmerge.io.video import fit_image, named_write_errors, read_frames
from motionmerge.rng import whole_number_for

FORMAT = 1
PHOTOS, REAL = "photos", "real"
LOG, MANIFEST, PROTOCOL = "selection.log", "manifest.jsonl", "protocol.json"

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ClipProtocol:
    """What decides which clips are taken, and how.

    Attributes:
        prompt: See `PromptRule`.
        stride: Frames of the video from one frame of the clip to the next.
        num: Clips.
        seed: Of the order, of the first frames, and of each line of the manifest.
        frames: Of each clip.
        size: Height and width to which frames are covered and cut; None leaves them as they are.
        split: A list such as testlist01.txt; None takes all videos.
    """

    prompt: str
    stride: int
    num: int = 2048
    seed: int = 0
    frames: int = 16
    size: tuple[int, int] | None = None
    split: Path | None = None

    def __post_init__(self) -> None:
        PromptRule(self.prompt)
        for name in ("stride", "num", "frames"):
            if not 1 <= getattr(self, name) <= 100_000:
                raise ConfigError(
                    f"`{name}` is {getattr(self, name)}.", fix=f"Give `{name}=` as 1 to 100000."
                )

    @property
    def span(self) -> int:
        """The fewest frames that a video must have."""
        return (self.frames - 1) * self.stride + 1

    def as_recorded(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """Return every setting as `protocol.json` has it."""
        names = "\n".join(one.id for one in candidates)
        return {
            "format": FORMAT,
            "data": "UCF101",
            "split": "all videos" if self.split is None else self.split.name,
            "split_sha256": None if self.split is None else hash_file(self.split),
            "prompt": self.prompt,
            "stride": self.stride,
            "frames": self.frames,
            "fewest_frames": self.span,
            "size": self.size,
            "crop": "none" if self.size is None else "scaled to cover the size, middle cut out",
            "num": self.num,
            "seed": self.seed,
            "num_listed": len(candidates),
            "list_sha256": hashlib.sha256(names.encode()).hexdigest(),
        }


@dataclass(frozen=True, kw_only=True)
class ClipOutcome:
    """What became of a video.

    Attributes:
        id: The video's name.
        prompt: Of its class.
        num_frames: Of the video; 0 if it cannot be read.
        frame_rate: Of the video.
        start: The clip's first frame, from 0; None if there is no clip.
        dropped: Why there is none: `too short`, or what is wrong with the file.
    """

    id: str
    prompt: str
    num_frames: int
    frame_rate: float
    start: int | None = None
    dropped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The clips taken and the videos dropped.

    Attributes:
        settings: Everything recorded of the protocol.
        clips: In the order drawn.
        dropped: The videos that were drawn and left out.
    """

    settings: dict[str, Any]
    clips: list[ClipOutcome]
    dropped: list[ClipOutcome]

    def as_json(self) -> dict[str, Any]:
        """Return what `protocol.json` holds."""
        return {
            **self.settings,
            "num_clips": len(self.clips),
            "num_dropped": len(self.dropped),
            "dropped": {one.id: one.dropped for one in self.dropped},
            "clips": [
                {"id": one.id, "start": one.start, "num_frames": one.num_frames,
                 "frame_rate": one.frame_rate}
                for one in self.clips
            ],
        }  # fmt: skip


def select_clips(
    data: Path,
    protocol: ClipProtocol,
    *,
    folder: Path | None,
    progress: Callable[[], None] | None = None,
) -> Selection:
    """Choose clips and write their photos, the clips, a manifest and the protocol.

    Args:
        data: UCF101's folder.
        protocol: What is taken.
        folder: Where to write; clips of an earlier run are kept. None writes nothing.
        progress: Called after each clip.

    Raises:
        DataError: There are fewer long enough videos than clips, or the folder holds clips of
            another protocol or cannot be written.
    """
    candidates = find_candidates(data, split=protocol.split)
    settings = protocol.as_recorded(candidates)
    known = {} if folder is None else _read_log(folder, settings)
    num_known = sum(one.start is not None for one in known.values())
    if num_known > protocol.num:  # the real clips are compared as a folder: none too many
        raise DataError(
            f"{folder} holds {num_known} clips already, more than the {protocol.num} asked for.",
            fix=f"Give another folder, or `num=` as {num_known} or more.",
        )
    clips: list[ClipOutcome] = []
    dropped: list[ClipOutcome] = []
    ordered = sorted(
        candidates, key=lambda one: (whole_number_for(protocol.seed, "ucf101", one.id), one.id)
    )
    for candidate in ordered:
        if len(clips) == protocol.num:
            break
        one = known.get(candidate.id)
        if one is None or folder is None or not _is_written(one, folder):
            one = _take(candidate, protocol, folder)
            if folder is not None:
                append_rows(folder / LOG, [asdict(one)])
        if one.start is None:
            dropped.append(one)
            continue
        clips.append(one)
        if progress is not None:
            progress()
    if len(clips) < protocol.num:
        raise DataError(
            f"{data} gives {len(clips)} clips of {protocol.span} frames or more, not "
            f"{protocol.num}; {len(dropped)} videos were dropped"
            + (f", e.g. {dropped[0].id}: {dropped[0].dropped}." if dropped else "."),
            fix=f"Give `num=` as {len(clips)} or fewer, or all of UCF101." if clips
            else "Give a lower `stride=` or fewer `frames=`, or all of UCF101.",
        )  # fmt: skip
    selection = Selection(settings=settings, clips=clips, dropped=dropped)
    if folder is not None:
        write_whole(folder / MANIFEST, "".join(_manifest_lines(selection, protocol)))
        write_whole(folder / PROTOCOL, json.dumps(selection.as_json(), indent=2) + "\n")
    return selection


def _take(candidate: Candidate, protocol: ClipProtocol, folder: Path | None) -> ClipOutcome:
    """Read a video, and write its clip and its photo if it is long enough."""
    prompt = PromptRule(protocol.prompt).of(candidate.class_name)
    name = candidate.id
    try:
        frames, rate = read_frames(candidate.path)
    except DataError as error:
        why = error.message.replace(str(candidate.path), candidate.path.name)
        return ClipOutcome(id=name, prompt=prompt, num_frames=0, frame_rate=0, dropped=why)
    num = len(frames)
    if num < protocol.span:
        return ClipOutcome(
            id=name, prompt=prompt, num_frames=num, frame_rate=rate, dropped="too short"
        )
    start = whole_number_for(protocol.seed, "ucf101 start", name) % (num - protocol.span + 1)
    if folder is not None:
        clip = _fitted(frames[start : start + protocol.span : protocol.stride], protocol.size)
        photo = io.BytesIO()
        Image.fromarray(clip[0]).save(photo, format="PNG")
        write_whole(folder / PHOTOS / f"{name}.png", photo.getvalue())
        write_lossless(folder / REAL / f"{name}.mkv", clip, fps=(rate or 25) / protocol.stride)
    return ClipOutcome(id=name, prompt=prompt, num_frames=num, frame_rate=rate, start=start)


def _fitted(clip: Frames, size: tuple[int, int] | None) -> Frames:
    if size is None:
        return clip
    return np.stack([np.asarray(fit_image(Image.fromarray(frame), *size)) for frame in clip])


def write_lossless(path: Path, frames: Frames, *, fps: float) -> None:
    """Write frames `[frames, height, width, 3]` so that every pixel comes back (FFV1 in Matroska).

    H.264 at half the colors' resolution would move the scores of the real clips.

    Raises:
        DataError: The file cannot be written.
    """
    with (
        named_write_errors(path),
        atomic_path(path) as temporary,
        av.open(f"file:{temporary}", "w", format="matroska") as container,
    ):
        stream = container.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for array in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode(None))


def _manifest_lines(selection: Selection, protocol: ClipProtocol) -> Iterator[str]:
    for one in selection.clips:
        row: dict[str, Any] = {
            "image": f"{PHOTOS}/{one.id}.png",
            "prompt": one.prompt,
            "id": one.id,
            "seed": whole_number_for(protocol.seed, "ucf101 noise", one.id) % 2**31,
        }
        if protocol.size is not None:
            row["height"], row["width"] = protocol.size
        yield json.dumps(row, ensure_ascii=False) + "\n"


def _is_written(one: ClipOutcome, folder: Path) -> bool:
    """Check whether a kept clip is still there; one that was dropped has no files."""
    files = (folder / PHOTOS / f"{one.id}.png", folder / REAL / f"{one.id}.mkv")
    return one.start is None or all(map(is_plain_file, files))


def _read_log(folder: Path, settings: dict[str, Any]) -> dict[str, ClipOutcome]:
    """Read what became of the videos in an earlier run of the same protocol; start a log if none.

    The number of clips may change: the order stays.
    """
    path, header = folder / LOG, {**settings, "num": None}
    if not path.exists():
        append_rows(path, [header])
        return {}
    # As JSON has it: a size is a list there.
    first, *rows = read_row_file(path, dict) or [{}]
    if first != json.loads(json.dumps(header)):
        raise DataError(
            f"{folder} holds clips of another protocol or another list of videos.",
            fix="Give another folder, or remove this one.",
        )
    try:
        return {row["id"]: ClipOutcome(**row) for row in rows}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}", fix="Give another folder.") from error
