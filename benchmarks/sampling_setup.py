"""What `sampling.py` measures: sizes, rows, and the same random weights and inputs for all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from motionmerge.io.weights import save_weights
from motionmerge.models.dynamicrafter.image_projector import ImageProjector
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.dynamicrafter_pipeline import DynamiCrafterPipeline

BOUNDARY = 0.64  # noise level
GUIDANCE = {"guidance_scale": 7.5, "guidance_rescale": 0.7}
TEXT_TOKENS, FRAMES = 77, 16
VIDEO_STEPS = 50  # of a video that is not measured, but made
WARM_UP_STEPS = 2  # one of each expert
COMPILING_STEPS = 4  # two of each expert: keys are made in the first and kept for the second


@dataclass(frozen=True)
class Size:
    """A configuration: widths of the U-Net and the VAE, tokens, pixels and steps."""

    widths: tuple[int, ...]
    head_dim: int
    token_dim: int
    image_tokens: int
    vae_widths: tuple[int, ...]
    height: int
    width: int
    steps: int


SIZES = {
    "small": Size((32, 64, 64), 16, 64, 4, (32, 32, 32, 32), 64, 64, 4),
    "mid": Size((96, 192, 384, 384), 32, 256, 16, (32, 64, 64, 64), 128, 192, 6),
    "full": Size((320, 640, 1280, 1280), 64, 1024, 16, (128, 256, 512, 512), 320, 512, 50),
}


@dataclass(frozen=True)
class Row:
    """What a row does differently from the official procedure."""

    name: str
    savings: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float32
    autocast: bool = False  # weights in fp32, products in fp16, as the official script
    is_ours: bool = False
    keeps_keys: bool = True
    channels_last: bool = False
    compiles: str = ""  # "model", or "blocks" for its repeated ones alone
    placement: str = "auto"


VARIANTS: dict[str, dict[str, Any]] = {
    "channels last": {"channels_last": True},
    "prefetch": {"placement": "prefetch"},
    "blocks compiled": {"compiles": "blocks"},
    "compiled": {"compiles": "model"},
    "recompute": {"placement": "recompute"},
}

ON_GPU = (  # the rows of a GPU, those first that matter most
    "official procedure",
    "official procedure, bf16",
    "motionmerge, bf16",
    "+ keys kept: motionmerge",
    "official procedure, autocast",
    "motionmerge, bf16, channels last",
    "motionmerge, bf16, prefetch",
    "motionmerge, bf16, recompute",
    "motionmerge, bf16, blocks compiled",
)


def rows() -> list[Row]:
    """The official procedure, what each change saves on top of the ones before, and ours."""
    steps = ("one model", "one encode", "batched guidance", "SDPA")
    made = [Row("official procedure")]
    made += [Row(f"+ {name}", frozenset(steps[: i + 1])) for i, name in enumerate(steps)]
    made.append(Row("+ text not repeated", is_ours=True, keeps_keys=False))
    made.append(Row("+ keys kept: motionmerge", is_ours=True))
    made.append(Row("motionmerge, channels last", is_ours=True, channels_last=True))
    made.append(Row("motionmerge, compiled", is_ours=True, compiles="model"))
    made.append(Row("motionmerge, recompute", is_ours=True, placement="recompute"))
    made.append(Row("official procedure, autocast", autocast=True))
    made.append(Row("official procedure, bf16", dtype=torch.bfloat16))
    ours = Row("motionmerge, bf16", dtype=torch.bfloat16, is_ours=True)
    made.append(ours)
    for kind in ("channels last", "prefetch", "blocks compiled", "compiled", "recompute"):
        made.append(replace(ours, name=f"{ours.name}, {kind}", **VARIANTS[kind]))
    return made


class Towers(ModelMixin):
    """Stands where the pipeline keeps its text and image towers; tokens are passed in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


def build(size: Size, device: str) -> DynamiCrafterPipeline:
    """A DynamiCrafter of this size with random weights, all of them in use, on the device."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    with torch.device(device):
        unet = DynamiCrafterUNet(
            block_out_channels=size.widths,
            attention_levels=(*[True] * (len(size.widths) - 1), False),
            attention_head_dim=size.head_dim,
            cross_attention_dim=size.token_dim,
            num_text_tokens=TEXT_TOKENS,
            num_image_tokens=size.image_tokens,
            norm_num_groups=16,
        )
        with torch.no_grad():  # layers that start at zero would hide what is before them
            for parameter in unet.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(std=0.3 * parameter[0].numel() ** -0.5)
        levels = len(size.vae_widths)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=size.vae_widths,
            layers_per_block=2,
            norm_num_groups=16,
            scaling_factor=0.18215,
        )
        text_encoder, image_encoder = Towers(), Towers()
        image_projector = ImageProjector(num_frames=FRAMES)
    pipeline = DynamiCrafterPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=None,
        image_encoder=image_encoder,
        image_projector=image_projector,
        scheduler=DynamicRescaleDDIMScheduler(),
        height=size.height,
        width=size.width,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def write_experts(size: Size, folder: Path, device: str) -> None:
    """Save the weights of the two experts, a small step apart."""
    weights = build(size, device).unet.state_dict()
    save_weights(folder / "early.safetensors", weights)
    generator = torch.Generator(device).manual_seed(1)
    for weight in weights.values():
        noise = torch.randn(weight.shape, generator=generator, device=device)
        weight += 0.02 * weight.std().nan_to_num() * noise
    save_weights(folder / "late.safetensors", weights)


@dataclass(frozen=True)
class Inputs:
    """What every row is given."""

    image: torch.Tensor
    noise: torch.Tensor
    tokens: torch.Tensor  # [2, tokens, dim]: unconditional, conditional

    @classmethod
    def draw(cls, size: Size, pipeline: DynamiCrafterPipeline, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(2)
        scale = pipeline.vae_scale_factor
        noise = (1, 4, FRAMES, size.height // scale, size.width // scale)
        num_tokens = TEXT_TOKENS + FRAMES * size.image_tokens
        return cls(
            torch.rand(1, 3, size.height, size.width, generator=generator).to(device),
            torch.randn(noise, generator=generator).to(device),
            torch.randn(2, num_tokens, size.token_dim, generator=generator).to(device),
        )
