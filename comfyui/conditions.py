# A copy of src/motionmerge/conditions.py, made by tests/comfyui_pack/test_shared.py.
"""What a share of noise is, and when a condition of a schedule holds: arithmetic without imports.

The node pack for ComfyUI carries a copy of this file, so that both mean the same.
"""

from __future__ import annotations

from math import isinf

CONDITIONS = ("above", "timestep", "step_fraction")
"""What an entry of a schedule may be limited by."""

TRAINING_STEPS = 1000
"""Timesteps of the schedulers of flow models: their timestep is the noise level times this."""


def share_of_noise(noise: float, signal: float = 1.0) -> float:
    """Return the weight of the noise, once those of noise and signal are scaled to sum to 1."""
    return 1.0 if isinf(noise) else noise / (noise + signal)


def holds(
    condition: str, threshold: float, *, noise_level: float, timestep: float, step_fraction: float
) -> bool:
    """Check a condition of a schedule at one step.

    Args:
        condition: One of `CONDITIONS`.
        threshold: `above` and `timestep` hold strictly above it, `step_fraction` strictly below.
        noise_level: 0 (clean) .. 1 (noise), of the step's input.
        timestep: The scheduler's own value.
        step_fraction: Steps already done / all steps, in [0, 1).
    """
    if condition == "above":
        return noise_level > threshold
    if condition == "timestep":
        return timestep > threshold
    return step_fraction < threshold
