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
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.atomic import check_folder, prepare_folder
from motionmerge.memory import return_freed_memory
from motionmerge.rng import whole_number_for
from motionmerge.sampling.families.limits import Limits, VideoFamily
from motionmerge.sampling.request.folder import PipelineFolder, find_pipeline
from motionmerge.sampling.request.loading import load_scheduler
from motionmerge.sampling.videos.make_video import family_and_limits

from .clip_batches import ClipDrawing, ConditionFrames, TrainingViews
from .clip_encoder import ClipEncoder, is_told_strides
from .clip_objective import ClipObjective
from .clips_folder import LeftOut
from .clips_manifest import read_clips_manifest
from .held_out import HeldOutLoss
from .held_out_videos import HeldOutVideo, HeldOutVideos, MeasureVideo, videos_of_views
from .latents_cache import LatentsCache
from .motion_balance import flattening_weights
from .objectives.choice import process_for
from .parameters import Trained, choose_parameters
from .run_config import RunConfig
from .run_model import (
    RunModel,
    check_model,
    drop_share,
    empty_denoiser,
    groups_of,
    load_model,
    num_videos,
)
from .run_result import RunResult, check_output, write_result
from .samples import ClipOrder, NoiseRange, shares_within
from .settings import Measure, TrainingProgress, TrainingResult, Validation
from .trainer import fit, no_share
from .views import TrainingShot, own_frame_stride, usable_shots, whole_frame_rate

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
    if config.model == "pocket" and not Path("pocket").exists():
        raise ConfigError(
            "The pocket model is trained on its own drawn clips, not on files.",
            fix="Train `pocket-tuned` or another of its configurations, or give `model` a folder.",
        )
    folder = find_pipeline(config.model)
    check_model(folder, config)
    check_output(config.output, model=folder.path, clips=data.folder)
    if data.cache_folder is not None:
        check_folder(data.cache_folder)
    if config.settings.batch_size % config.settings.accumulate:
        raise no_share(config.settings, 1)
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
        condition_frames=_condition_frames(folder, config),
        order=ClipOrder(len(shots), weights),
        seed=seed,
        drop=drop_share(folder, config),
        drop_caption=config.objective.drop_caption,
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


def _condition_frames(folder: PipelineFolder, config: RunConfig) -> ConditionFrames:
    if config.objective.interpolates or folder.family.name != "dynamicrafter":
        return "first"
    return config.data.condition_frames or 4


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

    @property
    def num_videos(self) -> int:
        """Of how many held-out clips a validation makes a video."""
        return num_videos(self.config)

    def count_parameters(self) -> tuple[Trained, int]:
        """Choose the trained parameters without memory for them; also returns how many there are.

        Raises:
            ConfigError: As `choose_parameters`.
        """
        denoiser = empty_denoiser(self.folder, self.config)
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
        model = load_model(self.folder, config, dtype=self.frozen_dtype)
        denoiser, new_base = model.denoiser, model.new_base
        trained = self._chosen(denoiser)
        objective = self.objective(model, on_encoded)
        measures: list[Measure] = []
        if config.validation is not None:
            measures.append(self._held_out_loss(model, objective))
            if self.num_videos and measure_video is not None:
                measures.append(self._held_out_videos(model, measure_video))
        if config.data.cache:
            del model  # its encoders are large, and have done their work
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
            new_base=new_base,
            is_lora=config.lora is not None,
        )

    def objective(self, model: RunModel, on_encoded: OnEncoded | None = None) -> ClipObjective:
        """Return what is minimized; views that are to be kept and are not yet are encoded first."""
        config, encoder, cache = self.config, model.encoder, None
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
            given_frames=model.given_frames,
        )

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of what is not trained."""
        # On a CPU bf16 is slower than fp32 where it is emulated, and memory is not what is short.
        is_small = self.config.settings.precision == "bf16" and torch.cuda.is_available()
        return torch.bfloat16 if is_small else torch.float32

    def _chosen(self, denoiser: nn.Module) -> Trained:
        config = self.config
        return choose_parameters(
            denoiser,
            groups_of(self.folder),
            config.trains,
            lora=config.lora,
            seed=config.settings.seed,
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
            # Of a sharded network every process measures, and the first alone sees the videos.
            if on_validated is not None and PartialState().is_main_process:
                on_validated(step, figures)
            return figures

        return Validation(self.config.validation.every, measure)

    def _held_out_loss(self, model: RunModel, objective: ClipObjective) -> HeldOutLoss:
        assert isinstance(objective.draw, ClipDrawing)
        draw = replace(
            objective.draw, views=self._held_views, noise_range=NoiseRange(), condition_noise=None
        )
        held = ClipObjective(
            draw,
            draw.process,
            layout=objective.layout,
            encoder=None if self.config.data.cache else model.encoder,
            given_frames=model.given_frames,
        )
        return HeldOutLoss(held, len(self.held_out))

    def _held_out_videos(self, model: RunModel, measure: MeasureVideo) -> HeldOutVideos:
        config, validation = self.config, self.config.validation
        assert validation is not None
        return HeldOutVideos(
            model.pipeline,
            self.videos_with(*family_and_limits(model.pipeline)),
            folder=config.output,
            measure=measure,
            warn_below=validation.warn_below,
        )

    def videos_with(self, family: VideoFamily, limits: Limits) -> list[HeldOutVideo]:
        """Return the videos that a validation makes.

        Args:
            family, limits: Of the pipeline that makes them.

        Raises:
            DataError: A clip cannot be read any more.
        """
        config = self.config
        if config.validation is None:
            return []
        return videos_of_views(
            self._held_views.every()[: self.num_videos],
            family,
            limits,
            rate_of=own_frame_stride if self._is_told_strides else whole_frame_rate,
            num_steps=config.validation.video_steps,
            seed=config.settings.seed,
            interpolates=config.objective.interpolates,
        )

    @property
    def _is_told_strides(self) -> bool:
        return self.folder.family.name == "dynamicrafter" and is_told_strides(self.scheduler)

    @cached_property
    def _held_views(self) -> TrainingViews:
        """One view of each shot that is held out, with its image and caption."""
        order = ClipOrder(max(1, len(self.held_out)))
        return replace(
            self.views, shots=self.held_out, num_views=1, order=order, drop=0.0, drop_caption=0.0
        )

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
                    view, view.read(), condition_frames=self.views.frames_of(view)
                ).tensors(),
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
            "data": shown | {"condition_frames": self.views.condition_frames},
            "objective": config.objective.model_dump(mode="json") | {"drop": self.views.drop},
            "lora": None if config.lora is None else config.lora.model_dump(mode="json"),
        }
