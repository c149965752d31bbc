"""What the noise level of a timestep is, for every scheduler of diffusers 0.42 by its arithmetic.

A noise level is the weight of the noise in what the denoiser sees, once the weights of noise and
signal are scaled to sum to 1: 0 is clean, 1 is noise. Of a scheduler that mixes them as

    x = signal * x0 + noise * n            level = noise / (signal + noise)

this is `sigma` in flow matching (signal = 1 - sigma), `sigma / (1 + sigma)` where signal is 1 or
both are scaled alike (EDM, variance exploding and preserving), and so on; a row of `_RULES` a kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from motionmerge.conditions import share_of_noise
from motionmerge.errors import ConfigError
from motionmerge.lazy_torch import torch

Array = npt.NDArray[np.float64]
Rule = Callable[[Any, float, "int | None"], float]
"""Computes a level from a scheduler, a timestep, and the index of the step if that is known."""

_STEP_FRACTION = (
    "write the schedule with `step_fraction`, e.g. `{expert: NAME, step_fraction: 0.5}`."
)


def noise_level(scheduler: Any, timestep: float | torch.Tensor) -> float:
    """Return the share of noise in what the denoiser sees: 0 (clean) .. 1 (noise).

    Args:
        scheduler: A scheduler of diffusers or of ours, after `set_timesteps`.
        timestep: In the scheduler's own unit. Of a tensor with several values (one per token, per
            sample, per modality) the noisiest counts: tokens of a given frame are clean.

    Raises:
        ConfigError: The scheduler's class has no noise levels, or none that we know, its timesteps
            are not set, or the timestep is not a finite number.
    """
    rule = _rule_of(scheduler)
    value = noisiest(scheduler, timestep)
    if not math.isfinite(value):
        raise ConfigError(f"The timestep is {value}.", fix="Pass a finite timestep.")
    return float(min(max(rule(scheduler, value, _index_of(scheduler, value)), 0.0), 1.0))


def level_of_step(scheduler: Any, index: int) -> float:
    """Return the noise level of a step by its index, where two steps may have one timestep.

    Raises:
        ConfigError: As `noise_level`.
    """
    rule = _rule_of(scheduler)
    value = float(torch.as_tensor(scheduler.timesteps[index]))
    return float(min(max(rule(scheduler, value, index), 0.0), 1.0))


def noisiest(scheduler: Any, timesteps: float | torch.Tensor) -> float:
    """Return the timestep of the most noise: the largest, or the smallest where they count up."""
    values = torch.as_tensor(timesteps).detach().double()
    return float(values.min() if counts_up(scheduler) else values.max())


def counts_up(scheduler: Any) -> bool:
    """Check whether timesteps grow while noise goes: MiniMax-H3's, and Mochi's inverted flow."""
    names = {parent.__name__ for parent in type(scheduler).__mro__}
    return "MiniMaxH3Scheduler" in names or bool(_config(scheduler).get("invert_sigmas", False))


def is_flow(scheduler: Any) -> bool:
    """Check whether the sigmas of a scheduler are noise levels themselves, of at most 1."""
    config = _config(scheduler)
    if config.get("use_flow_sigmas", False):
        return True
    names = [parent.__name__ for parent in type(scheduler).__mro__]
    return next((_RULES[name] in (_flow, _one_minus) for name in names if name in _RULES), False)


def denoises_in_stages(scheduler: Any) -> bool:
    """Check whether a video is denoised at several resolutions, each with timesteps of its own."""
    names = {parent.__name__ for parent in type(scheduler).__mro__}
    is_helios = not names.isdisjoint({"HeliosScheduler", "HeliosDMDScheduler"})
    return is_helios and _config(scheduler).get("stages", 1) > 1


def _config(scheduler: Any) -> Any:
    return getattr(scheduler, "config", None) or {}


def _numbers(values: Any) -> Array:
    return np.asarray(torch.as_tensor(values).detach().cpu(), dtype=np.float64)


def _grid(scheduler: Any) -> tuple[Array, Array]:
    """Read the timesteps of a scheduler, and the sigma of each.

    Raises:
        ConfigError: They are not set.
    """
    timesteps, sigmas = (getattr(scheduler, name, None) for name in ("timesteps", "sigmas"))
    if timesteps is None or sigmas is None or not 0 < len(timesteps) <= len(sigmas):
        raise ConfigError(
            f"The timesteps of this {type(scheduler).__name__} are not set, so that their noise "
            "levels are unknown.",
            fix="Call `scheduler.set_timesteps(n)` first.",
        )
    grid = _numbers(timesteps)
    return grid, _numbers(sigmas)[: len(grid)]


def _index_of(scheduler: Any, value: float) -> int | None:
    """Find the first step with exactly this timestep; None if there is none."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not len(timesteps):
        return None
    found = np.flatnonzero(np.isclose(_numbers(timesteps), value, rtol=1e-6, atol=1e-9))
    return int(found[0]) if len(found) else None


