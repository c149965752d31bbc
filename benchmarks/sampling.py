"""Seconds and memory of a two-expert DynamiCrafter video, against the official procedure.

    python benchmarks/sampling.py --rounds 3
    python benchmarks/sampling.py --size full --device cuda --json

Every row is a process of its own on the same random weights, noise and tokens. The first is the
official procedure restated: two models in memory, two forward passes for guidance, attention by
explicit products, tokens repeated for every frame and their keys computed in every step, and one
frame encoded once for each frame. Each following row keeps what the row before it saves, up to
`motionmerge`, which the last rows vary. Ratio: its seconds over the first row's, within the same
round. fp32 rows report the greatest error of the latents, relative to their greatest entry; bf16
rows the PSNR of the video. Rows of ours also have the seconds of the two switches of a video. On a
CPU without bf16 products the bf16 rows are left out: they would measure their emulation.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from motionmerge import Checkpoint, experts
from motionmerge.models.dynamicrafter.cross_attention import CrossContext
from motionmerge.models.dynamicrafter.image_projector import ImageProjector
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.dynamicrafter_pipeline import DynamiCrafterPipeline
from motionmerge.sampling.guidance import guided_prediction

BOUNDARY = 0.64  # noise level
GUIDANCE = {"guidance_scale": 7.5, "guidance_rescale": 0.7}
TEXT_TOKENS, FRAMES = 77, 16


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
    is_ours: bool = False
    keeps_keys: bool = True
    channels_last: bool = False
    compiles: bool = False


def rows() -> list[Row]:
    """The official procedure, what each change saves on top of the ones before, and ours."""
    steps = ("one model", "one encode", "batched guidance", "SDPA")
    made = [Row("official procedure")]
    made += [Row(f"+ {name}", frozenset(steps[: i + 1])) for i, name in enumerate(steps)]
    made.append(Row("+ text not repeated", is_ours=True, keeps_keys=False))
    made.append(Row("+ keys kept: motionmerge", is_ours=True))
    made.append(Row("motionmerge, channels last", is_ours=True, channels_last=True))
    made.append(Row("motionmerge, compiled", is_ours=True, compiles=True))
    made.append(Row("motionmerge, bf16", dtype=torch.bfloat16, is_ours=True))
    made.append(
        Row("motionmerge, bf16, compiled", dtype=torch.bfloat16, is_ours=True, compiles=True)
    )
    return made


class Towers(ModelMixin):
    """Stands where the pipeline keeps its text and image towers; tokens are passed in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


