"""What `sampling.py` measures: sizes, rows, and the same random weights and inputs for all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from motionmerge.io.weights import save_weights
from motionmerge.models.dynamicrafter.encoders import image_encoder_config, text_encoder_config
from motionmerge.models.dynamicrafter.image_projector import ImageProjector
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline

BOUNDARY = 0.64  # noise level
GUIDANCE = {"guidance_scale": 7.5, "guidance_rescale": 0.7}
PROMPT = "a sailing boat turns slowly to the left"
TEXT_TOKENS, FRAMES = 77, 16
EXPERT_MODULES = ("unet", "image_projector")
VIDEO_STEPS = 50  # of a video that is not measured, but made
PIPELINE = "pipeline"  # its folder
WARM_UP_STEPS = 2  # one of each expert
COMPILING_STEPS = 4  # two of each expert: keys are made in the first and kept for the second


@dataclass(frozen=True)
class Size:
    """A configuration: widths of the U-Net and the VAE, towers, tokens, pixels and steps.

    `text` and `image` are (width, layers, heads) of the two towers.
    """

    widths: tuple[int, ...]
    head_dim: int
    token_dim: int
    image_tokens: int
    text: tuple[int, int, int]
    image: tuple[int, int, int]
    vae_widths: tuple[int, ...]
    height: int
    width: int
    steps: int


# In "mid" every part has about a tenth of its parameters in "full", which is DynamiCrafter-512.
SIZES = {
    "small": Size(
        (32, 64, 64), 16, 64, 4, (64, 2, 2), (64, 2, 2), (32, 32, 32, 32), 64, 64, steps=4
    ),
    "mid": Size(
        (96, 192, 384, 384),
        32,
        256,
        16,
        (256, 23, 4),
        (384, 32, 6),
        (32, 64, 64, 64),
        128,
        192,
        steps=6,
    ),
    "full": Size(
        (320, 640, 1280, 1280),
        64,
        1024,
        16,
        (1024, 23, 16),
        (1280, 32, 16),
        (128, 256, 512, 512),
        320,
        512,
        steps=50,
    ),
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
    frees_towers: bool = True
    channels_last: bool = False
    compiles: bool = False
    captures: bool = False
    batches_guidance: bool | None = None
    placement: str = "auto"


VARIANTS: dict[str, dict[str, Any]] = {
    "not captured": {"captures": False},
    "channels last": {"channels_last": True},
    "prefetch": {"placement": "prefetch"},
    "compiled": {"compiles": True, "captures": False},
    "recompute": {"placement": "recompute"},
}

ON_GPU = (  # the rows of a GPU, those first that matter most
    "official procedure",
    "official procedure, bf16",
    "motionmerge, bf16",
    "motionmerge, bf16, not captured",
    "motionmerge, bf16, prefetch",
    "motionmerge, bf16, recompute",
    "official procedure, autocast",
    "+ towers freed: motionmerge",
    "motionmerge, bf16, compiled",
)


def rows() -> list[Row]:
    """The official procedure, what each change saves on top of the ones before, and ours."""
    steps = ("one model", "one encode", "batched guidance", "SDPA")
    made = [Row("official procedure")]
    made += [Row(f"+ {name}", frozenset(steps[: i + 1])) for i, name in enumerate(steps)]
    ours = Row("+ towers freed: motionmerge", is_ours=True)
    kept = replace(ours, name="+ keys kept", frees_towers=False, batches_guidance=True)
    made.append(replace(kept, name="+ text not repeated", keeps_keys=False))
    made.append(kept)
    made.append(ours)
    for kind in ("channels last", "compiled", "recompute"):
        made.append(replace(ours, name=f"motionmerge, {kind}", **VARIANTS[kind]))
    made.append(Row("official procedure, autocast", autocast=True))
    made.append(Row("official procedure, bf16", dtype=torch.bfloat16))
    half = Row("motionmerge, bf16", dtype=torch.bfloat16, is_ours=True, captures=True)
    made.append(half)
    for kind, change in VARIANTS.items():
        made.append(replace(half, name=f"{half.name}, {kind}", **change))
    return made


def build(size: Size, device: str) -> DynamiCrafterPipeline:
    """A DynamiCrafter of this size with random weights, all of them in use, on the device."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPVisionModel

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
        text, image = (
            dict(zip(("width", "layers", "heads"), tower, strict=True))
            for tower in (size.text, size.image)
        )
        text_encoder = CLIPTextModel(text_encoder_config(**text))
        image_encoder = CLIPVisionModel(image_encoder_config(**image))
        image_projector = ImageProjector(
            embed_dims=image["width"],
            output_dims=size.token_dim,
            hidden_dims=size.token_dim,
            heads=max(1, 12 * size.token_dim // 1024),
            num_queries=size.image_tokens,
            num_frames=FRAMES,
        )
    pipeline = DynamiCrafterPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer(),
        image_encoder=image_encoder.eval(),
        image_projector=image_projector.eval(),
        scheduler=DynamicRescaleDDIMScheduler(),
        height=size.height,
        width=size.width,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the prompt's words: CLIP's own vocabulary does not come with the package."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(["!", *PROMPT.split()])}, "!"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="!", unk_token="!", model_max_length=TEXT_TOKENS
    )


@torch.no_grad()
def write_experts(size: Size, folder: Path, device: str) -> None:
    """Save the weights of the two experts, U-Net and image projector, a small step apart.

    For a GPU in bf16, which all rows can hold and which takes half the time to read. For a CPU also
    the pipeline itself, so that rows of ours can load it part by part.
    """
    pipeline = build(size, device)
    if device == "cpu":
        pipeline.save_pretrained(folder / PIPELINE)
    weights = {
        f"{module}.{name}": weight
        for module in EXPERT_MODULES
        for name, weight in getattr(pipeline, module).state_dict().items()
    }
    if device == "cuda":
        weights = {name: weight.bfloat16() for name, weight in weights.items()}
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

    @classmethod
    def draw(cls, size: Size, pipeline: DynamiCrafterPipeline, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(2)
        scale = pipeline.vae_scale_factor
        noise = (1, 4, FRAMES, size.height // scale, size.width // scale)
        return cls(
            torch.rand(1, 3, size.height, size.width, generator=generator).to(device),
            torch.randn(noise, generator=generator).to(device),
        )
