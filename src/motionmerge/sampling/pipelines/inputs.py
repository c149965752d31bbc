"""What goes into a pipeline and comes out: settings checked, images fitted, batches matched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from motionmerge.errors import ConfigError, DataError, ShapeError
from motionmerge.io.video import fit_image, load_image, rgb_image

NUM_FRAMES, MAX_FRAMES = 16, 32
OUTPUT_TYPES = ("pil", "pt", "np", "latent")

OneImage = Image.Image | npt.NDArray[np.generic] | str | Path
ImageInput = OneImage | Sequence[OneImage] | torch.Tensor

Frames = torch.Tensor | npt.NDArray[np.float32] | list[list[Image.Image]]
"""Videos as each output type has them."""


def prepare_image(
    image: ImageInput,
    *,
    height: int | None,
    width: int | None,
    default_size: tuple[int, int],
    multiple: int,
) -> torch.Tensor:
    """Resize images to the video's size.

    Args:
        image: One image or several of any mode, turned upright, put on white where transparent,
            resized and centre-cropped to fit: from PIL, paths of files, or NumPy arrays
            `[height, width, 3]` of 8 bits; or a tensor `[batch, 3, height, width]` or
            `[3, height, width]`, float in [0, 1], that has the size; or a float array of the same
            with the colors last.
        height, width: Of the video in pixels; by default the tensor's, or `default_size`.
        default_size: (height, width).
        multiple: What both must divide by.

    Returns:
        `[batch, 3, height, width]` in [-1, 1].

    Raises:
        ShapeError: The size does not divide, or a tensor has another one, is not float, or is not
            in [0, 1].
        DataError: There is no image, or one that cannot be read.
    """
    given = _tensor_or_images(image)
    if isinstance(given, torch.Tensor):
        given = given if given.ndim == 4 else given.unsqueeze(0)
        default_size = (given.shape[-2], given.shape[-1])
    height = default_size[0] if height is None else height
    width = default_size[1] if width is None else width
    if any(not _is_whole(side) or side % multiple for side in (height, width)):
        asked = (height if _is_finite(height) else 0, width if _is_finite(width) else 0)
        near = [max(1, round(size / multiple)) * multiple for size in asked]
        raise ShapeError(
            f"The video is to be {height} x {width} pixels; both must divide by {multiple}.",
            fix=f"Use e.g. height={near[0]}, width={near[1]}.",
        )
    if isinstance(given, torch.Tensor):
        if given.shape[1:] != (3, height, width):
            raise ShapeError(
                f"The image tensor has shape {list(given.shape)}; expected "
                f"[batch, 3, {height}, {width}].",
                fix="Resize it, leave height and width out, or pass a PIL image.",
            )
        _check_pixels(given)
        return given.float() * 2 - 1
    if not given:
        raise _no_image()
    fitted = np.stack([np.asarray(fit_image(rgb_image(item), height, width)) for item in given])
    return torch.from_numpy(fitted).permute(0, 3, 1, 2) / 127.5 - 1


def _tensor_or_images(image: object) -> torch.Tensor | list[object]:
    """Return one tensor `[batch, 3, height, width]`, or a list of images of PIL."""
    if isinstance(image, torch.Tensor):
        return image
    if isinstance(image, np.ndarray) and image.ndim == 4:
        image = list(image)
    several = image if isinstance(image, (list, tuple)) else [image]
    read = [_tensor_or_picture(one) for one in several]
    tensors = [one for one in read if isinstance(one, torch.Tensor)]
    if not tensors:
        return read
    if len(tensors) < len(read) or len({one.shape for one in tensors}) > 1:
        kinds = [list(one.shape) if torch.is_tensor(one) else type(one).__name__ for one in read]
        raise ShapeError(
            f"The images of a list are of several kinds or shapes: {kinds}.",
            fix="Pass all as images of PIL or their paths, or tensors of one shape.",
        )
    return torch.stack(tensors) if tensors[0].ndim == 3 else torch.cat(tensors)


def _tensor_or_picture(image: object) -> object:
    """Open a path, and read an array; what it is none of, `rgb_image` judges."""
    if isinstance(image, (str, Path)):
        return load_image(image)
    if not isinstance(image, np.ndarray):
        return image
    if image.ndim == 3 and image.shape[-1] in (3, 4) and image.dtype == np.uint8:
        return Image.fromarray(image)
    if image.ndim == 3 and image.shape[-1] == 3 and np.issubdtype(image.dtype, np.floating):
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    raise ShapeError(
        f"An image array has shape {list(image.shape)} and dtype {image.dtype}; expected "
        "[height, width, 3] of uint8, or of floats in [0, 1].",
        fix="Put the colors last, and pass 0 to 255 as uint8.",
    )


def prompts_of(prompt: str | Sequence[str]) -> list[str]:
    """Return prompts as a list; one text is one prompt.

    Raises:
        ConfigError: One is no text.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    for one in prompts:
        if not isinstance(one, str):
            raise ConfigError(f"A prompt is {one!r}.", fix="Pass a text, or a list of texts.")
    return prompts


