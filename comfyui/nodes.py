"""The nodes: each makes a MODEL that carries experts, or shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from .errors import NodeError
from .experts import Expert, experts_of, flattened, with_experts, without_experts
from .recipes import experts_of_recipe
from .switching import due_at, idle_experts, noise_level, sample_with_experts
from .task_vectors import check_same_settings, check_same_weights, lora_patch, model_patch

CATEGORY = "motionmerge"
NO_LORA = "(none)"
ExpertList = io.Custom("MOTIONMERGE_EXPERTS")

_CFG = "The cfg while this expert denoises, instead of the sampler's; 0 keeps the sampler's."
_BOUNDARY = (
    "Noise level at which the expert changes: 1 is noise, 0 is clean. In a flow model such as Wan "
    "it is sigma. Wan 2.2 changes its own models at 0.9 (image to video) or 0.875."
)


def cfg_input(name: str) -> Any:
    """Return the input for an expert's guidance."""
    return io.Float.Input(name, default=0.0, min=0.0, max=100.0, step=0.1, tooltip=_CFG)


def level_input(name: str, default: float, tooltip: str = _BOUNDARY) -> Any:
    """Return the input for a noise level."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.005, tooltip=tooltip)


def motion_input() -> Any:
    """Return the input for how far to go from the weights that make videos static."""
    return io.Float.Input(
        "motion",
        default=0.25,
        min=-2.0,
        max=2.0,
        step=0.05,
        tooltip="How far to go away from the LoRA or the fine-tuned model while it is noisy: 0 is "
        "the base's motion, -1 that of the fine-tuned weights. A larger value moves more, and too "
        "large a one breaks the video.",
    )


def or_none(cfg: float) -> float | None:
    """Return the guidance that an input means; None for 0, the sampler's own."""
    return cfg or None


def above(boundary: float) -> tuple[tuple[str, float], ...]:
    """Return the condition of what denoises above a noise level."""
    return (("above", boundary),)


class MotionKnobLora(io.ComfyNode):
    """-motion times a LoRA while it is noisy, all of it for the details."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return what ComfyUI shows of the node."""
        return io.Schema(
            node_id="MotionMergeKnobLora",
            display_name="Motion Knob (LoRA)",
            category=CATEGORY,
            description="More motion from a model with a LoRA that makes videos static: away from "
            "the LoRA while it is noisy, all of it for the details, in one sampler.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "lora",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="The LoRA that makes videos static: your own, or a distilled one.",
                ),
                motion_input(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Strength of the LoRA below the boundary.",
                ),
                level_input("boundary", 0.875),
                cfg_input("cfg_noisy"),
                cfg_input("cfg_details"),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        lora: str,
        motion: float,
        strength: float,
        boundary: float,
        cfg_noisy: float,
        cfg_details: float,
    ) -> Any:
        """Return the MODEL with both experts."""
        noisy, details = lora_patch(model, lora, -motion), lora_patch(model, lora, strength)
        experts = (
            Expert(
                name="dynamics",
                conditions=above(boundary),
                model=model,
                patches=(noisy,) if motion else (),
                guidance=or_none(cfg_noisy),
            ),
            Expert(
                name="consistency",
                model=model,
                patches=(details,) if strength else (),
                guidance=or_none(cfg_details),
            ),
        )
        return io.NodeOutput(with_experts(model, experts, sample=sample_with_experts))


