"""Tiny models of ComfyUI's own classes, and one sampling as its nodes do it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import comfy.ldm.hunyuan_video.model
import comfy.ldm.lightricks.model
import comfy.ldm.wan.model
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import torch

OPERATIONS = comfy.ops.disable_weight_init
COMMON = {"device": "cpu", "dtype": torch.float32, "operations": OPERATIONS}
LATENTS = {"wan": (1, 16, 2, 4, 4), "ltx": (1, 128, 2, 2, 2), "hunyuan": (1, 16, 2, 4, 4)}
FAMILIES = tuple(LATENTS)


@functools.cache
def state_dict(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights of a family, under its original names."""
    if family == "wan":
        network = comfy.ldm.wan.model.WanModel(
            model_type="i2v", in_dim=36, dim=128, ffn_dim=64, num_layers=2, num_heads=1, **COMMON
        )
    elif family == "ltx":
        network = comfy.ldm.lightricks.model.LTXVModel(
            num_layers=2, attention_head_dim=8, cross_attention_dim=256, **COMMON
        )
    else:
        hunyuan = comfy.ldm.hunyuan_video.model
        params = {field.name for field in dataclasses.fields(hunyuan.HunyuanVideoParams)}
        later = {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
        network = hunyuan.HunyuanVideo(
            **{name: value for name, value in later.items() if name in params},
            image_model="hunyuan_video", in_channels=16, out_channels=16, vec_in_dim=768,
            context_in_dim=64, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1,
            depth_single_blocks=1, axes_dim=[16, 56, 56], theta=256, patch_size=[1, 2, 2],
            qkv_bias=True, guidance_embed=True, byt5=False, meanflow=False, **COMMON,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        * (0.3 / max(tensor.shape[-1], 1) ** 0.5)
        + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, tensor in network.state_dict().items()
    }


def model(family: str, seed: int = 0, **options: Any) -> Any:
    """Return a MODEL of its own, as the node Load Diffusion Model does."""
    weights = {name: tensor.clone() for name, tensor in state_dict(family, seed).items()}
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options=options)


def scaled_model() -> Any:
    """Return Wan as fp8 codes and scales, as files of 2025 have them."""
    weights: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in state_dict("wan").items():
        weights[name] = tensor.clone()
        if tensor.ndim == 2 and name.endswith(".weight") and name.startswith("blocks."):
            scale = tensor.abs().max() / 448
            weights[name] = (tensor / scale).to(torch.float8_e4m3fn)
            weights[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    return comfy.sd.load_diffusion_model_state_dict(weights)


def lora(family: str, seed: int = 7, rank: int = 4) -> dict[str, torch.Tensor]:
    """Return a LoRA of every linear layer, as `export loras --for comfyui` names it."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in state_dict(family).items():
        if weight.ndim == 2 and name.endswith(".weight"):
            stem = f"diffusion_model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            found[f"{stem}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
            found[f"{stem}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    return found


def conditioning(family: str, seed: int) -> list[Any]:
    """Return random embeddings, as a text encoder would make them."""
    generator = torch.Generator().manual_seed(seed)
    width = {"wan": 4096, "ltx": 4096, "hunyuan": 64}[family]
    embeddings = torch.randn(1, 5, width, generator=generator)
    more = {"pooled_output": torch.randn(1, 768, generator=generator)}
    if family == "ltx":
        more["attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    return [[embeddings, more]]


def sample(
    model: Any,
    family: str,
    *,
    sampler: str = "euler",
    scheduler: str = "simple",
    steps: int = 8,
    cfg: float = 3.5,
    **more: Any,
) -> torch.Tensor:
    """Return the latents of one KSampler."""
    latents = torch.zeros(LATENTS[family])
    return comfy.sample.sample(
        model,
        torch.randn(latents.shape, generator=torch.Generator().manual_seed(3)),
        steps,
        cfg,
        sampler,
        scheduler,
        conditioning(family, 1),
        conditioning(family, 2),
        latents,
        seed=5,
        disable_pbar=True,
        **more,
    )