def _check_pixels(image: torch.Tensor) -> None:
    """Refuse pixels of 0 to 255, which would be a white image; resizing may overshoot a little."""
    if not image.is_floating_point():
        raise ShapeError(
            f"The image tensor has dtype {image.dtype}; expected floats in [0, 1].",
            fix="Pass image / 255 if its pixels are 0 to 255, or a PIL image.",
        )
    if not len(image):
        raise _no_image()
    low, high = (float(value) for value in image.aminmax())
    if not -0.5 <= low <= high <= 1.5:
        raise ShapeError(
            f"The image tensor has values from {low:g} to {high:g}; expected [0, 1].",
            fix="Pass image / 255, or (image + 1) / 2, or a PIL image.",
        )


def _no_image() -> DataError:
    return DataError("The list of images is empty.", fix="Pass at least one image.")


def check_num_frames(num_frames: int) -> None:
    """Refuse a length out of range.

    Raises:
        ConfigError: It is.
    """
    if not (_is_whole(num_frames) and num_frames <= MAX_FRAMES):
        raise ConfigError(f"`num_frames` is {num_frames!r}.", fix=f"Use 1 to {MAX_FRAMES}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def check_settings(
    *,
    num_videos_per_prompt: int,
    num_inference_steps: int,
    start_step: int | None,
    guidance_scale: float,
    guidance_rescale: float,
    eta: float,
    output_type: str,
    callback_tensors: Sequence[str],
    frame_rate: float | None = None,
    frame_stride: float | None = None,
    image_guidance_scale: float = 1.0,
) -> None:
    """Refuse settings out of range; a model is told a frame rate or a frame stride.

    Raises:
        ConfigError: Names the setting and what it can be.
    """
    told = ("frame_rate", frame_rate) if frame_stride is None else ("frame_stride", frame_stride)
    whole = "a whole number from 1 on"
    can_be_told = told[1] is not None and _is_finite(told[1]) and told[1] > 0
    rules = [
        ("num_videos_per_prompt", num_videos_per_prompt, _is_whole(num_videos_per_prompt), whole),
        ("num_inference_steps", num_inference_steps, _is_whole(num_inference_steps), whole),
        ("start_step", start_step, start_step is None or _is_whole(start_step), whole),
        (*told, can_be_told, "a number above 0"),
        ("guidance_scale", guidance_scale, _is_finite(guidance_scale), "a finite number"),
        (
            "image_guidance_scale",
            image_guidance_scale,
            _is_finite(image_guidance_scale),
            "a finite number",
        ),
        ("guidance_rescale", guidance_rescale, 0 <= guidance_rescale <= 1, "0 to 1"),
        ("eta", eta, 0 <= eta <= 1, "0 to 1"),
        ("output_type", output_type, output_type in OUTPUT_TYPES, ", ".join(OUTPUT_TYPES)),
        (
            "callback_on_step_end_tensor_inputs",
            list(callback_tensors),
            set(callback_tensors) <= {"latents"},
            '["latents"]',
        ),
    ]
    for name, value, is_fine, expected in rules:
        if not is_fine:
            raise ConfigError(f"{name} is {value!r}.", fix=f"Use {expected}.")


def tensors_for(callback: object, names: Sequence[str]) -> Sequence[str]:
    """Return what a callback wants to see: one of diffusers' classes says so itself."""
    own: Sequence[str] = getattr(callback, "tensor_inputs", names)
    return own


def check_tokens(embeds: torch.Tensor, shape: tuple[int, ...], *, name: str) -> None:
    """Refuse embeddings that are not `[batch, tokens, dim]` with these tokens and this width.

    Raises:
        ShapeError: Gives both shapes.
    """
    if embeds.ndim != 3 or tuple(embeds.shape[1:]) != shape:
        raise ShapeError(
            f"{name} has shape {list(embeds.shape)}; expected [batch, {shape[0]}, {shape[1]}].",
            fix="Make it with this pipeline's encode_prompt or encode_image_tokens.",
        )


def repeated(tensor: torch.Tensor, batch: int, *, name: str) -> torch.Tensor:
    """Repeat a batch of one to `batch`.

    Raises:
        ShapeError: The batch is neither 1 nor `batch`.
    """
    if len(tensor) in (1, batch):
        return tensor.expand(batch, *tensor.shape[1:])
    raise ShapeError(
        f"There are {len(tensor)} of {name} for {batch} of the others.",
        fix="Pass as many images as prompts, or one of either.",
    )


def video_to_output(video: torch.Tensor, output_type: str) -> Frames:
    """Convert `[batch, frames, 3, height, width]` in [0, 1] to "pt", "np" or "pil"."""
    if output_type == "pt":
        return video
    array = video.permute(0, 1, 3, 4, 2).cpu().numpy()
    if output_type == "np":
        return array
    pixels = (array * 255).round().astype(np.uint8)
    return [[Image.fromarray(frame) for frame in frames] for frames in pixels]


def refuse_last_image(last_image: object, *, model: str) -> None:
    """Check that no last image is given to a model that knows none.

    Raises:
        ConfigError: One is given.
    """
    if last_image is not None:
        raise ConfigError(
            f"{model} cannot end with an image of your choice.",
            fix="Leave last_image out, or use DynamiCrafter's interpolation model.",
        )
