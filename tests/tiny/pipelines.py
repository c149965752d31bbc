"""Every set-up of an image-to-video pipeline that the experts are tested on, in a tiny size.

The same seed gives the same weights, inputs and latents at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from motionmerge.sampling.request.loading import show_progress

from . import builders as build
from . import modular as tiny_modular
from . import newer as tiny_newer
from .builders import TEXT_DIM
from .dynamicrafter import tiny_videocrafter

PROMPT, NEGATIVE = "a cat jumps", "the camera pans left"


@dataclass(frozen=True)
class Family:
    """One set-up of one pipeline.

    Attributes:
        name: What it is called in docs/reference/families.md.
        build: Makes the pipeline.
        inputs: The arguments that make a batch of so many videos in `steps` steps.
        boundary: The noise level at which the tests change experts.
        noisy_steps: How many of the steps are above it, worked out by hand.
        steps: Number of denoising steps.
        denoisers: The attributes that hold a denoiser.
        pattern: Which expert each step needs, d or c for dynamics or consistency, where the video
            is made in several pieces; every step of all of them has a letter.
        has_batches: Several videos can be made by one call.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]
    boundary: float
    noisy_steps: int
    steps: int = 4
    denoisers: tuple[str, ...] = ("transformer",)
    pattern: str = ""
    has_batches: bool = True

    @property
    def due(self) -> str:
        """The pattern, also of a video that is made in one piece."""
        return self.pattern or "d" * self.noisy_steps + "c" * (self.steps - self.noisy_steps)


def photo(side: int = 16) -> Image.Image:
    return Image.radial_gradient("L").resize((side, side)).convert("RGB")


def embeds(batch: int, *shape: int, seed: int = 5) -> torch.Tensor:
    """Text features `[batch, *shape]`, the same for every sample."""
    value = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    return value.repeat(batch, *[1] * len(shape))


def mask(batch: int, tokens: int) -> torch.Tensor:
    return torch.ones(batch, tokens, dtype=torch.long)


def svd_inputs(batch: int) -> dict[str, Any]:
    return {"image": [photo(32)] * batch, "height": 32, "width": 32, "num_frames": 2}


def i2vgen_xl_inputs(batch: int) -> dict[str, Any]:
    return {
        "image": [photo(32)] * batch,
        "prompt_embeds": embeds(batch, 4, 8),
        "negative_prompt_embeds": embeds(batch, 4, 8, seed=6),
        "height": 32,
        "width": 32,
        "num_frames": 2,
    }


def text_inputs(batch: int, side: int = 16) -> dict[str, Any]:
    return {
        "image": photo(side),
        "prompt": [PROMPT] * batch,
        "negative_prompt": [NEGATIVE] * batch,
        "height": side,
        "width": side,
        "num_frames": 9,
        "max_sequence_length": 8,
    }


def cogvideox_inputs(batch: int) -> dict[str, Any]:
    return {**text_inputs(batch), "image": [photo()] * batch}


def ltx_2_inputs(batch: int) -> dict[str, Any]:
    return {
        "image": photo(32),
        "prompt_embeds": embeds(batch, 8, 2 * TEXT_DIM),
        "prompt_attention_mask": mask(batch, 8),
        "negative_prompt_embeds": embeds(batch, 8, 2 * TEXT_DIM, seed=6),
        "negative_prompt_attention_mask": mask(batch, 8),
        "spatio_temporal_guidance_blocks": [0],
        "image_crf": 0,
        "height": 32,
        "width": 32,
        "num_frames": 5,
    }


def hunyuan_inputs(batch: int) -> dict[str, Any]:
    return {
        "image": torch.cat([torch.full((batch, 3, 16, 8), 0.2), torch.ones(batch, 3, 16, 8)], 3),
        "prompt_embeds": embeds(batch, 8, TEXT_DIM),
        "pooled_prompt_embeds": embeds(batch, 8),
        "prompt_attention_mask": mask(batch, 8),
        "negative_prompt_embeds": embeds(batch, 8, TEXT_DIM, seed=6),
        "negative_pooled_prompt_embeds": embeds(batch, 8, seed=6),
        "negative_prompt_attention_mask": mask(batch, 8),
        "true_cfg_scale": 4.0,
        "height": 16,
        "width": 16,
        "num_frames": 5,
    }


def hunyuan_1_5_inputs(batch: int) -> dict[str, Any]:
    tensors = {
        f"{sign}prompt_embeds{which}{suffix}": value
        for seed, sign in ((5, ""), (6, "negative_"))
        for suffix in ("", "_2")
        for which, value in (
            ("", embeds(batch, 6, TEXT_DIM, seed=seed)),
            ("_mask", mask(batch, 6)),
        )
    }
    return {"image": photo(), "num_frames": 5, **tensors}


