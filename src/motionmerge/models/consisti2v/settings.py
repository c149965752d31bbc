"""Settings of ConsistI2V's `config.json`: which are told, and which all of its kind share."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from motionmerge.errors import ConfigError

_SHARED: dict[str, Any] = {
    "use_linear_projection": True,
    "use_temporal": True,
    "first_frame_condition_mode": "concat",
    "augment_temporal_attention": True,
    "temp_pos_embedding": "rotary",
    "use_frame_stride_condition": True,
}
"""Settings of the video model that the network is built for."""

_OF_IMAGES: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
"""Settings of Stable Diffusion 2.1's U-Net, as diffusers writes them."""

_WITHOUT_EFFECT = ("addition_embed_type_num_heads", "upcast_attention")

_TOLD = (
    "sample_size",
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "norm_num_groups",
    "norm_eps",
    "n_frames",
    "n_temp_heads",
)


def check_settings(**settings: Any) -> dict[str, Any]:
    """Return the arguments of `ConsistI2VUNet` among settings; refuse what it could not follow.

    Raises:
        ConfigError: A setting is unknown, or has a value that no released model has.
    """
    known = {**_OF_IMAGES, **_SHARED}
    for name, value in settings.items():
        if name in known and value != known[name]:
            raise ConfigError(
                f"The setting `{name}` of ConsistI2V is {value!r}; only {known[name]!r} is "
                "supported, as in the released model.",
                fix="Use the released model, or a fine-tune of it.",
            )
        is_known = name in (*known, *_TOLD, *_WITHOUT_EFFECT) or name.startswith("_")
        if not is_known:
            near = difflib.get_close_matches(name, [*known, *_TOLD], n=1)
            raise ConfigError(
                f"Unknown setting `{name}` of ConsistI2V.",
                fix=f"Did you mean `{near[0]}`?" if near else "Remove it if it has no effect.",
            )
    left_out = (*_OF_IMAGES, *_WITHOUT_EFFECT)
    return {name: value for name, value in settings.items() if name not in left_out}


def arguments_of(
    down_block_types: Sequence[str],
    up_block_types: Sequence[str],
    block_out_channels: Sequence[int],
    attention_head_dim: int | Sequence[int],
) -> tuple[list[bool], list[int]]:
    """Find which levels have attention, and the number of heads of each.

    Raises:
        ConfigError: The lists disagree, or name other blocks.
    """
    levels = len(block_out_channels)
    heads = (
        [attention_head_dim] * levels
        if isinstance(attention_head_dim, int)
        else list(attention_head_dim)
    )
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    on_the_way_up = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
    attends = [kinds.get(kind) for kind in down_block_types]
    mirrored = [on_the_way_up.get(kind) for kind in up_block_types][::-1]
    if None in attends or attends != mirrored or not levels == len(attends) == len(heads):
        raise ConfigError(
            f"`down_block_types` is {list(down_block_types)}, up_block_types "
            f"{list(up_block_types)}, with {levels} widths and {len(heads)} numbers of heads.",
            fix="Name one block a level in both, from Stable Diffusion 2.1's four kinds, and give "
            "each level a width and a number of heads.",
        )
    return [bool(one) for one in attends], heads


def ours_for_the_hubs(index: Mapping[str, Any]) -> dict[str, Any]:
    """Name our classes in the hub's `model_index.json`, which names code of its own; none is run.

    Any other index is returned as it is.
    """
    unet = index.get("unet")
    renamed = dict(index)
    if index.get("_class_name") == "ConditionalAnimationPipeline":
        renamed["_class_name"] = "ConsistI2VPipeline"
    if unet == ["consisti2v.models.videoldm_unet", "VideoLDMUNet3DConditionModel"]:
        renamed["unet"] = ["motionmerge.models.consisti2v.unet", "ConsistI2VUNet"]
    return renamed