def build(size: Size) -> DynamiCrafterPipeline:
    """A DynamiCrafter of this size with random weights, all of them in use."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
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
    return DynamiCrafterPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=Towers(),
        tokenizer=None,
        image_encoder=Towers(),
        image_projector=ImageProjector(num_frames=FRAMES),
        scheduler=DynamicRescaleDDIMScheduler(),
        height=size.height,
        width=size.width,
    )


def write_experts(size: Size, folder: Path) -> None:
    """Save the weights of the two experts, a small step apart."""
    from safetensors.torch import save_file

    weights = build(size).unet.state_dict()
    save_file(weights, folder / "early.safetensors")
    generator = torch.Generator().manual_seed(1)
    for weight in weights.values():
        weight += 0.02 * weight.std().nan_to_num() * torch.randn(weight.shape, generator=generator)
    save_file(weights, folder / "late.safetensors")


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


class ExplicitAttention:
    """Attention by two matrix products, tokens repeated for every frame, as the official code."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: CrossContext | None = None,
        attention_mask: None = None,
    ) -> torch.Tensor:
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            out = self.attend(attn, query, attn.to_k(hidden_states), attn.to_v(hidden_states))
            return attn.to_out[1](attn.to_out[0](out))
        ip = attn.own_processor
        text, image = encoder_hidden_states.text, encoder_hidden_states.image
        text = text.repeat_interleave(len(hidden_states) // len(text), 0)
        out = self.attend(attn, query, attn.to_k(text), attn.to_v(text))
        out = out + self.attend(attn, query, ip.to_k_ip[0](image), ip.to_v_ip[0](image))
        return attn.to_out[1](attn.to_out[0](out))

    @staticmethod
    def attend(attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        weights = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("bhij,bhjd->bhid", weights.softmax(-1), v)
        return out.transpose(1, 2).flatten(2)


class RepeatedTokensAttention(ExplicitAttention):
    """The same with torch's fused kernel."""

    @staticmethod
    def attend(attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


def set_attention(unet: DynamiCrafterUNet, processor: ExplicitAttention) -> None:
    """Use a processor everywhere; the image branch's parameters stay with their module."""
    from diffusers.models.attention_processor import Attention

    for module in unet.modules():
        if isinstance(module, Attention):
            object.__setattr__(module, "own_processor", module.processor)
            kept = module._modules.pop("processor", None)
            if kept is not None:
                module.own_modules = torch.nn.ModuleList([kept])
            module.processor = processor


def restated(
    pipeline: DynamiCrafterPipeline, inputs: Inputs, row: Row, size: Size, folder: Path
) -> torch.Tensor:
    """The official procedure, less the savings of the row; returns latents."""
    from safetensors.torch import load_file

    device = inputs.noise.device
    early = pipeline.unet
    files = {name: folder / f"{name}.safetensors" for name in ("early", "late")}
    early.load_state_dict(load_file(files["early"]))
    late = early
    if "one model" not in row.savings:
        late = copy.deepcopy(early)
        late.load_state_dict(load_file(files["late"]))
    else:
        changed = {name: tensor.to(device) for name, tensor in load_file(files["late"]).items()}
    kind = RepeatedTokensAttention if "SDPA" in row.savings else ExplicitAttention
    for unet in dict.fromkeys((early, late)):
        set_attention(unet, kind())
    pixels = inputs.image * 2 - 1
    num_encodes = 1 if "one encode" in row.savings else FRAMES
    encoded = [
        pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        for _ in range(num_encodes)
    ]
    image_latents = torch.stack(encoded * (FRAMES // num_encodes), dim=2)
    latents = inputs.noise
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(size.steps)
    own = dict(early.named_parameters())
    for timestep in scheduler.timesteps:
        abar = scheduler.alphas_cumprod[timestep].double()
        level = float((1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt()))
        if level <= BOUNDARY and late is early and changed:
            with torch.no_grad():
                for name, tensor in changed.items():
                    own[name.replace("processor.", "own_modules.0.")].copy_(tensor)
            changed = {}
        unet = early if level > BOUNDARY else late
        sample = torch.cat([latents, image_latents], dim=1)
        if "batched guidance" in row.savings:
            both = unet(torch.cat([sample] * 2), timestep, inputs.tokens, 24.0, return_dict=False)
            unconditional, conditional = both[0].chunk(2)
        else:
            unconditional, conditional = (
                unet(sample, timestep, tokens[None], 24.0, return_dict=False)[0]
                for tokens in inputs.tokens
            )
        prediction = guided_prediction(conditional, unconditional, **GUIDANCE)
        latents = scheduler.step(prediction, timestep, latents, eta=0.0, return_dict=False)[0]
    return latents


def ours(
    pipeline: DynamiCrafterPipeline, inputs: Inputs, row: Row, size: Size, folder: Path
) -> torch.Tensor:
    """The pipeline as a user calls it, with two experts; returns latents."""
    if row.channels_last:
        for module in pipeline.unet.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.to(memory_format=torch.channels_last)
    if row.compiles:
        pipeline.unet.compile()
    text, image = inputs.tokens.split([TEXT_TOKENS, inputs.tokens.shape[1] - TEXT_TOKENS], dim=1)
    pipeline.encode_image = lambda images, frames: image[:1].expand(len(images), -1, -1)
    pipeline._project = lambda tokens: tokens
    options = {
        "prompt_embeds": text[1:],
        "negative_prompt_embeds": text[:1],
        "image_embeds": image[1:],
        "latents": inputs.noise,
        "num_inference_steps": size.steps,
        "eta": 0.0,
        "output_type": "latent",
        **GUIDANCE,
    }
    if not row.keeps_keys:  # a callback may have changed the weights, so nothing is kept
        options["callback_on_step_end"] = lambda *_: {}
    both = {name: Checkpoint.load(folder / f"{name}.safetensors") for name in ("early", "late")}
    with experts(pipeline, experts=both, boundary=BOUNDARY, module="unet") as bank:
        if row.compiles:  # compiled once, then used for every video
            pipeline(inputs.image, **(options | {"num_inference_steps": 2}))
        started, cpu_started = time.perf_counter(), time.process_time()
        latents = pipeline(inputs.image, **options).frames
        pipeline.seconds = seconds_since(started)
        pipeline.cpu_seconds = time.process_time() - cpu_started
        started = time.perf_counter()
        with bank.with_expert("early"):  # the late one is in place: a switch here, and one back
            pass
        pipeline.switch_seconds = seconds_since(started)
    return latents


def seconds_since(started: float) -> float:
    """The seconds until all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def run_row(row: Row, size: Size, folder: Path, device: str) -> dict[str, float]:
    """Make one video; saves its latents and frames into the folder."""
    pipeline = build(size)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.image_encoder):
        part.to(device, row.dtype)
    inputs = Inputs.draw(size, pipeline, device)
    started, cpu_started = time.perf_counter(), time.process_time()
    latents = (ours if row.is_ours else restated)(pipeline, inputs, row, size, folder)
    result = {
        "seconds": getattr(pipeline, "seconds", seconds_since(started)),
        "cpu_seconds": getattr(pipeline, "cpu_seconds", time.process_time() - cpu_started),
    }
    if row.is_ours:
        result["switch_seconds"] = pipeline.switch_seconds
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    video = pipeline.decode_latents(latents.to(device), inputs.image)
    torch.save({"latents": latents.cpu(), "video": video.cpu()}, folder / f"{row.name}.pt")
    return {**result, "peak_mb": peak}


def compare(row: Row, reference: Row, folder: Path) -> dict[str, float]:
    """Error of a row's output with respect to the first row's."""
    mine, theirs = (torch.load(folder / f"{one.name}.pt") for one in (row, reference))
    if row.dtype == torch.float32:
        error = (mine["latents"] - theirs["latents"]).abs().max() / theirs["latents"].abs().max()
        return {"max_error": float(error)}
    return {"psnr_db": float(-10 * (mine["video"] - theirs["video"]).square().mean().log10())}


def switches(runs: list[dict[str, float]]) -> dict[str, float]:
    """The seconds of both switches of a video, where there are experts of ours."""
    seconds = [run["switch_seconds"] for run in runs if "switch_seconds" in run]
    return {"switch_seconds": statistics.median(seconds)} if seconds else {}


def bf16_slowdown(device: str) -> float:
    """How many times longer a matrix product takes in bf16 than in fp32."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        one = torch.ones(512, 512, dtype=dtype, device=device)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            one @ one
            times.append(seconds_since(started))
        seconds.append(min(times))
    return seconds[1] / seconds[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="rows whose name contains this, besides the first")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SIZES[options.size]
    if options.row:
        row = next(one for one in rows() if one.name == options.row)
        print(json.dumps(run_row(row, size, options.folder, options.device)))
        return
    chosen = [one for one in rows() if not options.only or options.only in one.name]
    slowdown = bf16_slowdown(options.device)
    if slowdown > 2:
        print(
            f"bf16 rows left out: a matrix product takes {slowdown:.0f} times as long as in fp32 "
            "here, so this processor does not compute in bf16",
            file=sys.stderr,
        )
        chosen = [one for one in chosen if one.dtype != torch.bfloat16]
    chosen = list(dict.fromkeys([rows()[0], *chosen]))
    found: dict[str, list[dict[str, float]]] = {row.name: [] for row in chosen}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_experts(size, folder)
        for _ in range(options.rounds):
            for row in chosen:
                command = [sys.executable, __file__, "--row", row.name, "--folder", name]
                command += ["--size", options.size, "--device", options.device]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{row.name}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
                    continue
                result = json.loads(done.stdout.splitlines()[-1])
                found[row.name].append(result)
                print(row.name, {**result, **compare(row, chosen[0], folder)}, file=sys.stderr)
        table = []
        for row in chosen:
            if not found[row.name]:
                continue
            pairs = zip(found[row.name], found[chosen[0].name], strict=False)
            table.append(
                {
                    "name": row.name,
                    "seconds": statistics.median(one["seconds"] for one in found[row.name]),
                    "cpu_seconds": statistics.median(o["cpu_seconds"] for o in found[row.name]),
                    "ratio": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
                    "peak_mb": max(one["peak_mb"] for one in found[row.name]),
                    **switches(found[row.name]),
                    **compare(row, chosen[0], folder),
                }
            )
    if options.json:
        print(json.dumps(table))
        return
    print(f"{'':32}{'seconds':>9}{'ratio':>7}{'peak MB':>9}   error")
    for line in table:
        error = f"{line['max_error']:.1e}" if "max_error" in line else f"{line['psnr_db']:.0f} dB"
        print(
            f"{line['name']:32}{line['seconds']:9.2f}{line['ratio']:7.2f}{line['peak_mb']:9.0f}   "
            f"{error:9}{share(line)}"
        )


def share(line: dict[str, Any]) -> str:
    """What part of a video's time the switches take."""
    if "switch_seconds" not in line:
        return ""
    return f"{100 * line['switch_seconds'] / line['seconds']:.2f} % switching"


if __name__ == "__main__":
    main()