def kandinsky_5_inputs(batch: int) -> dict[str, Any]:
    tokens = torch.arange(batch + 1, dtype=torch.int32) * 6
    return {
        "image": photo(32),
        "prompt_embeds_qwen": embeds(batch, 6, TEXT_DIM),
        "prompt_embeds_clip": embeds(batch, 8),
        "prompt_cu_seqlens": tokens,
        "negative_prompt_embeds_qwen": embeds(batch, 6, TEXT_DIM, seed=6),
        "negative_prompt_embeds_clip": embeds(batch, 8, seed=6),
        "negative_prompt_cu_seqlens": tokens,
        "height": 32,
        "width": 32,
        "num_frames": 17,
    }


def anyflow_inputs(batch: int) -> dict[str, Any]:
    pixels = torch.full((batch, 1, 3, 32, 32), 0.2)
    pixels[..., 16:] = 1
    inputs = {**text_inputs(batch, 32), "video": pixels, "guidance_scale": 3.0}
    del inputs["image"]
    return inputs


def chronoedit_inputs(batch: int) -> dict[str, Any]:
    reasons = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 4}
    return {**text_inputs(batch), **reasons}


def cosmos_2_inputs(batch: int) -> dict[str, Any]:
    return {**text_inputs(batch), "num_frames": 5}


def helios_inputs(batch: int) -> dict[str, Any]:
    return {**text_inputs(batch), "image": [photo()] * batch, "num_frames": 65}


def one_chunk_inputs(batch: int) -> dict[str, Any]:
    return {**helios_inputs(batch), "num_frames": 33}


def framepack_inputs(batch: int) -> dict[str, Any]:
    return {**hunyuan_inputs(batch), "image": [photo()] * batch, "num_frames": 66}


def sana_video_inputs(batch: int) -> dict[str, Any]:
    inputs = {**text_inputs(batch, 32), "frames": 5, "use_resolution_binning": False}
    del inputs["num_frames"]
    return inputs


def motif_inputs(batch: int) -> dict[str, Any]:
    tensors = {
        f"{sign}prompt_{name}": value
        for seed, sign in ((5, ""), (6, "negative_"))
        for name, value in (
            ("embeds", embeds(batch, 6, TEXT_DIM, seed=seed)),
            ("attention_mask", mask(batch, 6)),
        )
    }
    size = {"height": 16, "width": 16, "num_frames": 5}
    return {"image": photo(), "prompt": None, **size, **tensors}


def kandinsky_6_inputs(batch: int) -> dict[str, Any]:
    return {
        "image": [photo()] * batch,
        "prompt_embeds": embeds(batch, 6, TEXT_DIM),
        "pooled_prompt_embeds": embeds(batch, 8),
        "negative_prompt_embeds": embeds(batch, 6, TEXT_DIM, seed=6),
        "negative_pooled_prompt_embeds": embeds(batch, 8, seed=6),
        "sample_audio": False,
        "height": 16,
        "width": 16,
        "num_frames": 5,
    }


def ltx_2_modular_inputs(batch: int) -> dict[str, Any]:
    return {**text_inputs(batch, 32), "num_frames": 5, "image_crf": 0}


def minimax_h3_inputs(batch: int) -> dict[str, Any]:
    return {
        "image": photo(8),
        "prompt_embeds": embeds(batch, 5, 8),
        "text_token_tags": mask(batch, 5)[0],
        "num_inference_steps": 4,  # the last of which is the end
        "height": 8,
        "width": 8,
        "num_frames": 124,
    }


def larger_text_inputs(batch: int) -> dict[str, Any]:
    return text_inputs(batch, 32)


def videocrafter_inputs(batch: int) -> dict[str, Any]:
    """Make five frames, which is more than a DynamiCrafter of this size has tokens for."""
    text = {"prompt": [PROMPT] * batch, "negative_prompt": [NEGATIVE] * batch}
    return {"image": photo(), **text, "height": 16, "width": 16, "num_frames": 5}


FAMILIES = (
    Family("SVD", build.svd, svd_inputs, 0.9, 2, denoisers=("unet",)),
    Family("I2VGen-XL", build.i2vgen_xl, i2vgen_xl_inputs, 0.64, 2, denoisers=("unet",)),
    Family("CogVideoX", build.cogvideox, cogvideox_inputs, 0.64, 2),
    Family("Wan 2.1", build.wan_2_1, text_inputs, 0.9, 2),
    Family(
        "Wan 2.2-A14B",
        build.wan_2_2_a14b,
        text_inputs,
        0.8,
        4,
        steps=8,
        denoisers=("transformer", "transformer_2"),
    ),
    Family("Wan 2.2-5B", build.wan_2_2_5b, larger_text_inputs, 0.8, 2),
    Family("LTX", build.ltx, larger_text_inputs, 0.64, 2),
    Family("LTX-2", build.ltx_2, ltx_2_inputs, 0.64, 2),
    Family("Hunyuan", build.hunyuan, hunyuan_inputs, 0.9, 2),
    Family("Hunyuan 1.5", build.hunyuan_1_5, hunyuan_1_5_inputs, 0.9, 2),
    Family("SkyReels-V2", build.skyreels_v2, text_inputs, 0.9, 2),
    Family("Kandinsky 5", build.kandinsky_5, kandinsky_5_inputs, 0.9, 2),
)

