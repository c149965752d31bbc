"""Photos in, videos in and out, contact sheets.

A video is `[frames, 3, height, width]`, float in [0, 1].
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from motionmerge.errors import DataError, ShapeError
from motionmerge.io.atomic import atomic_path
from motionmerge.io.heif import is_heif, open_heif
from motionmerge.lazy_torch import torch

VideoType = TypeVar("VideoType", "torch.Tensor", "npt.NDArray[np.uint8]")

MIN_IMAGE_SIDE = 16
MAX_IMAGE_PIXELS = 89_000_000
MAX_IMAGE_BYTES = 2**29
MAX_VIDEO_BYTES = 4 * 2**30

_VIDEO_FORMATS = "asf,avi,gif,matroska,mov,mpeg,mpegts,mpegvideo,mxf,ogg,yuv4mpegpipe,apng,flv"
"""The demuxers of FFmpeg that may open a file: none that reads another file named in it."""

SAFE_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _VIDEO_FORMATS}

IMAGE_FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "DIB", "PPM", "JPEG2000", "TGA"),
)
"""What a photo can be, besides HEIC. Pillow opens whatever it knows, by content: a `.jpg` that
holds PostScript would start Ghostscript, which may never end."""

_DECODER_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on damaged files."""

_LABEL_SIZE = 10
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "PingFang.ttc",
    "msyh.ttc",
    "Arial Unicode.ttf",
)
"""Fonts with more letters than Pillow's own, which it finds by name where they are installed."""

_NO_CHARACTER = "\U0010ffff"

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_BT709 = 1  # the code of BT.709 for matrix, primaries and transfer in H.264


def load_image(path: str | Path) -> Image.Image:
    """Read a photo as 8-bit RGB: turned as its EXIF says, transparency over white, 16 bit scaled.

    Raises:
        DataError: The file is missing, damaged, of another format than `IMAGE_FORMATS` and HEIC,
            too small or too large; or it is HEIC, and pillow-heif is not installed.
    """
    try:
        _check_photo_file(path)
        with _open_photo(path) as image:
            _check_image_size(image, path)
            image.load()
            _check_image_size(image, path)  # HEIC may turn out larger than it says
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large: {error}", fix="Scale the image down.") from error
    except FileNotFoundError as error:
        raise DataError(f"There is no image at {path}.", fix="Check the path.") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path} cannot be read as an image: it holds none of "
            f"{', '.join(IMAGE_FORMATS)}, HEIC.",
            fix="Save it again as PNG or JPEG.",
        ) from error
    except _DECODER_ERRORS as error:
        raise DataError(
            f"{path} cannot be read as an image: {error}", fix="Save it again as PNG or JPEG."
        ) from error


def _open_photo(path: str | Path) -> Image.Image:
    # Pillow comes first: a file that begins as HEIF may hold AVIF, which it reads by itself.
    try:
        return Image.open(path, formats=_known_formats())
    except UnidentifiedImageError:
        if not is_heif(path):
            raise
        return open_heif(path)


@cache
def _known_formats() -> list[str]:
    """List those formats that the installed Pillow can read."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _check_photo_file(path: str | Path) -> None:
    """Refuse what is no file, which opening might wait for, and what fills memory when opened."""
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is no file.", fix="Give the file of a photo.")
    if found.st_size > MAX_IMAGE_BYTES:
        raise DataError(
            f"{path} has {found.st_size:,} bytes, more than {MAX_IMAGE_BYTES:,}.",
            fix="Scale the image down.",
        )


def rgb_image(image: object) -> Image.Image:
    """Convert an image to the form of `load_image`: 8-bit RGB, upright, transparency over white.

    Raises:
        DataError: It is no image of Pillow, or its pixels cannot be read.
    """
    if not isinstance(image, Image.Image):
        raise DataError(
            f"The image is a {type(image).__name__}.", fix="Pass an image of Pillow (PIL.Image)."
        )
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except _DECODER_ERRORS as error:
        raise DataError(
            f"An image of mode {image.mode} cannot be read: {error}",
            fix="Convert it to RGB, or save it again as PNG or JPEG.",
        ) from error


def _check_image_size(image: Image.Image, path: str | Path) -> None:
    width, height = image.size
    if min(width, height) < MIN_IMAGE_SIDE:
        raise DataError(
            f"{path} has {width} x {height} pixels.",
            fix=f"Use an image with at least {MIN_IMAGE_SIDE} pixels a side.",
        )
    if width * height > MAX_IMAGE_PIXELS:
        raise DataError(
            f"{path} has {width} x {height} pixels, more than {MAX_IMAGE_PIXELS:,} in all.",
            fix="Scale the image down.",
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        bits = 16 if image.mode != "I" or values.max() > 255 else 8
        scaled = np.clip(values / (2**bits - 1) * 255, 0, 255).round().astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def fit_image(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale an image until it covers `height` x `width` (Lanczos) and cut out the centre."""
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def write_video(
    path: str | Path,
    video: torch.Tensor | npt.NDArray[Any],
    *,
    fps: float = 8,
    metadata: Mapping[str, Any] | None = None,
    crf: int = 12,
    scale: int = 1,
) -> None:
    """Write an H.264 mp4 (yuv420p, BT.709) that appears only when it is whole.

    Args:
        path: The file to write; missing folders are created.
        video: `[frames, 3, height, width]` float in [0, 1] (clipped), or
            `[frames, height, width, 3]` uint8. Odd sizes get their last row or column twice.
        fps: Frames per second.
        metadata: Kept as JSON in the file's comment; see `read_video_metadata`. What JSON does not
            know is kept as its text.
        crf: Quality, 0 (lossless) .. 51 (worst).
        scale: Every pixel becomes a `scale` x `scale` square.

    Raises:
        ShapeError: `video` has another shape or dtype, or no frame.
        DataError: The file cannot be written.
    """
    frames = eight_bit(video)
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with named_write_errors(path), atomic_path(path) as temporary:
        _encode(temporary, frames, fps=fps, metadata=metadata, crf=crf)