# The rules. Where the timestep alone decides, the arrays of the scheduler are not looked at.


def _alphas(scheduler: Any, value: float, index: int | None) -> float:
    """Compute signal = sqrt(abar[t]), noise = sqrt(1 - abar[t]); t is a whole number."""
    abar = scheduler.alphas_cumprod
    signal = float(abar[min(max(round(value), 0), len(abar) - 1)])
    return share_of_noise(math.sqrt(1 - signal), math.sqrt(signal))


def _alphas_between(scheduler: Any, value: float, index: int | None) -> float:
    """Compute the same for any t: log sigma is interpolated, as such schedulers do."""
    abar = _numbers(scheduler.alphas_cumprod).clip(1e-12, 1.0)
    sigmas = np.sqrt((1 - abar) / abar).clip(1e-12)
    return share_of_noise(math.exp(np.interp(value, np.arange(len(abar)), np.log(sigmas))))


def _two_calls(scheduler: Any, value: float, index: int | None) -> float:
    """Use `_sigmas` at the first call of a step; the second is at a sigma between two of these."""
    is_set = getattr(scheduler, "num_inference_steps", None) is not None
    if is_set and index is not None and index % 2 == 0:
        return share_of_noise(float(scheduler.sigmas[index]))
    return _alphas_between(scheduler, value, index)


def _sigmas(scheduler: Any, value: float, index: int | None) -> float:
    """Compute signal : noise = 1 : sigma at the steps, by abar between; or a configured flow."""
    config = _config(scheduler)
    if config.get("use_flow_sigmas", False):
        return _flow(scheduler, value, index)
    is_log = config.get("timestep_type") == "continuous"
    if is_log and config.get("prediction_type") == "v_prediction":  # SVD
        return _log_sigma(scheduler, value, index)
    # Before `set_timesteps` some of these have all sigmas, in the order of training.
    if index is not None and getattr(scheduler, "num_inference_steps", None) is not None:
        return share_of_noise(float(scheduler.sigmas[index]))
    return _alphas_between(scheduler, value, index)


def _flow(scheduler: Any, value: float, index: int | None) -> float:
    """Compute signal = 1 - sigma, noise = sigma.

    Cosmos gives a flow scheduler the sigmas of EDM, which are told by being above 1. Mochi's run
    from 0, noise, to 1.
    """
    grid, sigmas = _grid(scheduler)
    is_inverted = bool(_config(scheduler).get("invert_sigmas", False))
    if sigmas.max() > 1 + 1e-6:
        levels = sigmas / (1 + sigmas)
    else:
        levels = 1 - sigmas if is_inverted else sigmas
    if index is not None:
        return float(levels[index])
    clean = float(_config(scheduler).get("num_train_timesteps", 1000)) if is_inverted else 0.0
    grid, levels = np.append(grid, clean), np.append(levels, 0.0)
    order = np.argsort(grid, kind="stable")
    return float(np.interp(value, grid[order], levels[order]))


def _one_minus(scheduler: Any, value: float, index: int | None) -> float:
    """Compute signal = t, noise = 1 - t (MiniMax-H3)."""
    return 1 - value


def _log_sigma(scheduler: Any, value: float, index: int | None) -> float:
    """Compute sigma from t = log(sigma) / 4 (EDM, SVD)."""
    return share_of_noise(math.exp(min(4 * value, 80.0)))


def _log_sigma_of_1000(scheduler: Any, value: float, index: int | None) -> float:
    """Compute sigma from t = 1000 * log(sigma) / 4 (consistency models)."""
    return _log_sigma(scheduler, value / 1000, index)


def _arctangent(scheduler: Any, value: float, index: int | None) -> float:
    """Compute noise / signal from t = 2 / pi * arctan(noise / signal) (cosine DPM, IPNDM)."""
    return _angle(scheduler, value * math.pi / 2, index)


def _angle(scheduler: Any, value: float, index: int | None) -> float:
    """Compute signal = cos t, noise = sin t, both of data as wide as the noise (TrigFlow)."""
    angle = min(max(value, 0.0), math.pi / 2)
    return share_of_noise(math.sin(angle), math.cos(angle))


def _exploding(scheduler: Any, value: float, index: int | None) -> float:
    """Compute sigma = least * (most / least) ** t (score SDE)."""
    config = _config(scheduler)
    least, most = config["sigma_min"], config["sigma_max"]
    return share_of_noise(least * (most / least) ** value)


def _cosine(scheduler: Any, value: float, index: int | None) -> float:
    """Compute abar by the cosine of (t + s) / (1 + s) * pi / 2, as Wuerstchen has it."""
    config = _config(scheduler)
    scaler, s = config["scaler"], config["s"]
    if scaler > 1:
        value = 1 - (1 - value) ** scaler
    elif scaler < 1:
        value = value**scaler
    first, here = (math.cos((t + s) / (1 + s) * math.pi / 2) ** 2 for t in (0.0, value))
    abar = min(max(here / first, 1e-4), 1 - 1e-4)
    return share_of_noise(math.sqrt(1 - abar), math.sqrt(abar))


