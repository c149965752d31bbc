"""Which knobs of a schedule each family of pipelines has, as data; what is not there is refused.

Read from diffusers 0.42 and tried on tiny models of every family; docs/how-to/knobs.md shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from motionmerge.errors import ConfigError
from motionmerge.knobs import MotionAmplitude
from motionmerge.models.video_pipeline import Config
from motionmerge.schedule import ExpertSchedule
from motionmerge.switching.attention_bias import (
    SelfAttention,
    tokens_of_ltx,
    tokens_of_patches,
)
from motionmerge.switching.condition_image import (
    Arguments,
    BesideLatents,
    ImagePlace,
    InArgument,
    InFirstFrame,
    InFirstFrameChannelsLast,
    InFirstTokens,
)

Configs = Mapping[str, Config]
"""The configuration of each part of a pipeline by its name, and of the pipeline itself as `""`."""

GUIDANCE, FILTERS, AMPLITUDE, ATTENTION, START = (
    "guidance",
    "low_pass, blur, time_noise",
    "motion_amplitude",
    "first_frame",
    "start",
)
KNOBS = (GUIDANCE, FILTERS, AMPLITUDE, ATTENTION, START)
"""The columns of the table."""


def _every(configs: Configs) -> bool:
    return True


def _never(arguments: Arguments) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class KnobFamily:
    """What the denoiser's calls of some pipelines look like.

    Attributes:
        name: Of the family.
        pipelines: Classes of pipelines.
        applies: Whether a pipeline of such a class is of this kind, by its configurations.
        passes: Whether the passes of guidance are one call of a batch whose first half is
            unconditional, or two calls of which the first is conditional; or whether the pipeline,
            being ours, carries out the knobs itself. None where no knob is known.
        image: Where the condition image is.
        has_grey_frames: Whether the frames after the image are those of grey pixels, encoded.
        attention: Where the self-attention is.
        scale: The attribute that is above 1 where a pipeline guides that does not say so itself.
        is_cut_by_rows: Whether half of a batch can be called alone: all that its rows differ in is
            in the arguments.
        is_conditional: Whether a call is one more conditional pass beside a batch of two.
        combines_in_fp32: Whether the pipeline combines its passes in fp32, whatever their dtype.
        ramps_guidance: Whether guidance grows from 1 to its scale over the frames.
        starts_late: Whether denoising can begin at a lower noise level.
        why_not: Why knobs are missing, in words, by their column or for all as `""`.
    """

    name: str
    pipelines: tuple[str, ...]
    applies: Callable[[Configs], bool] = _every
    passes: Literal["batched", "separate", "own"] | None = None
    image: ImagePlace | None = None
    has_grey_frames: bool = False
    attention: SelfAttention | None = None
    scale: str | None = None
    is_cut_by_rows: bool = True
    is_conditional: Callable[[Arguments], bool] = _never
    combines_in_fp32: bool = False
    ramps_guidance: bool = False
    starts_late: bool = False
    why_not: Mapping[str, str] = field(default_factory=dict)

    def has(self, knob: str) -> bool:
        """Return whether a knob of `KNOBS` acts on these pipelines."""
        can = {
            GUIDANCE: self.passes is not None,
            FILTERS: self.passes == "own" or self.image is not None,
            AMPLITUDE: self.has_grey_frames,
            ATTENTION: self.attention is not None,
            START: self.starts_late,
        }
        return can[knob] and knob not in self.why_not

    def reason(self, knob: str) -> str:
        """Describe why a knob is missing."""
        return self.why_not.get(knob) or self.why_not.get("") or _WHY_NOT[knob]


_WHY_NOT = {
    GUIDANCE: "its passes of guidance are not known",
    FILTERS: "where its calls have the image is not known",
    AMPLITUDE: "the frames after its image are not those of grey pixels",
    ATTENTION: "its attention to the first frame cannot be told apart",
    START: "its pipeline cannot begin late",
}

_BLOCKS = ("transformer_blocks",)
_WAN_ATTENTION = SelfAttention(
    blocks=("blocks",),
    module="attn1",
    processors=("WanAttnProcessor", "SkyReelsV2AttnProcessor"),
    first_frame=tokens_of_patches,
    has_head_axis=True,
)
_LTX_ATTENTION = SelfAttention(
    blocks=_BLOCKS,
    module="attn1",
    processors=("LTXVideoAttnProcessor",),
    first_frame=tokens_of_ltx,
)
_HUNYUAN_ATTENTION = SelfAttention(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    module="attn",
    processors=("HunyuanVideoAttnProcessor2_0",),
    first_frame=tokens_of_patches,
    has_head_axis=True,
)

_IN_EVERY_FRAME = "it has the image in every frame"
_ZEROS = "the frames after its image are zeros, not grey pixels"
_APART = "its attention over space sees one frame, and that over time one place"
_TOKENS_ALONE = "it sees the image as tokens alone"
_FOUR_PASSES = "it combines up to four passes of picture and sound in a way of its own"


def _is_perturbed(arguments: Arguments) -> bool:
    """Check whether a call of LTX-2 is a conditional pass without a part of the network."""
    blocks, is_isolated = (
        arguments.get(name) for name in ("spatio_temporal_guidance_blocks", "isolate_modalities")
    )
    return blocks is not None or bool(is_isolated)


def _transformer(configs: Configs) -> Config:
    return configs.get("transformer") or configs.get("transformer_2") or {}


def _expands_timesteps(configs: Configs) -> bool:
    return bool(configs.get("", {}).get("expand_timesteps", False))


def _replaces_token(configs: Configs) -> bool:
    return _transformer(configs).get("image_condition_type") == "token_replace"


def _has_tokens_of_one_latent(configs: Configs) -> bool:
    own = _transformer(configs)
    return (own.get("patch_size", 1), own.get("patch_size_t", 1)) == (1, 1)


_SVD = KnobFamily(
    name="SVD",
    pipelines=("StableVideoDiffusionPipeline",),
    passes="batched",
    image=BesideLatents(axis=2),
    ramps_guidance=True,
    why_not={AMPLITUDE: _IN_EVERY_FRAME, ATTENTION: _APART},
)

KNOB_FAMILIES: tuple[KnobFamily, ...] = (
    KnobFamily(
        name="Wan 2.2-5B",
        pipelines=("WanImageToVideoPipeline",),
        applies=_expands_timesteps,
        passes="separate",
        image=InFirstFrame(),
        attention=_WAN_ATTENTION,
    ),
    KnobFamily(
        name="Wan 2.1, 2.2-A14B, SkyReels-V2",
        pipelines=(
            "WanImageToVideoPipeline",
            "WanImage2VideoModularPipeline",
            "Wan22Image2VideoModularPipeline",
            "SkyReelsV2ImageToVideoPipeline",
        ),
        passes="separate",
        image=BesideLatents(mask_before=4),
        has_grey_frames=True,
        attention=_WAN_ATTENTION,
    ),
    KnobFamily(
        name="CogVideoX",
        pipelines=("CogVideoXImageToVideoPipeline",),
        passes="batched",
        scale="_guidance_scale",
        combines_in_fp32=True,
        image=BesideLatents(axis=2),
        attention=SelfAttention(
            blocks=_BLOCKS,
            module="attn1",
            processors=("CogVideoXAttnProcessor2_0",),
            first_frame=tokens_of_patches,
            is_text_first=True,
        ),
        why_not={AMPLITUDE: _ZEROS},
    ),
    _SVD,
    replace(
        _SVD,
        name="SVD with a text adapter",
        pipelines=("SvdAdapterPipeline",),
        is_cut_by_rows=False,  # the U-Net holds the tokens of the adapter
    ),
    KnobFamily(
        name="I2VGen-XL",
        pipelines=("I2VGenXLPipeline",),
        passes="batched",
        image=InArgument("image_latents"),
        why_not={ATTENTION: _APART},
    ),
    KnobFamily(
        name="LTX",
        pipelines=("LTXImageToVideoPipeline",),
        applies=_has_tokens_of_one_latent,
        passes="batched",
        combines_in_fp32=True,
        image=InFirstTokens(),
        attention=_LTX_ATTENTION,
    ),
    KnobFamily(
        name="LTX, modular",
        pipelines=("LTXModularPipeline",),
        applies=_has_tokens_of_one_latent,
        passes="separate",
        image=InFirstTokens(),
        attention=_LTX_ATTENTION,
    ),
    KnobFamily(
        name="Hunyuan, token_replace",
        pipelines=("HunyuanVideoImageToVideoPipeline",),
        applies=_replaces_token,
        passes="separate",
        image=InFirstFrame(),
        attention=_HUNYUAN_ATTENTION,
    ),
    KnobFamily(
        name="Hunyuan",
        pipelines=("HunyuanVideoImageToVideoPipeline",),
        passes="separate",
        image=BesideLatents(mask_after=1),
        attention=_HUNYUAN_ATTENTION,
        why_not={AMPLITUDE: _ZEROS},
    ),
    KnobFamily(
        name="Hunyuan 1.5",
        pipelines=("HunyuanVideo15ImageToVideoPipeline", "HunyuanVideo15ModularPipeline"),
        passes="separate",
        image=BesideLatents(mask_after=1),
        why_not={
            AMPLITUDE: _ZEROS,
            ATTENTION: "its attention turns a mask of numbers into yes and no",
        },
    ),
    KnobFamily(
        name="Kandinsky 5",
        pipelines=("Kandinsky5I2VPipeline",),
        passes="separate",
        scale="guidance_scale",
        image=InFirstFrameChannelsLast(),
        why_not={ATTENTION: "its attention drops a mask with a line in the log"},
    ),
    KnobFamily(
        name="LTX-2",
        pipelines=("LTX2ImageToVideoPipeline",),
        passes="batched",
        attention=SelfAttention(
            blocks=_BLOCKS,
            module="attn1",
            processors=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
            first_frame=tokens_of_ltx,
        ),
        is_conditional=_is_perturbed,
        why_not=dict.fromkeys((GUIDANCE, FILTERS), _FOUR_PASSES),
    ),
    KnobFamily(
        name="LTX-2, LTX-2.5, modular",
        pipelines=("LTX2ModularPipeline", "LTX25ModularPipeline"),
        why_not={"": _FOUR_PASSES},
    ),
    KnobFamily(
        name="DynamiCrafter, pocket",
        pipelines=("DynamiCrafterPipeline", "PocketPipeline"),
        passes="own",
        starts_late=True,
        why_not={AMPLITUDE: _IN_EVERY_FRAME, ATTENTION: _APART},
    ),
    KnobFamily(
        name="VideoCrafter",
        pipelines=("VideoCrafterPipeline",),
        passes="own",
        starts_late=True,
        why_not=dict.fromkeys((FILTERS, AMPLITUDE, ATTENTION), _TOKENS_ALONE),
    ),
    KnobFamily(
        name="ConsistI2V",
        pipelines=("ConsistI2VPipeline",),
        why_not={"": "it guides by text and image at once; its own settings change both"},
    ),
)
"""What is known; every other pipeline has no knobs."""


def knob_family(pipeline_class: str, configs: Configs) -> KnobFamily:
    """Find what a pipeline's calls look like; of one that is unknown, that no knob is.

    Args:
        pipeline_class: The name of the pipeline's class.
        configs: The configurations of its parts.
    """
    for family in KNOB_FAMILIES:
        if pipeline_class in family.pipelines and family.applies(configs):
            return family
    unknown = "the calls of its denoiser were not looked at"
    return KnobFamily(name=pipeline_class, pipelines=(), why_not={"": unknown})


def wanted_knobs(schedule: ExpertSchedule) -> list[str]:
    """List which knobs of `KNOBS` a schedule sets."""
    found: set[str] = set()
    for entry in schedule.entries:
        found |= {AMPLITUDE if isinstance(one, MotionAmplitude) else FILTERS for one in entry.image}
        given = {GUIDANCE: entry.guidance, ATTENTION: entry.attention, START: entry.start}
        found |= {knob for knob, value in given.items() if value is not None}
    return [knob for knob in KNOBS if knob in found]


def check_knobs(schedule: ExpertSchedule, family: KnobFamily) -> None:
    """Refuse knobs that a family does not have.

    Raises:
        ConfigError: Names the knob, the reason, and the families that have it.
    """
    for knob in wanted_knobs(schedule):
        if not family.has(knob):
            others = [one.name for one in KNOB_FAMILIES if one.has(knob)]
            found = ", ".join(_filters(schedule)) if knob == FILTERS else knob
            raise ConfigError(
                f"The schedule sets {found}, which {family.name} does not have: "
                f"{family.reason(knob)}.",
                fix=f"Leave it out, or use a model that has it: {'; '.join(others)}.",
            )


def _filters(schedule: ExpertSchedule) -> list[str]:
    """Return which of the knobs that stand in one column are set, each once."""
    images = [one for entry in schedule.entries for one in entry.image]
    return list(dict.fromkeys(one.name for one in images if not isinstance(one, MotionAmplitude)))
