"""Build the pocket model and load its shipped weights.

The classes are DynamiCrafter's (U-Net with temporal adapter, image projector, scheduler, CLIP
towers) in a small configuration; only the autoencoder is the pocket model's own. Weights are four
kinds of files in `weights/`: `towers` (text and image tower), `decoder` (autoencoder), and one file
of U-Net and image projector for each trained variant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPVisionModel

from motionmerge.errors import CheckpointError
from motionmerge.io.quantised import refuse_quantised
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.models.dynamicrafter.image_projector import ImageProjector
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet

from .autoencoder import IMAGE_CHANNELS, LATENT_CHANNELS, PocketAutoencoder
from .text import MAX_TOKENS, PocketTokenizer
from .towers import WIDTH, build_image_encoder, build_text_encoder

VARIANTS = ("base", "tuned", "naive", "equal")
IMAGE_TOKENS = 4  # a frame


@dataclass(frozen=True, kw_only=True)
class PocketModel:
    """All parts of the pocket model, as modules."""

    unet: DynamiCrafterUNet
    image_projector: ImageProjector
    text_encoder: CLIPTextModel
    image_encoder: CLIPVisionModel
    autoencoder: PocketAutoencoder
    tokenizer: PocketTokenizer
    scheduler: DynamicRescaleDDIMScheduler


@contextlib.contextmanager
def attention_kernel(device: torch.device) -> Iterator[None]:
    """Return the attention kernel to run the pocket model with.

    Its sequences have a few tokens: on a CPU, plain matrix products beat the fused kernel (84
    against 126 ms a sample in one bf16 training step, measured once on a shared core), and they
    need not be done in fp32 when the inputs are bf16 (81 against 95 ms, likewise).
    """
    if device.type != "cpu":
        yield
        return
    kept = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # the CPU heeds it too
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(kept)


def pocket_scheduler() -> DynamicRescaleDDIMScheduler:
    """Build the scheduler that the model denoises with."""
    return DynamicRescaleDDIMScheduler(base_scale=1.0)


NUM_KEYFRAMES = 8
"""Frames that have latents."""


def build_denoiser() -> tuple[DynamiCrafterUNet, ImageProjector]:
    """Build what experts switch, with random weights: the U-Net and the image projector."""
    unet = DynamiCrafterUNet(
        in_channels=LATENT_CHANNELS + IMAGE_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 64),
        attention_levels=(True, True),
        layers_per_block=1,
        attention_head_dim=16,
        cross_attention_dim=WIDTH,
        num_text_tokens=MAX_TOKENS,
        num_image_tokens=IMAGE_TOKENS,
        dropout=0.0,
        norm_num_groups=8,
    )
    projector = ImageProjector(
        embed_dims=WIDTH,
        output_dims=WIDTH,
        hidden_dims=WIDTH,
        depth=1,
        dim_head=16,
        heads=4,
        num_queries=IMAGE_TOKENS,
        num_frames=NUM_KEYFRAMES,
    )
    return unet, projector


def build_pocket_model(*, with_adapter: bool = True, seed: int = 0) -> PocketModel:
    """Build the pocket model with random weights drawn from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        autoencoder = PocketAutoencoder(num_keyframes=NUM_KEYFRAMES)
        unet, projector = build_denoiser()
        model = PocketModel(
            unet=unet,
            image_projector=projector,
            text_encoder=build_text_encoder(),
            image_encoder=build_image_encoder(),
            autoencoder=autoencoder,
            tokenizer=PocketTokenizer(),
            scheduler=pocket_scheduler(),
        )
    if with_adapter:
        add_pocket_adapter(unet)
    for module in (unet, projector, model.text_encoder, model.image_encoder, autoencoder):
        module.eval()
    return model


def add_pocket_adapter(unet: DynamiCrafterUNet) -> None:
    """Add the temporal adapter in the pocket model's size, as the identity."""
    unet.add_temporal_adapter(num_frames=NUM_KEYFRAMES, num_heads=4, head_dim=16)


def weights_path(name: str) -> Path:
    """Return the path of a shipped weights file: a variant's, `towers` or `decoder`.

    Raises:
        CheckpointError: there is no such file.
    """
    folder = Path(__file__).parent / "weights"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors"))) or "nothing"
        raise CheckpointError(
            f"The pocket model has no weights named {name!r}; shipped are: {there}",
            fix="Choose one of these, or train it: `motionmerge train --help`.",
        )
    return path


def load_towers(model: PocketModel, path: Path | str | None = None) -> None:
    """Load text and image tower, the shipped ones by default."""
    parts = {"text_encoder": model.text_encoder, "image_encoder": model.image_encoder}
    load_parts(parts, path or weights_path("towers"))


def load_decoder(model: PocketModel, path: Path | str | None = None) -> None:
    """Load the autoencoder's decoder, the shipped one by default."""
    load_parts({"autoencoder": model.autoencoder}, path or weights_path("decoder"))


def load_denoiser(model: PocketModel, path: Path | str) -> None:
    """Load U-Net and image projector from a weights file or a merged expert."""
    load_parts(denoiser_parts(model), path)


def denoiser_parts(model: PocketModel) -> dict[str, nn.Module]:
    """Name U-Net and image projector as files do."""
    return {"unet": model.unet, "image_projector": model.image_projector}


def load_parts(parts: Mapping[str, nn.Module], path: Path | str) -> None:
    """Load tensors named `<part>.<parameter>` into the parts that the file speaks of.

    Raises:
        CheckpointError: the file speaks of other parts, or not of all parameters of one.
    """
    with open_weights(path) as reader:
        refuse_quantised(reader, reader.metadata, called=str(path))
        weights = {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118
    fill_parts(parts, weights, path=path)


def fill_parts(
    parts: Mapping[str, nn.Module], weights: Mapping[str, torch.Tensor], *, path: Path | str
) -> None:
    """Load tensors that were read from a file into parts; see `load_parts`."""
    found = {name.partition(".")[0] for name in weights}
    if not found <= set(parts):
        raise CheckpointError(
            f"{path} holds parts {sorted(found)}, expected some of {sorted(parts)}",
            fix="Use a file written by `motionmerge train` or `motionmerge merge`.",
        )
    for part in found:
        prefix = f"{part}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        try:
            _without_wrapper(parts[part]).load_state_dict(own)
        except RuntimeError as error:
            raise CheckpointError(
                f"{path} does not fit the pocket model's {part}: {error}",
                fix="Use a file made for this version of the pocket model.",
            ) from error


def _without_wrapper(module: nn.Module) -> nn.Module:
    """Return the tower itself, which transformers before 5.6 wraps in a module of another name."""
    for name in ("text_model", "vision_model"):
        module = getattr(module, name, module)
    return module


class HasDenoiser(Protocol):
    """The parts that fine-tuning changes: a `PocketModel` has them, and a pipeline of it."""

    @property
    def unet(self) -> nn.Module: ...
    @property
    def image_projector(self) -> nn.Module: ...


def denoiser_weights(model: HasDenoiser) -> dict[str, torch.Tensor]:
    """Return the weights of U-Net and image projector under their file names."""
    weights = {f"unet.{n}": w for n, w in model.unet.state_dict().items()}
    return weights | {
        f"image_projector.{n}": w for n, w in model.image_projector.state_dict().items()
    }


def save_half(path: Path, weights: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write weights in fp16, as they are shipped."""
    save_weights(path, {name: w.detach().half() for name, w in weights.items()}, metadata)
