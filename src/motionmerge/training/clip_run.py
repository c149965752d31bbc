"""A training run on clips, from its configuration to what came of it.

open_clip_run   finds model and clips and checks that they go together; no weights are read
ClipRun.train   encodes views, trains, and writes a pipeline or a LoRA, and a recipe for it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.atomic import prepare_folder
from motionmerge.memory import return_freed_memory
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.parameter_groups import DYNAMICRAFTER
from motionmerge.rng import whole_number_for
from motionmerge.sampling.request.folder import PipelineFolder, find_pipeline
from motionmerge.sampling.request.loading import empty_modules, load_pipeline, load_scheduler

from .clip_batches import ClipDrawing, TrainingViews
from .clip_encoder import ClipEncoder, DynamiCrafterEncoder
from .clip_objective import ClipObjective
from .clips_folder import LeftOut
from .clips_manifest import read_clips_manifest
from .denoisers.dynamicrafter import DynamiCrafterDenoiser
from .held_out import HeldOutLoss
from .held_out_videos import HeldOutVideos, MeasureVideo, prepare_videos
from .latents_cache import LatentsCache
from .motion_balance import flattening_weights
from .objectives.choice import process_for
from .parameters import TRAINED_GROUPS, Trained, choose_parameters
from .run_config import RunConfig
from .run_result import RunResult, adapter_of, write_result
from .samples import ClipOrder, NoiseRange, shares_within
from .settings import Measure, TrainingProgress, TrainingResult, Validation
from .trainer import fit
from .views import TrainingShot, usable_shots

OnEncoded = Callable[[int, int], None]
"""Called with how many views are encoded, and of how many."""

OnValidated = Callable[[int, Mapping[str, Any]], None]
"""Called with the step and what was measured after it."""


def open_clip_run(config: RunConfig) -> ClipRun:
    """Find model and clips of a run, and check that they go together.

    Raises:
        ConfigError: A setting does not go with the model or the clips.
        CheckpointError: There is no such model.
        DataError: The manifest cannot be read, or no clip is long enough.
    """
    data, seed = config.data, config.settings.seed
    folder = find_pipeline(config.model)
    if folder.family.name != "dynamicrafter":
        raise ConfigError(
            f"{config.model} is a {folder.family.name}; it cannot be trained on clips yet.",
            fix="Set `model` to a DynamiCrafter.",
        )
    clips = read_clips_manifest(data.manifest, folder=data.folder)
    shots, left_out = usable_shots(clips, data.view_settings(seed=seed))
    held_out: list[TrainingShot] = []
    if config.validation is not None:
        held_out, shots = _apart(shots, config.validation.clips, seed=seed)
    weights = None
    if data.flatten_motion > 1:
        motions = [shot.shot.motion for shot in shots]
        weights = flattening_weights(motions, most=data.flatten_motion)
    views = TrainingViews(
        shots=shots,
        settings=data.view_settings(seed=seed),
        num_views=data.views,
        condition_frames="first" if config.objective.interpolates else data.condition_frames,
        order=ClipOrder(len(shots), weights),
        seed=seed,
        drop=config.objective.drop,
    )
    run = ClipRun(
        config=config,
        folder=folder,
        views=views,
        left_out=tuple(left_out),
        held_out=tuple(held_out),
    )
    shares_within(torch.zeros(1), process_for(run.scheduler), config.objective.noise_range)
    return run


def _apart(
    shots: Sequence[TrainingShot], num_clips: int, *, seed: int
) -> tuple[list[TrainingShot], list[TrainingShot]]:
    """Set clips apart: the first shot of each, and the shots of all other clips."""
    clips = sorted(
        {shot.key[0] for shot in shots},
        key=lambda clip: whole_number_for(seed, "held out", clip),
    )
    if len(clips) <= num_clips:
        raise ConfigError(
            f"`validation.clips` holds out {num_clips} of {len(clips)} clips.",
            fix="Hold out fewer, or leave `validation` out.",
        )
    firsts: dict[str, TrainingShot] = {}
    for shot in shots:
        firsts.setdefault(shot.key[0], shot)
    chosen = clips[:num_clips]
    rest = [shot for shot in shots if shot.key[0] not in set(chosen)]
    return [firsts[clip] for clip in chosen], rest


@dataclass(frozen=True, kw_only=True)
class ClipRun:
    """A run that can begin.

    Attributes:
        config: What it is.
        folder: The model.
        views: What it is shown.
        left_out: Shots that are too short.
        held_out: Shots that are measured on, and not trained on.
    """

    config: RunConfig
    folder: PipelineFolder
    views: TrainingViews
    left_out: Sequence[LeftOut]
    held_out: Sequence[TrainingShot] = ()

    @cached_property
    def scheduler(self) -> Any:
        """Of the model; says how it is trained."""
        found = load_scheduler(self.folder)
        if found is None:
            raise CheckpointError(
                f"{self.folder.name} has no scheduler, so how it was trained is not known.",
                fix="Download or convert the whole folder again.",
            )
        return found

    def count_parameters(self) -> tuple[Trained, int]:
        """Choose the trained parameters without memory for them; also returns how many there are.

        Raises:
            ConfigError: As `choose_parameters`.
        """
        parts = empty_modules(self.folder)
        denoiser = self._denoiser(parts)
        return self._chosen(denoiser), sum(one.numel() for one in denoiser.parameters())

    def train(
        self,
        *,
        on_encoded: OnEncoded | None = None,
        on_progress: Callable[[TrainingProgress], None] | None = None,
        on_validated: OnValidated | None = None,
        measure_video: MeasureVideo | None = None,
    ) -> tuple[TrainingResult, RunResult | None]:
        """Carry the run out, or go on with it; on other than the first process nothing is written.

        Args:
            on_encoded: See there.
            on_progress: Called after each logged step.
            on_validated: Called after each validation.
            measure_video: Measures the videos of a validation; without it none are made.

        Raises:
            CheckpointError: The folder holds another run's states, or cannot be written.
            DataError: A clip cannot be read any more, or the loss is not a number.
            RunStopped: See `fit`.
        """
        config = self.config
        prepare_folder(config.output)
        pipeline: Any = load_pipeline(self.folder, dtype=self.frozen_dtype)
        encoder = DynamiCrafterEncoder(pipeline)
        encoder.check_views(self.views.settings)
        denoiser = self._denoiser(pipeline.components)
        has_adapter = self.folder.configs["unet"].get("temporal_context_dim") is not None
        new_adapter = {} if has_adapter else adapter_of(denoiser.unet)
        trained = self._chosen(denoiser)
        objective = self.objective(encoder, on_encoded)
        measures: list[Measure] = []
        if config.validation is not None:
            measures.append(self._held_out_loss(encoder, objective))
            if config.validation.videos and measure_video is not None:
                measures.append(self._held_out_videos(pipeline, encoder, measure_video))
        if config.data.cache:
            del pipeline, encoder  # they are large, and have done their work
            return_freed_memory()
        result = fit(
            denoiser,
            objective,
            config.settings,
            config.output,
            trainable=trained.parameters,
            identity=self._identity,
            validation=self._validation(measures, on_validated),
            on_progress=on_progress,
        )
        if not result.is_main_process:
            return result, None
        return result, write_result(
            config.output,
            self.folder.path,
            denoiser,
            trained,
            model=config.model,
            new_adapter=new_adapter,
            is_lora=config.lora is not None,
        )

    def objective(self, encoder: ClipEncoder, on_encoded: OnEncoded | None = None) -> ClipObjective:
        """Return what is minimized; views that are to be kept and are not yet are encoded first."""
        config, cache = self.config, None
        if config.data.cache:
            cache = self._kept_views(encoder, on_encoded)
        draw = ClipDrawing(
            views=self.views,
            process=process_for(self.scheduler),
            noise_range=config.objective.noise_range,
            latent_scale=encoder.latent_scale,
            blanks=encoder.blanks(),
            rate_of=encoder.rate_of,
            condition_noise=config.objective.time_noise,
            token_shape=encoder.token_shape,
            cache=cache,
        )
        return ClipObjective(
            draw,
            draw.process,
            layout="first and last" if config.objective.interpolates else "every frame",
            condition_noise=config.objective.time_noise,
            encoder=None if cache else encoder,
        )

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of what is not trained."""
        # On a CPU bf16 is slower than fp32 where it is emulated, and memory is not what is short.
        is_small = self.config.settings.precision == "bf16" and torch.cuda.is_available()
        return torch.bfloat16 if is_small else torch.float32

    def _denoiser(self, parts: Mapping[str, Any]) -> DynamiCrafterDenoiser:
        unet: DynamiCrafterUNet = parts["unet"]
        groups = TRAINED_GROUPS.get(self.config.trains, (self.config.trains,))
        if "adapter" in groups and unet.temporal_adapter is None:
            unet.add_temporal_adapter(
                num_frames=self.config.data.num_frames, seed=self.config.settings.seed
            )
        return DynamiCrafterDenoiser(unet, parts["image_projector"])

    def _chosen(self, denoiser: nn.Module) -> Trained:
        config = self.config
        return choose_parameters(
            denoiser, DYNAMICRAFTER, config.trains, lora=config.lora, seed=config.settings.seed
        )

    def _validation(
        self, measures: Sequence[Measure], on_validated: OnValidated | None
    ) -> Validation | None:
        if self.config.validation is None:
            return None

        def measure(module: nn.Module, step: int) -> dict[str, Any]:
            figures: dict[str, Any] = {}
            for one in measures:
                figures |= one(module, step)
            if on_validated is not None:
                on_validated(step, figures)
            return figures

        return Validation(self.config.validation.every, measure)

    def _held_out_loss(self, encoder: ClipEncoder, objective: ClipObjective) -> HeldOutLoss:
        assert isinstance(objective.draw, ClipDrawing)
        draw = replace(
            objective.draw, views=self._held_views, noise_range=NoiseRange(), condition_noise=None
        )
        held = ClipObjective(
            draw,
            draw.process,
            layout=objective.layout,
            encoder=None if self.config.data.cache else encoder,
        )
        return HeldOutLoss(held, len(self.held_out))

    def _held_out_videos(
        self, pipeline: Any, encoder: ClipEncoder, measure: MeasureVideo
    ) -> HeldOutVideos:
        config, validation = self.config, self.config.validation
        assert validation is not None
        videos = prepare_videos(
            pipeline,
            self._held_views.every()[: validation.videos],
            rate_of=encoder.rate_of,
            num_steps=validation.video_steps,
            seed=config.settings.seed,
            interpolates=config.objective.interpolates,
        )
        return HeldOutVideos(
            pipeline,
            videos,
            folder=config.output,
            measure=measure,
            warn_below=validation.warn_below,
        )

    @cached_property
    def _held_views(self) -> TrainingViews:
        """One view of each shot that is held out, with its image and caption."""
        order = ClipOrder(max(1, len(self.held_out)))
        return replace(self.views, shots=self.held_out, num_views=1, order=order, drop=0.0)

    def _kept_views(self, encoder: ClipEncoder, on_encoded: OnEncoded | None) -> LatentsCache:
        """Encode what the cache lacks, each process its share."""
        data = self.config.data
        made_with = {
            **encoder.made_with,
            "dtype": str(self.frozen_dtype),
            "condition_frames": str(self.views.condition_frames),
            "views": str(self.views.settings.seed),
        }
        cache = LatentsCache(data.cache_folder or self.config.output / "views", made_with=made_with)
        # As `fit` will ask for it: without, processes on CPUs do not know of each other.
        state = PartialState(cpu=not torch.cuda.is_available())
        views = [*self.views.every(), *self._held_views.every()]
        mine = cache.survey(views).missing[state.process_index :: state.num_processes]
        if mine:
            encoder.to(state.device)
        for done, view in enumerate(mine, 1):
            cache.read_or_make(
                view,
                lambda view: encoder.encode(
                    view.read(),
                    view.shot.clip.caption,
                    condition_frames=self.views.frames_of(view),
                )._asdict(),
            )
            if on_encoded is not None and state.is_main_process:
                on_encoded(done, len(mine))
        encoder.to(torch.device("cpu"))
        state.wait_for_everyone()
        return cache

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What makes this run another than one with the same settings and weights."""
        config = self.config
        shots = [
            (*shot.key, shot.shot.end, shot.clip.caption, shot.shot.motion)
            for shot in self.views.shots
        ]
        shown = config.data.model_dump(
            mode="json", exclude={"folder", "manifest", "cache", "cache_folder"}
        )
        return {
            "clips": hashlib.sha256(json.dumps(shots).encode()).hexdigest(),
            "data": shown,
            "objective": config.objective.model_dump(mode="json"),
            "lora": None if config.lora is None else config.lora.model_dump(mode="json"),
        }