NEWER = (
    Family("Kandinsky 6", tiny_newer.kandinsky_6, kandinsky_6_inputs, 0.9, 2),
    Family("SkyReels-V2 DF", tiny_newer.skyreels_v2_df, text_inputs, 0.9, 2),
    # A photo that is encoded, and two chunks, the first of which is encoded for the second.
    Family("AnyFlow", tiny_newer.anyflow, anyflow_inputs, 0.9, 2, pattern="cddcccddcc"),
    Family("ChronoEdit", tiny_newer.chronoedit, chronoedit_inputs, 0.9, 2),
    Family("Cosmos 2", tiny_newer.cosmos_2, cosmos_2_inputs, 0.64, 2),
    Family("Helios", tiny_newer.helios, helios_inputs, 0.7, 2, pattern="ddccddcc"),
    Family("FramePack", tiny_newer.framepack, framepack_inputs, 0.9, 2, pattern="ddccddcc"),
    Family("Motif", tiny_newer.motif, motif_inputs, 0.9, 2, has_batches=False),
    Family("Sana video", tiny_newer.sana_video, sana_video_inputs, 0.9, 2),
    Family("Wan 2.1 modular", tiny_modular.wan_2_1, text_inputs, 0.8, 2, has_batches=False),
    Family(
        "Wan 2.2-A14B modular",
        tiny_modular.wan_2_2,
        text_inputs,
        0.8,
        4,
        steps=8,
        denoisers=("transformer", "transformer_2"),
    ),
    Family("LTX modular", tiny_modular.ltx, larger_text_inputs, 0.64, 2),
    Family("LTX-2 modular", tiny_modular.ltx_2, ltx_2_modular_inputs, 0.64, 2),
    Family("LTX-2.5 modular", tiny_modular.ltx_2_5, ltx_2_modular_inputs, 0.64, 2),
    Family("Hunyuan 1.5 modular", tiny_modular.hunyuan_1_5, hunyuan_1_5_inputs, 0.9, 2),
    Family("Helios modular", tiny_modular.helios, one_chunk_inputs, 0.7, 2),
    Family(
        "MiniMax-H3",
        tiny_modular.minimax_h3,
        minimax_h3_inputs,
        0.9,
        2,
        steps=3,
        has_batches=False,
    ),
)


OURS = (
    Family("VideoCrafter", tiny_videocrafter, videocrafter_inputs, 0.6, 2, denoisers=("unet",)),
)

EVERY_FAMILY = (*FAMILIES, *NEWER, *OURS)


def tiny(family: Family) -> Any:
    """Build a pipeline, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = family.build()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    show_progress(pipeline, is_quiet=True)
    return pipeline


def generate(pipeline: Any, family: Family, *, batch: int = 1, **options: Any) -> torch.Tensor:
    """Make a batch of videos; latents, the same at every call with the same weights."""
    arguments = {
        "num_inference_steps": family.steps,
        "generator": torch.Generator().manual_seed(7),
        **family.inputs(batch),
        **options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)  # I2VGen-XL draws its image latents from the global generator
        if is_modular(pipeline):
            with without_decoding(pipeline):
                frames = pipeline(output="latents", **arguments)
        else:
            frames = pipeline(output_type="latent", **arguments).frames
    if isinstance(frames, list):  # FramePack lists what there was after each section
        frames = frames[-1]
    assert torch.isfinite(frames).all()
    return frames


def is_modular(pipeline: Any) -> bool:
    return "Modular" in type(pipeline).__name__


@contextmanager
def without_decoding(pipeline: Any) -> Iterator[None]:
    """Leave the last block of a modular pipeline out, for time."""
    blocks = pipeline._blocks.sub_blocks
    decoders = {name: blocks.pop(name) for name in list(blocks) if name.startswith("decode")}
    try:
        yield
    finally:
        blocks.update(decoders)


def weights_of(pipeline: Any, family: Family) -> dict[str, torch.Tensor]:
    """Copy the weights of every denoiser, named `transformer.<name>`."""
    return {
        f"{denoiser}.{name}": tensor.clone()
        for denoiser in family.denoisers
        for name, tensor in getattr(pipeline, denoiser).state_dict().items()
    }


def other_weights(pipeline: Any, family: Family, *, seed: int) -> dict[str, torch.Tensor]:
    """Copy the weights of every denoiser and move each of them a little."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in weights_of(pipeline, family).items()
    }


def load_weights(pipeline: Any, family: Family, weights: dict[str, torch.Tensor]) -> None:
    """Load weights named as by `weights_of`, the way a checkpoint is loaded."""
    for denoiser in family.denoisers:
        parts = ((name.partition("."), value) for name, value in weights.items())
        own = {name: value for (module, _, name), value in parts if module == denoiser}
        getattr(pipeline, denoiser).load_state_dict(own)
