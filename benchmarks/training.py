"""What a training step costs: the official one restated, beside cached ones, in one run.

    python benchmarks/training.py                                # mid-size, about four core-minutes
    python benchmarks/training.py --scale 1 --size 320 512       # full size: a GPU with 80 GB

A DynamiCrafter with random weights; `--scale` is its width beside the official one, its depth is
the official one's. The official step decodes 16 frames of a 1280 x 720 clip, encodes them and
trains all of the U-Net and image projector with gradient checkpointing. Steps of the kinds take
turns, so that what else the machine does falls on all alike. CPU seconds on a CPU, wall seconds on
a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CLIPTextModel, CLIPVisionModel, PreTrainedTokenizerFast

from motionmerge import load_photo
from motionmerge.io.clips import survey_clip
from motionmerge.io.decoding import ClipPlace
from motionmerge.io.video import write_video
from motionmerge.models.dynamicrafter.encoders import image_encoder_config, text_encoder_config
from motionmerge.models.dynamicrafter.image_projector import ImageProjector
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.training.clip_run import open_clip_run
from motionmerge.training.clips_manifest import ClipShot, TrainingClip, write_clips_manifest
from motionmerge.training.parameters import choose_parameters
from motionmerge.training.run_config import RunConfig
from motionmerge.training.run_model import groups_of, load_model
from motionmerge.training.while_training import checkpointing

KINDS: dict[str, dict[str, Any]] = {
    "official, restated": {"trains": "all", "cache": False, "checkpointing": True},
    "cached": {"trains": "all", "cache": True, "checkpointing": True},
    "cached, adapter + temporal, checkpointing": {
        "trains": "adapter", "cache": True, "checkpointing": True,
    },
    "cached, adapter + temporal": {"trains": "adapter", "cache": True, "checkpointing": False},
}  # fmt: skip
PARTS = ("draw", "encode", "forward", "backward", "optimizer")
NUM_FRAMES, TOKENS = 16, 77


def wide(channels: int, scale: float) -> int:
    return max(32, round(channels * scale / 32) * 32)


def save_model(folder: Path, scale: float) -> None:
    torch.manual_seed(0)
    width, image_width = wide(1024, scale), wide(1280, scale)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")),
        pad_token="[PAD]", unk_token="[UNK]", model_max_length=TOKENS,
    )  # fmt: skip
    unet = DynamiCrafterUNet(
        block_out_channels=tuple(wide(one, scale) for one in (320, 640, 1280, 1280)),
        attention_head_dim=32 if scale < 1 else 64,
        cross_attention_dim=width,
    )
    channels = tuple(wide(one, scale) for one in (128, 256, 512, 512))
    DynamiCrafterPipeline(
        unet=unet.eval(),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=channels,
            layers_per_block=2,
            scaling_factor=0.18215,
        ).eval(),
        text_encoder=CLIPTextModel(
            text_encoder_config(
                width=width, heads=width // 32, vocab_size=2, num_tokens=TOKENS
            )
        ).eval(),
        tokenizer=tokenizer,
        image_encoder=CLIPVisionModel(
            image_encoder_config(width=image_width, heads=image_width // 32)
        ).eval(),
        image_projector=ImageProjector(
            embed_dims=image_width, output_dims=width, hidden_dims=width, dim_head=32,
            heads=width // 64, num_frames=NUM_FRAMES,
        ).eval(),
        scheduler=DynamicRescaleDDIMScheduler(),
    ).save_pretrained(folder)  # fmt: skip


def save_clip(folder: Path) -> Path:
    """A photo that moves, 1280 x 720, 130 frames."""
    photo = load_photo("chelsea").resize((1700, 900))
    frames = np.stack([np.asarray(photo)[:720, 3 * i : 3 * i + 1280] for i in range(130)])
    place = ClipPlace(folder / "a.mp4")
    write_video(place.path, frames, fps=25, crf=20)
    clip = TrainingClip(
        name="a.mp4", place=place, clip="0" * 64, num_bytes=place.path.stat().st_size,
        caption="a cat", size=(720, 1280), times=survey_clip(place).times,
        shots=(ClipShot(0, len(frames), 9.0),),
    )  # fmt: skip
    manifest = folder / "clips.jsonl"
    write_clips_manifest(manifest, [clip], folder=folder)
    return manifest


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def stepper(
    folder: Path, manifest: Path, size: tuple[int, int], kind: dict[str, Any]
) -> Callable[[int], dict[str, float]]:
    """Prepare a kind of step; a step returns the seconds of its parts."""
    run = open_clip_run(
        RunConfig.model_validate(
            {
                "model": str(folder / "model"),
                "trains": kind["trains"],
                "data": {
                    "folder": manifest.parent, "manifest": manifest, "sizes": [size],
                    "num_frames": NUM_FRAMES, "frame_stride": [1, 6], "views": 2,
                    "cache": kind["cache"], "cache_folder": folder / "views",
                },
                "settings": {"steps": 1, "batch_size": 1, "precision": "fp32"},
                "output": folder / "run",
            }
        )
    )  # fmt: skip
    model = load_model(run.folder, run.config, dtype=run.frozen_dtype)
    denoiser = model.denoiser
    trained = choose_parameters(denoiser, groups_of(run.folder), kind["trains"])
    objective = run.objective(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser.to(device).train()
    objective.to(device)
    optimizer = torch.optim.AdamW(trained.parameters, 1e-5)

    def step(index: int) -> dict[str, float]:
        times = [clock()]
        drawn = objective.draw([index])
        times.append(clock())
        prepared = objective.prepare(drawn)
        times.append(clock())
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = objective.loss(denoiser, *prepared)
        times.append(clock())
        loss.backward()
        times.append(clock())
        torch.nn.utils.clip_grad_norm_(trained.parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock())
        return {part: times[n + 1] - times[n] for n, part in enumerate(PARTS)}

    def checkpointed(index: int) -> dict[str, float]:
        with checkpointing(denoiser):
            return step(index)

    return checkpointed if kind["checkpointing"] else step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=0.3)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128))
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "clips").mkdir()
        manifest = save_clip(folder / "clips")
        save_model(folder / "model", given.scale)
        size = (given.size[0], given.size[1])
        steps = {name: stepper(folder, manifest, size, kind) for name, kind in KINDS.items()}
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in KINDS}
        for index in range(given.steps + 1):
            for name, step in steps.items():
                parts = step(index)
                if index:  # the first allocates
                    seen[name].append(parts)
    official = statistics.median(sum(one.values()) for one in seen["official, restated"])
    print(f"| {given.size[0]}x{given.size[1]}, n={given.steps} | s (least - most) | times faster | "
          + " | ".join(PARTS) + " |")  # fmt: skip
    print("|" + "---|" * (3 + len(PARTS)))
    for name, rows in seen.items():
        totals = [sum(one.values()) for one in rows]
        middle = statistics.median(totals)
        middles = [statistics.median(one[part] for one in rows) for part in PARTS]
        print(
            f"| {name} | {middle:.2f} ({min(totals):.2f} - {max(totals):.2f}) | "
            f"{official / middle:.2f} | " + " | ".join(f"{one:.2f}" for one in middles) + " |"
        )


if __name__ == "__main__":
    main()
