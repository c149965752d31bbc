"""What a video is made from once its prompt and image are encoded."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from motionmerge.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Prompts and images as their encoders see them, for any number of videos.

    Made by `DynamiCrafterPipeline.encode`; nothing here depends on seeds, steps or experts.

    Attributes:
        pixels: The first frames, `[pairs, 3, height, width]` in [-1, 1].
        image_latents: What every frame is conditioned on,
            `[pairs, channels, frames, height, width]`.
        texts: Text tokens `[pairs, tokens, dim]`.
        negative_texts: Those of the unconditional half of guidance; None if it was left out.
        image_states: What the image projector reads, `[pairs, patches, dim]`; None where
            `image_tokens` were given.
        grey_states: The same of a grey image, `[1, patches, dim]`, for the unconditional half.
        image_tokens: Image tokens for every expert, `[pairs, tokens, dim]`.
    """

    pixels: torch.Tensor
    image_latents: torch.Tensor
    texts: torch.Tensor
    negative_texts: torch.Tensor | None = None
    image_states: torch.Tensor | None = None
    grey_states: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None

    def to(self, device: torch.device) -> Conditions:
        """Return the same on another device."""
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        moved = {name: value.to(device) for name, value in own.items() if value is not None}
        return replace(self, **moved)

    def halves(self, *, guided: bool) -> torch.Tensor:
        """Return the text tokens of both halves of guidance, `[pairs, 2, tokens, dim]`, or of one.

        Raises:
            ConfigError: The unconditional half was left out, and is asked for.
        """
        if not guided:
            return self.texts[:, None]
        if self.negative_texts is None:
            raise ConfigError(
                "These conditions were encoded for videos without guidance.",
                fix="Encode them with guided=True, or pass guidance_scale=1.",
            )
        return torch.stack([self.negative_texts.to(self.texts), self.texts], dim=1)