@contextmanager
def named_write_errors(path: str | Path) -> Iterator[None]:
    """Name the file that cannot be written.

    Raises:
        DataError: In place of the errors of the machine and of FFmpeg.
    """
    try:
        yield
    except (OSError, av.error.FFmpegError) as error:
        raise DataError(
            f"Cannot write {path}: {error}", fix="Check the folder and its free space."
        ) from error


def _encode(
    path: Path,
    frames: npt.NDArray[np.uint8],
    *,
    fps: float,
    metadata: Mapping[str, Any] | None,
    crf: int,
) -> None:
    with av.open(_local(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if metadata is not None:
            container.metadata["comment"] = _as_comment(metadata)
        rate = Fraction(fps).limit_denominator(1001)
        # x264's macroblock tree reads memory it has not set: equal small videos, unequal files.
        options = {"crf": str(crf), "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.thread_count = 1  # x264's output depends on its number of threads
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = ColorRange.MPEG
        for array in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _as_comment(metadata: Mapping[str, Any]) -> str:
    r"""Write JSON; bytes of a prompt that are no UTF-8 become escapes such as `\udcff`."""
    text = json.dumps(metadata, ensure_ascii=False, default=str)
    return text.encode(errors="backslashreplace").decode()


def eight_bit(video: torch.Tensor | npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Round a video to the 8 bits of a file: `[frames, height, width, 3]` uint8.

    Args:
        video: `[frames, 3, height, width]` float in [0, 1] (clipped), or
            `[frames, height, width, 3]` uint8.

    Raises:
        ShapeError: `video` has another shape or dtype, or no frame.
        DataError: It holds NaN or infinite pixels.
    """
    array = video.detach().cpu() if isinstance(video, torch.Tensor) else torch.as_tensor(video)
    is_float = array.dtype.is_floating_point
    channel_axis = 1 if is_float else 3
    readable = is_float or array.dtype == torch.uint8
    if not readable or array.ndim != 4 or array.shape[channel_axis] != 3 or not array.numel():
        raise ShapeError(
            f"A video of shape {list(array.shape)} and dtype {array.dtype} cannot be written.",
            fix="Pass [frames, 3, height, width] float in [0, 1] or "
            "[frames, height, width, 3] uint8.",
        )
    if not is_float:
        return np.asarray(array)
    array = array.float()
    if not bool(array.isfinite().all()):
        raise DataError(
            "The video holds NaN or infinite pixels.", fix="Look at the sampler: it diverged."
        )
    rounded = (array.clamp(0, 1) * 255).round().to(torch.uint8)
    return np.asarray(rounded.permute(0, 2, 3, 1))


def _local(path: str | Path) -> str:
    """Name a file for FFmpeg, which takes `take:2.mp4` for an address otherwise."""
    return f"file:{os.fspath(path)}"


def read_video(path: str | Path) -> tuple[torch.Tensor, float]:
    """Read a whole video.

    Returns:
        `[frames, 3, height, width]` float in [0, 1], and its frames per second.

    Raises:
        DataError: As `read_frames`.
    """
    frames, rate = read_frames(path)
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    return video.float() / 255, rate


def read_frames(path: str | Path) -> tuple[npt.NDArray[np.uint8], float]:
    """Read a whole video as it is decoded.

    Returns:
        `[frames, height, width, 3]` uint8, and its frames per second.

    Raises:
        DataError: The file is missing, damaged, holds no frame, or would not fit into 4 GiB as
            floats.
    """
    frames: list[npt.NDArray[np.uint8]] = []
    try:
        with av.open(_local(path), options=SAFE_OPTIONS) as container:
            if not container.streams.video:
                raise DataError(f"{path} holds no video.", fix="Use a video file such as mp4.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                frames.append(np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8))
                if len(frames) * frames[0].nbytes * 4 > MAX_VIDEO_BYTES:
                    raise DataError(
                        f"{path} is larger than 4 GiB once it is read.",
                        fix="Cut a shorter or smaller clip.",
                    )
            rate = float(stream.average_rate or stream.guessed_rate or 0)
    except (OSError, av.error.FFmpegError) as error:
        raise DataError(f"Cannot read {path}: {error}", fix="Check the file.") from error
    if not frames:
        raise DataError(f"{path} holds no frame.", fix="Check the file.")
    return np.stack(frames), rate


def read_video_metadata(path: str | Path) -> dict[str, Any]:
    """Read what `write_video` kept in a file's comment.

    Raises:
        DataError: The file cannot be read, or holds no such comment.
    """
    try:
        with av.open(_local(path)) as container:
            comment = container.metadata.get("comment", "")
    except (OSError, av.error.FFmpegError) as error:
        raise DataError(f"Cannot read {path}: {error}", fix="Check the file.") from error
    try:
        metadata = json.loads(comment)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise DataError(
            f"{path} does not say how it was made.", fix="Use a video that motionmerge wrote."
        )
    return metadata


def _legible(text: str) -> tuple[str, _Font]:
    """Choose a font that covers the text; else escape the letters that the default font lacks."""
    own = ImageFont.load_default(_LABEL_SIZE)
    for font in (own, *_system_fonts()):
        if not _lacking(text, font):
            return text, font
    lacking = _lacking(text, own)
    escapes = {c: c.encode("unicode_escape").decode() for c in lacking}
    return "".join(escapes.get(c, c) for c in text), own


def _system_fonts() -> Iterator[_Font]:
    for name in _FONTS:
        try:
            yield ImageFont.truetype(name, _LABEL_SIZE)
        except OSError:
            continue


def _lacking(text: str, font: _Font) -> set[str]:
    """List the letters that a font draws as it draws what is no character: as an empty box."""

    def drawn(character: str) -> tuple[tuple[int, int], bytes]:
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    box = drawn(_NO_CHARACTER)
    return {c for c in set(text) if not c.isspace() and drawn(c) == box}


def spread_frames(video: VideoType, *, num: int = 8) -> VideoType:
    """Return about `num` frames of a video, evenly spread, the first among them."""
    return video[:: max(1, len(video) // num)]


def contact_sheet(
    videos: Sequence[torch.Tensor | npt.NDArray[Any]],
    *,
    labels: Sequence[str] | None = None,
    every: int = 1,
    path: str | Path | None = None,
) -> Image.Image:
    r"""Draw videos as rows and their frames as columns.

    Args:
        videos: Each as for `eight_bit`, all of one height and width.
        labels: One text per row, drawn above it; letters that no font found here has are drawn as
            escapes such as `\\u732b`.
        every: Show every n-th frame.
        path: Also save the sheet here, as PNG.

    Raises:
        ShapeError: There is no video, their frames differ in size, or labels do not match them.
        DataError: The file cannot be written.
    """
    rows = [eight_bit(video)[::every] for video in videos]
    sizes = {row.shape[1:3] for row in rows}
    if len(sizes) != 1 or (labels is not None and len(labels) != len(rows)):
        raise ShapeError(
            f"{len(rows)} videos with frame sizes {sorted(sizes)} and "
            f"{len(rows) if labels is None else len(labels)} labels do not make a sheet.",
            fix="Pass at least one video, all of one height and width, and one label each.",
        )
    ((height, width),) = sizes
    gap, band = 2, 14 if labels is not None else 0
    columns = max(len(row) for row in rows)
    size = (columns * (width + gap) + gap, len(rows) * (height + band + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = gap + i * (height + band + gap)
        if labels is not None:
            text, font = _legible(labels[i])
            draw.text((gap, top), text, fill="black", font=font)
        for j, frame in enumerate(row):
            sheet.paste(Image.fromarray(frame), (gap + j * (width + gap), top + band))
    if path is not None:
        with named_write_errors(path), atomic_path(path) as temporary:
            sheet.save(temporary, format="PNG")
    return sheet
