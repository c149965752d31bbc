"""Configurations of an official checkpoint, from its YAML parameters or from its tensors' shapes.

Official: `configs/inference_*_v1.0.yaml`. Checkpoints travel without their YAML file, so everything
that the classes need is read off the shapes; what shapes cannot tell (group count, head width of
the towers and the image projector) is the same in all released models.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch

from motionmerge.dynamicrafter_names import count_indices, unet_layout_of_official
from motionmerge.errors import ConfigError

from .unet import ENTRY_ATTENTION_HEADS

OfficialShapes = Mapping[str, tuple[int, ...]]

_REQUIRED = (
    "in_channels",
    "out_channels",
    "model_channels",
    "attention_resolutions",
    "num_res_blocks",
    "channel_mult",
    "num_head_channels",
    "context_dim",
)
_FIXED: dict[str, Any] = {
    "dims": 2,
    "conv_resample": True,
    "transformer_depth": 1,
    "use_linear": True,
    "temporal_conv": True,
    "tempspatial_aware": False,
    "temporal_attention": True,
    "use_relative_position": False,
    "use_causal_attention": False,
    "addition_attention": True,
    "image_cross_attention": True,
    "image_cross_attention_scale": 1.0,
    "fs_condition": True,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
}
_SPELLINGS = {"use_image_attention": "image_cross_attention", "fps_cond": "fs_condition"}
"""VideoCrafter's words for settings of DynamiCrafter."""

_WITHOUT_EFFECT = (  # on the function that the weights compute, or told by the weights themselves
    "use_checkpoint",
    "use_fp16",
    "temporal_selfatt_only",
    "default_fs",
    "image_cross_attention_scale_learnable",
)
_OPTIONAL = ("dropout", "temporal_length")


