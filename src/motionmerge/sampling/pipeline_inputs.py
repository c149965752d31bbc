"""What goes into a pipeline and comes out: settings checked, images fitted, batches matched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.io.video import fit_image

NUM_FRAMES, MAX_FRAMES = 16, 32
OUTPUT_TYPES = ("pil", "pt", "np", "latent")

ImageInput = Image.Image | Sequence[Image.Image] | torch.Tensor


def prepare_image(
    image: ImageInput,
    *,
    height: int | None,
    width: int | None,
    default_size: tuple[int, int],
    multiple: int,
) -> torch.Tensor:
    """Bring images to the video's size.

    Args:
        image: One image or several, resized and centre-cropped to fit; or a tensor
            `[batch, 3, height, width]` or `[3, height, width]` in [0, 1] that has the size.
        height, width: Of the video in pixels; by default the tensor's, or `default_size`.
        default_size: (height, width).
        multiple: What both must divide by.

    Returns:
        `[batch, 3, height, width]` in [-1, 1].

    Raises:
        ShapeError: The size does not divide, or a tensor has another one.
    """
    if isinstance(image, torch.Tensor):
        image = image if image.ndim == 4 else image.unsqueeze(0)
        default_size = (image.shape[-2], image.shape[-1])
    height, width = height or default_size[0], width or default_size[1]
    if height < 1 or width < 1 or height % multiple or width % multiple:
        near = [max(1, round(size / multiple)) * multiple for size in (height, width)]
        raise ShapeError(
            f"The video is to be {height} x {width} pixels; both must divide by {multiple}.",
            fix=f"use e.g. height={near[0]}, width={near[1]}.",
        )
    if isinstance(image, torch.Tensor):
        if image.shape[1:] != (3, height, width):
            raise ShapeError(
                f"The image tensor has shape {list(image.shape)}; expected "
                f"[batch, 3, {height}, {width}].",
                fix="resize it, leave height and width out, or pass a PIL image.",
            )
        return image.float() * 2 - 1
    images = [image] if isinstance(image, Image.Image) else image
    fitted = np.stack([np.asarray(fit_image(item, height, width)) for item in images])
    return torch.from_numpy(fitted).permute(0, 3, 1, 2) / 127.5 - 1


def check_num_frames(num_frames: int) -> None:
    """Refuse a length out of range.

    Raises:
        ConfigError: It is.
    """
    if not 1 <= num_frames <= MAX_FRAMES:
        raise ConfigError(f"num_frames is {num_frames!r}.", fix=f"use 1 to {MAX_FRAMES}.")


def check_settings(
    *,
    num_videos_per_prompt: int,
    guidance_rescale: float,
    eta: float,
    output_type: str,
    callback_tensors: Sequence[str],
) -> None:
    """Refuse settings out of range.

    Raises:
        ConfigError: Names the setting and what it can be.
    """
    rules = [
        ("num_videos_per_prompt", num_videos_per_prompt, num_videos_per_prompt >= 1, "1 or more"),
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
            raise ConfigError(f"{name} is {value!r}.", fix=f"use {expected}.")


def check_tokens(embeds: torch.Tensor, shape: tuple[int, ...], *, name: str) -> None:
    """Refuse embeddings that are not `[batch, tokens, dim]` with these tokens and this width.

    Raises:
        ShapeError: Gives both shapes.
    """
    if embeds.ndim != 3 or tuple(embeds.shape[1:]) != shape:
        raise ShapeError(
            f"{name} has shape {list(embeds.shape)}; expected [batch, {shape[0]}, {shape[1]}].",
            fix="make it with this pipeline's encode_prompt or encode_image_tokens.",
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
        fix="pass as many images as prompts, or one of either.",
    )


def video_to_output(video: torch.Tensor, output_type: str) -> Any:
    """Convert `[batch, frames, 3, height, width]` in [0, 1] to "pt", "np" or "pil"."""
    if output_type == "pt":
        return video
    array = video.permute(0, 1, 3, 4, 2).cpu().numpy()
    if output_type == "np":
        return array
    pixels = (array * 255).round().astype(np.uint8)
    return [[Image.fromarray(frame) for frame in frames] for frames in pixels]