class MotionKnobCheckpoints(io.ComfyNode):
    """base - motion * (tuned - base) while it is noisy, tuned for the details."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return what ComfyUI shows of the node."""
        return io.Schema(
            node_id="MotionMergeKnobCheckpoints",
            display_name="Motion Knob (checkpoints)",
            category=CATEGORY,
            description="More motion from a fine-tuned model: base - motion * (tuned - base) while "
            "it is noisy, the fine-tuned model for the details.",
            inputs=[
                io.Model.Input("tuned", tooltip="The fine-tuned model."),
                io.Model.Input("base", tooltip="The model that it was fine-tuned from."),
                motion_input(),
                level_input("boundary", 0.875),
                cfg_input("cfg_noisy"),
                cfg_input("cfg_details"),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        tuned: Any,
        base: Any,
        motion: float,
        boundary: float,
        cfg_noisy: float,
        cfg_details: float,
    ) -> Any:
        """Return the fine-tuned MODEL with both experts."""
        if experts_of(base) is not None:
            raise NodeError(
                "`base` has experts, so that it is not one set of weights.",
                fix="Connect the model itself.",
            )
        away = model_patch(tuned, base, keeps=-motion, strength=1 + motion)
        experts = (
            Expert(
                name="dynamics",
                conditions=above(boundary),
                model=tuned,
                patches=(away,),
                guidance=or_none(cfg_noisy),
            ),
            Expert(name="consistency", model=tuned, guidance=or_none(cfg_details)),
        )
        return io.NodeOutput(with_experts(tuned, experts, sample=sample_with_experts))


class SwitchAtNoiseLevel(io.ComfyNode):
    """One model above a noise level, another below it, in one sampler."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return what ComfyUI shows of the node."""
        return io.Schema(
            node_id="MotionMergeSwitch",
            display_name="Switch at Noise Level",
            category=CATEGORY,
            description="A pair such as Wan 2.2's in one sampler: one model above the boundary, "
            "the other below it. Either may have a Motion Knob.",
            inputs=[
                io.Model.Input("high", tooltip="The model for high noise."),
                io.Model.Input("low", tooltip="The model for low noise."),
                level_input("boundary", 0.9),
                cfg_input("cfg_high"),
                cfg_input("cfg_low"),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, high: Any, low: Any, boundary: float, cfg_high: float, cfg_low: float) -> Any:
        """Return the MODEL for high noise with the experts of both."""
        check_same_weights(high, low, fix="Use the two models of one pair.")
        check_same_settings(high, low)
        halves = (
            Expert(name="high", conditions=above(boundary), model=high, guidance=or_none(cfg_high)),
            Expert(name="low", model=low, guidance=or_none(cfg_low)),
        )
        experts = [expert for half in halves for expert in flattened(half.model, half)]
        made = with_experts(
            without_experts(high),
            experts,
            sample=sample_with_experts,
            is_pair=len(experts) == len(halves),
        )
        return io.NodeOutput(made)


class LoraExpert(io.ComfyNode):
    """One expert of several: a LoRA with a weight, down to a noise level."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return what ComfyUI shows of the node."""
        return io.Schema(
            node_id="MotionMergeExpert",
            display_name="Expert",
            category=CATEGORY,
            description="One expert for Apply Experts: a LoRA, of either sign, while the noise "
            "level is higher than `above`. Several with the same `above` add up.",
            inputs=[
                io.Combo.Input(
                    "lora",
                    options=[NO_LORA, *folder_paths.get_filename_list("loras")],
                    tooltip=f"The LoRA of this expert; {NO_LORA} is the model itself.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="What the LoRA is multiplied by; below 0 goes away from it.",
                ),
                level_input(
                    "above", 0.0, "It denoises while the noise level is above this; 0 for the last."
                ),
                cfg_input("cfg"),
                ExpertList.Input("experts", optional=True, tooltip="Experts before this one."),
            ],
            outputs=[ExpertList.Output()],
        )

    @classmethod
    def execute(
        cls,
        lora: str,
        weight: float,
        above: float,
        cfg: float,
        experts: Sequence[LoraWeight] = (),
    ) -> Any:
        """Return the experts so far and this one."""
        return io.NodeOutput((*experts, LoraWeight(lora, weight, above, cfg)))


class ApplyExperts(io.ComfyNode):
    """Three or more experts of LoRAs on one MODEL."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return what ComfyUI shows of the node."""
        return io.Schema(
            node_id="MotionMergeApplyExperts",
            display_name="Apply Experts",
            category=CATEGORY,
            description="Let a chain of Expert nodes take turns on a model, from noisy to clean.",
            inputs=[io.Model.Input("model"), ExpertList.Input("experts")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, experts: Sequence[LoraWeight]) -> Any:
        """Return the MODEL with all experts."""
        levels = sorted({one.above for one in experts}, reverse=True)
        if not levels or levels[-1] != 0:
            raise NodeError(
                f"The last expert ends at noise level {levels[-1] if levels else 1:g}, so that "
                "some steps have no expert.",
                fix="Add an Expert with `above` 0; its LoRA may be (none).",
            )
        made = [
            expert_of([one for one in experts if one.above == level], model) for level in levels
        ]
        return io.NodeOutput(with_experts(model, made, sample=sample_with_experts))


class RecipeExperts(io.ComfyNode):
    """The experts and the schedule of a motionmerge recipe."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return what ComfyUI shows of the node."""
        return io.Schema(
            node_id="MotionMergeRecipe",
            display_name="Recipe",
            category=CATEGORY,
            description="The experts of a motionmerge recipe: DARE, groups of parameters, several "
            "task vectors. Needs the package motionmerge.",
            inputs=[
                io.Model.Input("model", tooltip="The recipe's input `memory:base`."),
                io.String.Input(
                    "recipe",
                    default="lora-rescue",
                    multiline=True,
                    tooltip="The name of a recipe that ships with motionmerge, or the text of one.",
                ),
                io.String.Input(
                    "values",
                    default="motion: 0.25\nstyle: FILE.safetensors",
                    multiline=True,
                    tooltip="A line for each parameter, and for each input its file in loras or "
                    "diffusion_models, or `model`.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, recipe: str, values: str) -> Any:
        """Return the MODEL with the recipe's experts."""
        experts = experts_of_recipe(model, recipe, values)
        return io.NodeOutput(with_experts(model, experts, sample=sample_with_experts))


class ShowSchedule(io.ComfyNode):
    """Which expert has which step, as text."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return what ComfyUI shows of the node."""
        return io.Schema(
            node_id="MotionMergeShowSchedule",
            display_name="Show Schedule",
            category=CATEGORY,
            description="Show which expert denoises at each step, with its guidance, and warn of "
            "experts that get none. SIGMAS come from BasicScheduler.",
            inputs=[
                io.Model.Input("model", tooltip="The model that goes to the sampler."),
                io.Sigmas.Input("sigmas", tooltip="Those of BasicScheduler, set as the sampler."),
            ],
            outputs=[io.String.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, sigmas: Any) -> Any:
        """Return a line for each step, and one for each expert that gets none."""
        experts = experts_of(model)
        if experts is None:
            raise NodeError(
                "This MODEL has no experts.",
                fix="Connect the MODEL of a node of the category motionmerge, e.g. Motion Knob.",
            )
        sampling = model.get_model_object("model_sampling")
        levels = [float(sigma) for sigma in sigmas]
        lines = []
        for step, sigma in enumerate(levels[:-1], start=1):
            expert = experts.experts[due_at(experts, sampling, levels, sigma)]
            cfg = "" if expert.guidance is None else f", cfg {expert.guidance:g}"
            lines.append(f"{step:2}  {noise_level(sampling, sigma):.3f}  {expert.name}{cfg}")
        lines += [f"Warning: {line}" for line in idle_experts(experts, sampling, levels)]
        text = "\n".join(lines)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


@dataclass(frozen=True)
class LoraWeight:
    """What an Expert node says.

    Attributes:
        lora: The LoRA's file; `NO_LORA` for the model itself.
        weight: What the LoRA is multiplied by.
        above: The noise level down to which it denoises.
        cfg: Its guidance; 0 for the sampler's.
    """

    lora: str
    weight: float
    above: float
    cfg: float


def expert_of(weights: Sequence[LoraWeight], model: Any) -> Expert:
    """Return the expert of all that denoises down to one noise level.

    Raises:
        NodeError: They want different guidances, or a LoRA does not fit.
    """
    cfgs = {one.cfg for one in weights} - {0}
    if len(cfgs) > 1:
        raise NodeError(
            f"The experts above {weights[0].above:g} are one, and want the cfgs {sorted(cfgs)}.",
            fix="Set the same cfg, or 0, in all of them.",
        )
    used = [one for one in weights if one.lora != NO_LORA and one.weight]
    return Expert(
        name=" + ".join(f"{one.weight:g} {one.lora}" for one in used) or "the model",
        conditions=above(weights[0].above) if weights[0].above else (),
        model=model,
        patches=tuple(lora_patch(model, one.lora, one.weight) for one in used),
        guidance=or_none(max(cfgs, default=0)),
    )


NODES = [
    MotionKnobLora,
    SwitchAtNoiseLevel,
    ShowSchedule,
    MotionKnobCheckpoints,
    LoraExpert,
    ApplyExperts,
    RecipeExperts,
]
