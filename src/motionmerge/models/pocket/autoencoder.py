"""The pocket model's autoencoder: latents are motion, and decoding warps the photo.

A clip is described by where each pixel comes from in the first frame. That field, at eight key
frames and 16 x 16, goes through one level of the orthonormal Haar transform: latents of 8 x 8 with
8 channels. Encoding is fixed and linear. Latents are interpolated in time to all frames. Decoding
is learned: it sharpens the field along the photo's edges, says how far to trust it, and paints what
the first frame does not show. Because the photo is warped, a clip has the photo's own resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F

from motionmerge.errors import ShapeError

COARSE = 16  # pixels: the size at which the latents describe a frame
LATENT_CHANNELS = 8
IMAGE_CHANNELS = 12
FLOW_UNIT = 4.0  # pixels that the networks count as one
MAX_FLOW = 32.0  # pixels


@dataclass(frozen=True)
class WarpFields:
    """What the decoder's network says about each frame.

    Args:
        flow: Source minus target in pixels of the 64-pixel world, `[n, 2, 64, 64]`.
        trust_logit: Weight of the warped photo before the sigmoid, `[n, 1, 64, 64]`.
        paint: Color where the photo is not trusted, `[n, 3, 64, 64]`.
    """

    flow: torch.Tensor
    trust_logit: torch.Tensor
    paint: torch.Tensor


def haar(x: torch.Tensor) -> torch.Tensor:
    """Apply one level of the orthonormal Haar transform: `[n, c, h, w]` to `[n, 4 c, h/2, w/2]`.

    Channels come as average, horizontal, vertical and diagonal difference of all inputs.
    """
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2


def inverse_haar(x: torch.Tensor) -> torch.Tensor:
    """Undo `haar`: `[n, 4 c, h, w]` to `[n, c, 2 h, 2 w]`."""
    s, u, v, w = x.chunk(4, 1)
    top = torch.stack([s + u + v + w, s - u + v - w], -1).flatten(-2)
    bottom = torch.stack([s + u - v - w, s - u - v + w], -1).flatten(-2)
    return torch.stack([top, bottom], -2).flatten(-3, -2) / 2


def warp(
    photo: torch.Tensor, flow: torch.Tensor, *, unit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fetch every pixel from where the flow points.

    Args:
        photo: `[n, 3, height, width]`.
        flow: Source minus target, `[n, 2, height, width]`, in pixels of a frame of `unit` pixels.
        unit: Height and width that the flow is measured in.

    Returns:
        The warped photo, and whether the source lies inside it: `[n, 1, height, width]`.
    """
    height, width = photo.shape[-2:]
    rows = (torch.arange(height, device=photo.device) + 0.5) * (2 / height) - 1
    columns = (torch.arange(width, device=photo.device) + 0.5) * (2 / width) - 1
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
    grid = grid + flow.permute(0, 2, 3, 1) * (2 / unit)
    warped = F.grid_sample(photo.to(grid), grid, padding_mode="border", align_corners=False)
    return warped.to(photo), (grid.abs().amax(-1) < 1)[:, None]


