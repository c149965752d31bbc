"""What a training run on clips is: one YAML file.

model: path/to/dynamicrafter-512        # a pipeline's folder, or owner/name on the hub
trains: adapter
objective: {drop: 0.05, time_noise: {strength: 100}}
data: {folder: clips, manifest: checked/clips.jsonl, sizes: [[320, 512]], frame_stride: [1, 6]}
settings: {steps: 1000, batch_size: 4, learning_rate: 1.0e-5}
output: runs/mine

Paths are relative to the working directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from motionmerge.io.decoding import Size

from .clip_batches import ConditionFrames, ConditionNoise
from .config_file import ConfigSection
from .parameters import LoraShape
from .samples import NoiseRange
from .settings import TrainerSettings
from .views import ViewSettings


class LearningSection(ConfigSection):
    """What is learned.

    Attributes:
        drop: Share of the samples without caption, of those without image, and of those without
            both, each alone; None for 0.05 where the model's guidance drops the image, else 0.
        drop_caption: Share of further samples without caption.
        time_noise: Noise on the image; None for none.
        noise_range: Noise levels to train on, in the unit of recipes.
        interpolates: Train DynamiCrafter's interpolation model, which is shown the last frame too.
    """

    drop: float | None = Field(default=None, ge=0, le=1 / 3)
    drop_caption: float = Field(default=0.0, ge=0, le=1)
    time_noise: ConditionNoise | None = None
    noise_range: NoiseRange = NoiseRange()
    interpolates: bool = False


class DataSection(ConfigSection):
    """Which clips, and what of them.

    Attributes:
        folder: With the clips.
        manifest: What `motionmerge data check` wrote of them: `clips.jsonl`.
        sizes, num_frames, frame_stride, frame_rate: See `ViewSettings`.
        views: Spans of frames that are taken of each shot; each is encoded once.
        condition_frames: See `ConditionFrames`; None for 4 of DynamiCrafter, else the first.
        flatten_motion: How much more often than others shots of rare motion may be shown; 1 shows
            all alike.
        cache: Whether what encoders make of views is kept; if not, they run anew in each step.
        cache_folder: Where it is kept; runs on the same clips may share it. None for the run's.
    """

    folder: Path
    manifest: Path
    sizes: tuple[Size, ...] = Field(min_length=1)
    num_frames: int = Field(16, ge=1)
    frame_stride: tuple[int, int] | None = None
    frame_rate: float | None = None
    views: int = Field(4, ge=1, le=10_000)
    condition_frames: ConditionFrames | None = None
    flatten_motion: float = Field(1.0, ge=1, allow_inf_nan=False)
    cache: bool = True
    cache_folder: Path | None = None

    def view_settings(self, *, seed: int) -> ViewSettings:
        """Return how views are taken.

        Raises:
            ConfigError: Strides and rate are both given, or sizes are none.
        """
        return ViewSettings(
            sizes=self.sizes,
            num_frames=self.num_frames,
            frame_stride=self.frame_stride,
            frame_rate=self.frame_rate,
            seed=seed,
        )


class ValidationSection(ConfigSection):
    """What is measured while the run goes on.

    Attributes:
        every: After how many steps.
        clips: How many are held out for it: none of their shots is trained on.
        videos: Of so many of them, at most, a video is made each time, from the first frame and
            the caption; 0 for none, None for all.
        video_steps: Denoising steps of a video.
        warn_below: Warn where videos move less than this share of what the base's do.
        strengths: Values of the recipe's `motion` that are tried at the end on the same photos and
            captions, from the least on, until videos move as much as the base's; none leaves that
            to you.
    """

    every: int = Field(100, ge=1)
    clips: int = Field(4, ge=1)
    videos: int | None = Field(None, ge=0)
    video_steps: int = Field(25, ge=1, le=1000)
    warn_below: float = Field(0.7, ge=0)
    strengths: tuple[Annotated[float, Field(ge=-2, le=2)], ...] = Field(
        (-1.0, -0.5, 0.0, 0.25, 0.5), max_length=20
    )


class AdapterSection(ConfigSection):
    """The adapter that is added to a model.

    Attributes:
        text_encoder: A folder with `text_encoder` and `tokenizer` of CLIP in it, such as that of
            Stable Diffusion or of a DynamiCrafter: for SVD, which reads no text itself.
    """

    text_encoder: Path | None = None


class RunConfig(ConfigSection):
    """A training run on clips.

    Attributes:
        summary: What it is for.
        model: The folder of a pipeline, or `owner/name` on the hub.
        trains: See `choose_parameters`. An adapter is added to a model that has none.
        lora: Train a LoRA instead of the weights.
        adapter: What is added to a model without adapter, where `trains` asks for one.
        objective: What is learned.
        data: On what.
        settings: How.
        validation: What is measured meanwhile; None for nothing.
        output: The folder of the run: states, log, and what came of it.
    """

    summary: str | None = None
    model: str
    trains: str = "adapter"
    lora: LoraShape | None = None
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    objective: LearningSection = Field(default_factory=LearningSection)
    data: DataSection
    settings: TrainerSettings
    validation: ValidationSection | None = None
    output: Path
