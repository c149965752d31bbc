"""The switch: which expert denoises is decided at each call of the model, by its noise level.

One wrapper around the whole sampling, which adds a second around each call for the time being; both
are ComfyUI's own means. Loading is left to ComfyUI, as between two samplers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_sampling
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch

from .conditions import TRAINING_STEPS, share_of_noise
from .errors import NodeError
from .experts import KEY, Experts, experts_of

log = logging.getLogger(KEY)

STEP_CACHES = ("easycache",)
"""What step caches, which reuse outputs of earlier steps, are called in `transformer_options`."""


def sample_with_experts(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a sampling in which the experts of the MODEL take turns (ComfyUI's OUTER_SAMPLE wrapper).

    Afterwards, also after an exception, the guider is as it was.

    Raises:
        NodeError: The kind of noise is unknown, or an expert wants a guidance that the guider does
            not have.
    """
    guider = executor.class_obj
    experts = experts_of(guider.model_patcher)
    if experts is None:
        return executor(*args, **kwargs)
    sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
    before = guider.model_patcher, guider.model_options, guider.cfg
    try:
        guider.model_options = comfy.patcher_extension.copy_nested_dicts(guider.model_options)
        Turns(guider, experts, [float(sigma) for sigma in sigmas]).begin()
        return executor(*args, **kwargs)
    finally:
        guider.model_patcher, guider.model_options, guider.cfg = before


class Turns:
    """One sampling, in which experts take turns.

    Args:
        guider: What predicts the noise; its model is the one that reached the sampler.
        experts: The experts of that model.
        sigmas: The sampler's.
    """

    def __init__(self, guider: Any, experts: Experts, sigmas: Sequence[float]) -> None:
        self.guider = guider
        self.experts = experts
        self.sigmas = sigmas
        self.guidance = guider.cfg
        self.model_sampling = guider.model_patcher.get_model_object("model_sampling")
        self.patchers = experts.patchers(guider.model_patcher)
        self.current = self.due(sigmas[0])

    def begin(self) -> None:
        """Put the first expert in its place, and ourselves around each call of the model.

        We come first: a step cache that came before us would answer for an expert that is gone.
        """
        check_guidance(self.guider, self.experts)
        for line in idle_experts(self.experts, self.model_sampling, self.sigmas):
            log.warning(line)
        options = self.guider.model_options.setdefault("transformer_options", {})
        wrappers = options.setdefault("wrappers", {})
        predict = comfy.patcher_extension.WrappersMP.PREDICT_NOISE
        wrappers[predict] = {KEY: [self], **wrappers.get(predict, {})}
        self.guider.model_patcher = self.patchers[self.current]
        self._guide()

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict, with the expert that is due (ComfyUI's PREDICT_NOISE wrapper)."""
        x = kwargs["x"] if "x" in kwargs else args[0]
        sigma = kwargs["timestep"] if "timestep" in kwargs else args[1]
        due = self.due(float(sigma.max()))  # of several, the noisiest counts
        if due != self.current:
            self.current = due
            self._switch(x.shape)
        return executor(*args, **kwargs)

    def due(self, sigma: float) -> int:
        """Return the index of the expert that denoises at a sigma."""
        return due_at(self.experts, self.model_sampling, self.sigmas, sigma)

    def _switch(self, shape: Sequence[int]) -> None:
        """Let ComfyUI load the expert that is due, and go on with it."""
        guider = self.guider
        guider.model_patcher.cleanup()
        guider.model_patcher = self.patchers[self.current]
        guider.inner_model, guider.conds, guider.loaded_models = (
            comfy.sampler_helpers.prepare_sampling(
                guider.model_patcher, shape, guider.conds, guider.model_options
            )
        )
        guider.model_patcher.pre_run()
        options = guider.model_options["transformer_options"]
        for cache in (options[name] for name in STEP_CACHES if name in options):
            cache.reset()
        self._guide()

    def _guide(self) -> None:
        guidance = self.experts.experts[self.current].guidance
        self.guider.cfg = self.guidance if guidance is None else guidance


def noise_level(model_sampling: Any, sigma: float) -> float:
    """Return the share of noise in what the model sees at a sigma: 0 (clean) .. 1 (noise).

    Raises:
        NodeError: The model's kind of noise is unknown.
    """
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return min(max(sigma, 0.0), 1.0)
    scaled = (comfy.model_sampling.EPS, comfy.model_sampling.COSMOS_RFLOW)
    if isinstance(model_sampling, scaled):
        return share_of_noise(max(sigma, 0.0))
    names = " ".join(parent.__name__ for parent in type(model_sampling).__mro__)
    raise NodeError(
        f"The noise levels of this model are unknown: its sampling is {names}.",
        fix="Use a model of flow matching (Wan, LTX, HunyuanVideo), or one of noise (SVD).",
    )


def due_at(experts: Experts, model_sampling: Any, sigmas: Sequence[float], sigma: float) -> int:
    """Return the index of the expert that denoises at a sigma.

    Args:
        experts: The experts.
        model_sampling: The model's sampling, which says what a sigma is.
        sigmas: Those of the sampler, one more than steps.
        sigma: The sigma; between two of the sampler's it belongs to the step before.
    """
    level = noise_level(model_sampling, sigma)
    is_flow = isinstance(model_sampling, comfy.model_sampling.CONST)
    done = max(sum(one >= sigma for one in sigmas[:-1]) - 1, 0)
    return experts.due(
        noise_level=level,
        timestep=level * TRAINING_STEPS if is_flow else _timestep(model_sampling, sigma),
        step_fraction=done / max(len(sigmas) - 1, 1),
    )


def idle_experts(experts: Experts, model_sampling: Any, sigmas: Sequence[float]) -> list[str]:
    """Return a line for each expert that gets no step, with the noise levels."""
    steps = sigmas[:-1]
    if not steps:  # a start behind the last step
        return []
    busy = {due_at(experts, model_sampling, sigmas, sigma) for sigma in steps}
    levels = ", ".join(f"{noise_level(model_sampling, sigma):.3g}" for sigma in steps)
    return [
        f"`{expert.name}` gets no step: the noise levels are {levels}. Use more steps, another "
        "shift, or another boundary."
        for number, expert in enumerate(experts.experts)
        if number not in busy
    ]


def check_guidance(guider: Any, experts: Experts) -> None:
    """Check that the guider has the guidance that experts want.

    Raises:
        NodeError: It combines its predictions in a way of its own, or has no negative prompt.
    """
    wanted = {one.guidance for one in experts.experts if one.guidance is not None}
    if not wanted:
        return
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        raise NodeError(
            f"An expert has a cfg of its own, and a {type(guider).__name__} has another guidance.",
            fix="Set the cfg of the expert to 0, or use KSampler or CFGGuider.",
        )
    if wanted != {1.0} and "negative" not in guider.conds:
        raise NodeError(
            "An expert has a cfg of its own, and the guider has no negative prompt.",
            fix="Use CFGGuider instead of BasicGuider, or set the cfg of the expert to 0 or 1.",
        )


def _timestep(model_sampling: Any, sigma: float) -> float:
    return float(model_sampling.timestep(torch.tensor(sigma)))