def unet_config_from_official(params: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the official U-Net's parameters into arguments of `DynamiCrafterUNet`.

    Args:
        params: `model.params.unet_config.params` of an official YAML file, of DynamiCrafter or of
            VideoCrafter's image-to-video model.

    Raises:
        ConfigError: a parameter is missing, unknown, or asks for something that no released model
            has (relative positions, for example).
    """
    params = {_SPELLINGS.get(name, name): value for name, value in params.items()}
    missing = [name for name in _REQUIRED if name not in params]
    if missing:
        raise ConfigError(
            f"The official U-Net parameters lack {', '.join(missing)}",
            fix="Pass `model.params.unet_config.params` of the official YAML file.",
        )
    known = [*_REQUIRED, *_OPTIONAL, *_FIXED, *_WITHOUT_EFFECT]
    for name, value in params.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"Unknown official U-Net parameter `{name}`.",
                fix=f"Did you mean `{near[0]}`?" if near else "Remove it if it has no effect.",
            )
        if name in _FIXED and value != _FIXED[name]:
            raise ConfigError(
                f"The official U-Net parameter `{name}` is {value!r}; only {_FIXED[name]!r} is "
                "supported, as in all released models.",
                fix="Use a checkpoint of the DynamiCrafter 256, 512 or 1024 family.",
            )
    multipliers = list(params["channel_mult"])
    config = {
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": [params["model_channels"] * factor for factor in multipliers],
        "attention_levels": [
            2**level in params["attention_resolutions"] for level in range(len(multipliers))
        ],
        "layers_per_block": params["num_res_blocks"],
        "attention_head_dim": params["num_head_channels"],
        "cross_attention_dim": params["context_dim"],
    }
    if "dropout" in params:
        config["dropout"] = params["dropout"]
    if "temporal_length" in params:
        config["adapter_frames"] = params["temporal_length"]
    return config


def unet_config_from_shapes(shapes: OfficialShapes) -> dict[str, Any]:
    """Read the arguments of `DynamiCrafterUNet` off official shapes."""
    layout = unet_layout_of_official(shapes)
    step = layout["layers_per_block"] + 1
    levels = range(len(layout["attention_levels"]))
    config = {
        **layout,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": [
            shapes[f"input_blocks.{1 + level * step}.0.out_layers.0.weight"][0] for level in levels
        ],
        "attention_head_dim": shapes["init_attn.0.proj_in.weight"][0] // ENTRY_ATTENTION_HEADS,
        "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
    }
    if "init_attn.0.cc_projection.weight" in shapes:
        inner, with_context = shapes["init_attn.0.cc_projection.weight"]
        config["temporal_context_dim"] = with_context - inner
        if "queries" in shapes:
            heads = 8
            config["adapter_frames"] = shapes["queries"][0]
            config["adapter_text_dim"] = shapes["qformer.to_k.weight"][1]
            config["adapter_heads"] = heads
            config["adapter_head_dim"] = shapes["qformer.to_k.weight"][0] // heads
    return config


def vae_config_from_shapes(shapes: OfficialShapes) -> dict[str, Any]:
    """Read the arguments of diffusers' `AutoencoderKL` off official shapes."""
    num_levels = count_indices(shapes, r"encoder\.down\.(\d+)\.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "block_out_channels": [
            shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(num_levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "layers_per_block": count_indices(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "scaling_factor": 0.18215,
    }


def image_projector_config_from_shapes(shapes: OfficialShapes) -> dict[str, Any]:
    """Read the arguments of `ImageProjector` off shapes: heads of 64, 16 queries a frame."""
    hidden_dims, embed_dims = shapes["proj_in.weight"]
    num_latents = shapes["latents"][1]
    inner, dim_head, num_queries = shapes["layers.0.0.to_q.weight"][0], 64, 16
    return {
        "embed_dims": embed_dims,
        "output_dims": shapes["proj_out.weight"][0],
        "hidden_dims": hidden_dims,
        "depth": count_indices(shapes, r"layers\.(\d+)\."),
        "dim_head": min(dim_head, inner),
        "heads": max(1, inner // dim_head),
        "num_queries": min(num_queries, num_latents),
        "num_frames": max(1, num_latents // num_queries),
        "ffn_ratio": shapes["layers.0.1.1.weight"][0] / hidden_dims,
    }


def text_encoder_config_from_shapes(shapes: OfficialShapes) -> dict[str, Any]:
    """Read the arguments of `encoders.text_encoder_config` off official shapes: heads of 64."""
    vocab_size, width = shapes["token_embedding.weight"]
    return {
        "width": width,
        "layers": count_indices(shapes, r"transformer\.resblocks\.(\d+)\.") - 1,
        "heads": max(1, width // 64),
        "mlp_width": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "vocab_size": vocab_size,
        "num_tokens": shapes["positional_embedding"][0],
    }


def image_encoder_config_from_shapes(shapes: OfficialShapes) -> dict[str, Any]:
    """Read the arguments of `encoders.image_encoder_config` off official shapes: heads of 80."""
    width, _, patch_size, _ = shapes["conv1.weight"]
    patches_a_side = round((shapes["positional_embedding"][0] - 1) ** 0.5)
    return {
        "width": width,
        "layers": count_indices(shapes, r"transformer\.resblocks\.(\d+)\."),
        "heads": max(1, width // 80),
        "mlp_width": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "image_size": patches_a_side * patch_size,
        "patch_size": patch_size,
    }


_NOISE_PREDICTION = {
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


_ZERO_TERMINAL_SNR = {
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 0,
}


def is_videocrafter(unet_config: Mapping[str, Any]) -> bool:
    """Return whether a U-Net sees no image latents, as VideoCrafter's and unlike DynamiCrafter's.

    Args:
        unet_config: Arguments of `DynamiCrafterUNet`; empty where there is no U-Net.
    """
    in_channels = unet_config.get("in_channels")
    return in_channels is not None and in_channels == unet_config.get("out_channels")


def videocrafter_scheduler_config(buffers: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments of `DynamicRescaleDDIMScheduler` for VideoCrafter.

    Released files may lack the buffers, and hold them in fp16: rates are computed from betas.

    Args:
        buffers: The official `alphas_cumprod` and `scale_arr`, where present.
    """
    known = {**_NOISE_PREDICTION, "base_scale": 0.7, "rescale_steps": 400}
    return {**known, **scheduler_config_from_buffers(buffers), "last_step_to_zero": True}


def scheduler_config_from_buffers(buffers: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Read arguments of `DynamicRescaleDDIMScheduler` off the schedule buffers of a checkpoint.

    A terminal signal of zero means the 512 and 1024 models' setting (v-prediction, trailing
    timesteps), anything else the 256 model's (noise prediction, leading timesteps). A checkpoint
    without buffers is taken for a 512 model.

    Args:
        buffers: The official `alphas_cumprod` and `scale_arr`, where present, in any dtype.
    """
    if "alphas_cumprod" not in buffers:
        return {}
    has_zero_snr = abs(buffers["alphas_cumprod"][-1].item()) < 1e-6
    config: dict[str, Any] = {
        "num_train_timesteps": len(buffers["alphas_cumprod"]),
        **(_ZERO_TERMINAL_SNR if has_zero_snr else _NOISE_PREDICTION),
        "base_scale": None,
    }
    if "scale_arr" in buffers:
        scale = buffers["scale_arr"].float()
        config["base_scale"] = round(scale[-1].item(), 3)  # fp16 says 0.700195
        config["rescale_steps"] = int((scale > scale[-1]).sum()) + 1
    return config


def default_size(
    scheduler_config: Mapping[str, Any], unet_config: Mapping[str, Any]
) -> tuple[int, int]:
    """Return height and width in pixels of the model that has this noise schedule and U-Net."""
    if is_videocrafter(unet_config):
        return 320, 512
    if not scheduler_config.get("rescale_betas_zero_snr", True):
        return 256, 256
    base_scale = scheduler_config.get("base_scale") or 1.0
    return (576, 1024) if base_scale < 0.5 else (320, 512)