def _resize(field: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return F.interpolate(field, size=tuple(size), mode="bilinear", align_corners=False)


class PocketAutoencoder(ModelMixin, ConfigMixin):
    """Encode motion by a fixed transform; decode by warping the first frame.

    Args:
        size: Height and width of a frame in the world, in pixels.
        num_frames, num_keyframes: Frames of a clip; frames that have latents, evenly spread from
            the first frame to the last.
        flow_scale: Pixels that one unit of the latents stands for.
        image_scale: Brightness that one unit of the image latents stands for.
        hidden_channels, dilations: Size of the decoder's network at 16 x 16.
    """

    @register_to_config
    def __init__(
        self,
        size: int = 64,
        num_frames: int = 16,
        num_keyframes: int = 8,
        flow_scale: float = 12.0,
        image_scale: float = 0.3,
        hidden_channels: int = 48,
        dilations: Sequence[int] = (1, 2, 4, 1),
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, hidden_channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                nn.Conv2d(hidden_channels, hidden_channels, 3, padding=d, dilation=d),
                nn.SiLU(),
                nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1),
            )
            for d in dilations
        )
        half = hidden_channels // 2
        self.to_half = nn.Sequential(
            nn.Conv2d(hidden_channels, 4 * half, 1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(half, half, 3, padding=1),
        )
        # The rough flow at 32 x 32; the full-size head sees the photo warped by it.
        self.rough_flow = nn.Conv2d(half, 2, 3, padding=1)
        self.to_full = nn.Sequential(nn.SiLU(), nn.Conv2d(half, 4 * 12, 1), nn.PixelShuffle(2))
        self.head = nn.Sequential(
            nn.Conv2d(12 + 9, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 6, 3, padding=1),
        )
        for last in (self.rough_flow, self.head[-1]):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def keyframe_times(self) -> torch.Tensor:
        """Return the times of the key frames in [0, 1], `[num_keyframes]`."""
        return torch.linspace(0, 1, self.config.num_keyframes)

    def _check_image(self, image: torch.Tensor) -> None:
        size = self.config.size
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[-1] % size:
            raise ShapeError(
                f"The image has shape {list(image.shape)}; expected [batch, 3, height, width] with "
                f"height = width a multiple of {size}",
                fix="Crop the photo to a square and resize it (motionmerge.io.video.fit_image).",
            )

    def coarse(self, frames: torch.Tensor) -> torch.Tensor:
        """Average `[n, channels, height, width]` down to `[n, channels, 16, 16]`."""
        return F.adaptive_avg_pool2d(frames, COARSE)

    def encode(self, flow: torch.Tensor) -> torch.Tensor:
        """Return the latents of a motion.

        Args:
            flow: Where each pixel comes from in the first frame, minus where it is, in pixels of
                the 64-pixel world: `[batch, keyframes, 2, height, width]`.

        Returns:
            `[batch, 8, keyframes, 8, 8]`; zero for a still clip.
        """
        latents = haar(self.coarse(flow.flatten(0, 1))) / self.config.flow_scale
        return latents.unflatten(0, flow.shape[:2]).transpose(1, 2)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Return the latents of the photo, for conditioning: `[batch, 12, 8, 8]`."""
        self._check_image(image)
        return haar(self.coarse(image) - 0.5) / self.config.image_scale

    def fields(self, latents: torch.Tensor, image: torch.Tensor) -> WarpFields:
        """Run the decoder's network on every frame.

        Args:
            latents: `[batch, 8, frames, 8, 8]`.
            image: `[batch, 3, height, width]` in [0, 1].

        Returns:
            Fields with n = batch * frames, frames of one clip together.
        """
        frames, unit = latents.shape[2], self.config.size
        coarse_flow = inverse_haar(latents.transpose(1, 2).flatten(0, 1)) * self.config.flow_scale
        still = self.coarse(image).repeat_interleave(frames, 0)
        moved, _ = warp(still, coarse_flow, unit=unit)
        x = self.stem(torch.cat([coarse_flow / FLOW_UNIT, still - 0.5, moved - 0.5], 1))
        for block in self.blocks:
            x = x + block(x)
        half = self.to_half(x)
        size = (unit, unit)
        flow = _resize(coarse_flow, size) + _resize(self.rough_flow(half) * FLOW_UNIT, size)
        photo = F.adaptive_avg_pool2d(image, size).repeat_interleave(frames, 0)
        warped, _ = warp(photo, flow, unit=unit)
        smooth = _resize(moved, size)
        seen = torch.cat([self.to_full(half), photo - 0.5, warped - smooth, smooth - 0.5], 1)
        change, trust_logit, paint = self.head(seen).split((2, 1, 3), 1)
        flow = (flow + FLOW_UNIT * change).clamp(-MAX_FLOW, MAX_FLOW)
        return WarpFields(flow, trust_logit + 3.0, smooth + 0.5 * paint)

    def paint(self, fields: WarpFields, image: torch.Tensor) -> torch.Tensor:
        """Warp the photo by the fields and fill the rest.

        video = sigmoid(trust) * photo(pixel + flow) + (1 - sigmoid(trust)) * paint

        Args:
            fields: With n = batch * frames.
            image: `[batch, 3, height, width]` in [0, 1], of any multiple of 64 pixels.

        Returns:
            `[batch, frames, 3, height, width]` in [0, 1].
        """
        frames = len(fields.flow) // len(image)
        size = image.shape[-2:]
        warped, is_inside = warp(
            image.repeat_interleave(frames, 0), _resize(fields.flow, size), unit=self.config.size
        )
        # Nothing is known of what lies outside the photo.
        trust = torch.sigmoid(_resize(fields.trust_logit, size)) * is_inside
        video = trust * warped + (1 - trust) * _resize(fields.paint, size)
        return video.clamp(0, 1).unflatten(0, (len(image), frames))

    @apply_forward_hook  # with model offload, the weights come to the device as for `forward`
    def decode(self, latents: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Decode latents and first frames to `[batch, num_frames, 3, height, width]` in [0, 1].

        The first key frame is the photo by definition: its latents count as zero.

        Args:
            latents: `[batch, 8, keyframes, 8, 8]`.
            image: `[batch, 3, height, width]`, the first frame at the resolution wanted.

        Raises:
            ShapeError: image or latents have the wrong shape.
        """
        self._check_image(image)
        if latents.ndim != 5 or latents.shape[1] != LATENT_CHANNELS or latents.shape[2] < 2:
            raise ShapeError(
                f"Latents have shape {list(latents.shape)}, expected [batch, {LATENT_CHANNELS}, "
                "keyframes (2 or more), 8, 8].",
                fix="Pass the latents that the pocket U-Net denoised.",
            )
        latents = torch.cat([torch.zeros_like(latents[:, :, :1]), latents[:, :, 1:]], 2)
        # Full-size fields, interpolated instead of these, would smear the edges of what moves.
        return self.paint(self.fields(self._to_frames(latents), image), image)

    def _to_frames(self, latents: torch.Tensor) -> torch.Tensor:
        """Interpolate latents from key frames to frames, `[batch, 8, num_frames, 8, 8]`."""
        last = latents.shape[2] - 1
        position = torch.linspace(0, last, self.config.num_frames, device=latents.device)
        before = position.floor().long().clamp(max=last - 1)
        share = (position - before).to(latents.dtype)[:, None, None]
        return torch.lerp(latents[:, :, before], latents[:, :, before + 1], share)
