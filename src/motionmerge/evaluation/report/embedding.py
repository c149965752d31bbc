"""Videos, photos and flow pictures as data URIs, so that a page needs no other file.

A small video that browsers play is taken as it is. Any other one is shown by the frames that were
measured: about eight a second, the longer side at most 512 pixels.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import cv2
import numpy as np
from PIL import Image

from motionmerge.errors import DataError
from motionmerge.evaluation.clips import Clip, read_clip
from motionmerge.evaluation.flow import (
    FloatArray,
    Picture,
    dense_flow,
    flow_legend,
    flow_picture,
    to_gray,
)
from motionmerge.evaluation.motion import REFERENCE_WIDTH
from motionmerge.evaluation.runs import UNFORESEEN
from motionmerge.io.paths import is_plain_file
from motionmerge.io.video import SAFE_OPTIONS, load_image, write_video

AS_IS_BYTES = 1_000_000
"""A larger file is shown by its measured frames."""

STRIP_PAIRS = 3
"""Flow pictures of a video: at its beginning, in the middle and at the end."""

STRIP_BYTES = 16_000
"""Of one video's flow pictures, about, once they are encoded."""

_STRIP_WIDTH = 112  # pixels of one flow picture
_PHOTO_SIDE = 320
_PLAYABLE = {"h264": "mp4", "vp8": "webm", "vp9": "webm", "av1": "mp4"}
_DEFAULT_RATE = 8.0


@dataclass(frozen=True, kw_only=True)
class EmbeddedVideo:
    """A video inside the page.

    Args:
        uri: Of the video; None where it cannot be read.
        poster: Its first frame as a small JPEG, for paper and until the video is decoded.
        is_sampled: Whether it is shown by its measured frames instead of its own.
        flows: Optical flow at several times, `[height, width, 2]` in pixels a second of a frame
            that is `REFERENCE_WIDTH` wide.
    """

    uri: str | None
    poster: str | None = None
    is_sampled: bool = False
    flows: tuple[FloatArray, ...] = ()

    @property
    def num_bytes(self) -> int:
        """What it adds to the page."""
        return len(self.uri or "") + len(self.poster or "") + (STRIP_BYTES if self.flows else 0)


def embed_video(path: Path) -> EmbeddedVideo:
    """Read a video once, and encode what the page shows of it."""
    try:
        return _embedded(path)
    except (DataError, *UNFORESEEN):  # that it cannot be measured is said elsewhere
        return EmbeddedVideo(uri=None)


def _embedded(path: Path) -> EmbeddedVideo:
    clip = read_clip(path)
    kind = _playable_kind(path)
    if kind is not None:
        uri = data_uri(path.read_bytes(), f"video/{kind}")
    else:
        uri = data_uri(_encoded(clip), "video/mp4")
    poster = thumbnail_uri(Image.fromarray(clip.samples[0]))
    return EmbeddedVideo(uri=uri, poster=poster, is_sampled=kind is None, flows=_flows(clip))


def data_uri(content: bytes, kind: str) -> str:
    """Return bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _playable_kind(path: Path) -> str | None:
    """Return mp4 or webm if browsers play the file as it is, and it is small."""
    if path.stat().st_size > AS_IS_BYTES or path.suffix.lower() not in (".mp4", ".m4v", ".webm"):
        return None
    try:
        with av.open(f"file:{path}", options=SAFE_OPTIONS) as container:
            codec = container.streams.video[0].codec_context
            is_plain = codec.pix_fmt in ("yuv420p", "yuvj420p") and len(container.streams) == 1
            kind = _PLAYABLE.get(codec.name.replace("libdav1d", "av1")) if is_plain else None
    except (OSError, av.error.FFmpegError, ValueError, IndexError):
        return None
    return "webm" if kind and path.suffix.lower() == ".webm" else kind


def _encoded(clip: Clip) -> bytes:
    seconds = clip.seconds
    rate = (len(clip.samples) - 1) / seconds if seconds else _DEFAULT_RATE
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, clip.samples, fps=rate, crf=26)
        return path.read_bytes()


def _flows(clip: Clip) -> tuple[FloatArray, ...]:
    """Compute the flow at `STRIP_PAIRS` times; nothing where seconds are unknown."""
    if clip.times is None:
        return ()
    last = len(clip.samples) - 2
    places = sorted({round(last * part / (STRIP_PAIRS - 1)) for part in range(STRIP_PAIRS)})
    found = []
    for place in places:
        grays = to_gray(clip.samples[place : place + 2])
        flow = dense_flow(grays[0], grays[1])
        height, width = flow.shape[:2]
        seconds = float(clip.times[place + 1] - clip.times[place])
        small = (_STRIP_WIDTH, max(1, round(_STRIP_WIDTH * height / width)))
        scaled = cv2.resize(flow, small, interpolation=cv2.INTER_AREA)
        found.append(np.asarray(scaled * (REFERENCE_WIDTH / width / seconds), dtype=np.float32))
    return tuple(found)


def strip_uri(flows: tuple[FloatArray, ...], *, scale: float) -> str:
    """Color the flow at several times, side by side."""
    return jpeg_uri(np.concatenate([flow_picture(flow, scale=scale) for flow in flows], axis=1))


def legend_uri() -> str:
    """Draw the wheel that says which color is which direction."""
    buffer = io.BytesIO()
    wheel = flow_legend(128)
    axis = np.linspace(-1.05, 1.05, 128)
    alpha = (np.hypot(*np.meshgrid(axis, axis)) <= 1).astype(np.uint8) * 255
    Image.fromarray(np.dstack([wheel, alpha])).save(buffer, "PNG")
    return data_uri(buffer.getvalue(), "image/png")


def photo_uri(path: Path | None) -> str | None:
    """Return a small copy of a photo; None where there is none that can be read."""
    if path is None or not is_plain_file(path):
        return None
    try:
        photo = load_image(path)
    except DataError:
        return None
    return thumbnail_uri(photo)


def thumbnail_uri(picture: Image.Image) -> str:
    """Return a small copy of a picture as an address that holds it."""
    picture.thumbnail((_PHOTO_SIDE, _PHOTO_SIDE))
    return jpeg_uri(np.asarray(picture))


def jpeg_uri(picture: Picture) -> str:
    """Return a picture as an address that holds it, as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=88)
    return data_uri(buffer.getvalue(), "image/jpeg")