def _stages(scheduler: Any, value: float, index: int | None) -> float:
    """Compute noise = end + sigma * (start - end), of the stage that the timestep lies in (Helios).

    Each stage has a resolution of its own, and sigmas of its own from 1 to 0. Its video is on a
    line from one with the noise of the stage's start to one with that of its end.
    """
    if not denoises_in_stages(scheduler):
        return _flow(scheduler, value, index)
    if index is None and not getattr(scheduler, "num_inference_steps", None):
        _grid(scheduler)
    ends = scheduler.timesteps_per_stage
    lows = [float(ends[stage][-1]) for stage in range(len(ends))]
    stage = next((number for number, low in enumerate(lows) if value >= low - 1e-6), len(lows) - 1)
    high, low = float(ends[stage][0]), lows[stage]
    own = scheduler.sigmas_per_stage[stage]
    if index is not None and getattr(scheduler, "num_inference_steps", None):
        sigma = float(scheduler.sigmas[index])
    else:
        sigma = float(np.interp(value, [low, high], [float(own[-1]), float(own[0])]))
    start, end = scheduler.start_sigmas[stage], scheduler.end_sigmas[stage]
    return float(end + sigma * (start - end))


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "CogVideoXDDIMScheduler",
            "CogVideoXDPMScheduler",
            "DDIMInverseScheduler",
            "DDIMParallelScheduler",
            "DDIMScheduler",
            "DDPMParallelScheduler",
            "DDPMScheduler",
            "DynamicRescaleDDIMScheduler",
            "LCMScheduler",
            "PNDMScheduler",
            "RePaintScheduler",
            "TCDScheduler",
            "UnCLIPScheduler",
        ),
        _alphas,
    ),
    **dict.fromkeys(
        ("DPMSolverSDEScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
        _two_calls,
    ),
    **dict.fromkeys(
        (
            "DEISMultistepScheduler",
            "DPMSolverMultistepInverseScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "LMSDiscreteScheduler",
            "SASolverScheduler",
            "UniPCMultistepScheduler",
        ),
        _sigmas,
    ),
    **dict.fromkeys(
        (
            "FlowMapEulerDiscreteScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "FlowMatchLCMScheduler",
            "LTXEulerAncestralRFScheduler",
            "PiflowScheduler",
        ),
        _flow,
    ),
    "MiniMaxH3Scheduler": _one_minus,
    "HeliosScheduler": _stages,
    "HeliosDMDScheduler": _stages,
    "EDMDPMSolverMultistepScheduler": _log_sigma,
    "EDMEulerScheduler": _log_sigma,
    "CMStochasticIterativeScheduler": _log_sigma_of_1000,
    "CosineDPMSolverMultistepScheduler": _arctangent,
    "IPNDMScheduler": _arctangent,
    "SCMScheduler": _angle,
    "ScoreSdeVeScheduler": _exploding,
    "DDPMWuerstchenScheduler": _cosine,
}

_TOKENS = "draws tokens, which are never mixed with noise"
_NO_LEVEL: dict[str, str] = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "ConsistencyDecoderScheduler": "decodes latents in two fixed steps",
    "KarrasVeScheduler": "numbers its steps, and tells its denoiser another sigma than its own",
    "RFD4ProteinaScheduler": "has two times at once",
    "ScoreSdeVpScheduler": "keeps no noise schedule",
}
"""Why a class has no noise levels."""

_OURS = ("diffusers", "motionmerge")


def _rule_of(scheduler: Any) -> Rule:
    """Find the rule of a scheduler's class, or of the class whose arithmetic it inherits.

    Raises:
        ConfigError: There is none.
    """
    name = type(scheduler).__name__
    changed: set[str] = set()
    for parent in type(scheduler).__mro__:
        is_known = parent.__module__.partition(".")[0] in _OURS
        if is_known and parent.__name__ in _NO_LEVEL:
            reason = f"{parent.__name__} {_NO_LEVEL[parent.__name__]}"
            raise ConfigError(f"{reason}, so its steps have no noise level.", fix=_STEP_FRACTION)
        if is_known and parent.__name__ in _RULES:
            own = {method for method in changed if hasattr(parent, method)}
            if not own:
                return _RULES[parent.__name__]
            raise ConfigError(
                f"{name} is a {parent.__name__} with a {', '.join(sorted(own))} of its own, so its "
                "noise levels are unknown.",
                fix=_STEP_FRACTION,
            )
        changed |= {
            key
            for key, value in vars(parent).items()
            if not key.startswith("__") and (callable(value) or isinstance(value, property))
        }
    raise ConfigError(
        f"The noise levels of a {name} are unknown: it is no scheduler of diffusers 0.42.",
        fix=_STEP_FRACTION,
    )
