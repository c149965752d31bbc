"""Which noise process a pipeline's scheduler stands for."""

from __future__ import annotations

from typing import Any

from motionmerge.errors import ConfigError
from motionmerge.noise_levels import counts_up, denoises_in_stages, is_flow

from .edm import ContinuousSigmas
from .flow import StraightLines
from .noised import NoiseProcess
from .vp import VariancePreserving


def process_for(scheduler: Any) -> NoiseProcess:
    """Return the noise process whose denoiser the scheduler samples with.

    Flow matching is shifted as the scheduler shifts; where it shifts by the size of the video, all
    sigmas come equally often.

    Raises:
        ConfigError: The scheduler's arithmetic is none of those that we train for.
    """
    config = scheduler.config
    if not (counts_up(scheduler) or denoises_in_stages(scheduler)):
        if is_flow(scheduler):
            shift = config.get("flow_shift", config.get("shift", 1.0)) or 1.0
            if config.get("use_dynamic_shifting", False):
                shift = 1.0
            return StraightLines(shift=shift, num_timesteps=config.num_train_timesteps)
        if config.get("timestep_type") == "continuous":
            if config.prediction_type == "v_prediction":
                return ContinuousSigmas()
        elif hasattr(scheduler, "alphas_cumprod"):
            return VariancePreserving(scheduler)
    raise ConfigError(
        f"Training for a {type(scheduler).__name__} with these settings is unknown.",
        fix="Train a family whose scheduler is DDIM's, SVD's Euler, or flow matching's.",
    )
