"""From an image and a prompt to a video with VideoCrafter1, as a diffusers pipeline.

Paper: Chen et al. 2023 (arXiv 2310.19512). Official: `scripts/evaluation/inference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline, with_defaults
from motionmerge.sampling.pipelines.encoded import Conditions
from motionmerge.sampling.pipelines.inputs import Frames, ImageInput, refuse_last_image
from motionmerge.sampling.pipelines.loop import VideoPipelineOutput

DEFAULTS = {"guidance_scale": 12.0, "guidance_rescale": 0.0, "frame_rate": 8}


class VideoCrafterPipeline(DynamiCrafterPipeline):
    """`DynamiCrafterPipeline` with a U-Net that sees the image as tokens alone.

    The image is a hint, never the first frame, which therefore differs from it. Defaults of
    `__call__` are the official script's; photos are cropped to the video's shape, not squeezed.
    Everything else, experts included, is the parent's.
    """

    def encode(
        self, image: ImageInput, prompt: str | Sequence[str] | None = None, **options: Any
    ) -> Conditions:
        """Run the encoders alone; see `DynamiCrafterPipeline.encode` for the options.

        Raises:
            ConfigError: `last_image` is given; the model knows no last images.
        """
        refuse_last_image(options.get("last_image"), model="VideoCrafter")
        return super().encode(image, prompt, **options)

    @with_defaults(DEFAULTS)
    def __call__(
        self,
        image: ImageInput | None = None,
        prompt: str | Sequence[str] | None = None,
        **options: Any,
    ) -> VideoPipelineOutput | tuple[Frames]:
        """Make videos; see `DynamiCrafterPipeline.__call__` for the options.

        Guidance is 12 by default, without rescale, and the frame rate 8.

        Raises:
            ConfigError: `last_image` is given; the model knows no last images.
        """
        return super().__call__(image, prompt, **(DEFAULTS | options))
