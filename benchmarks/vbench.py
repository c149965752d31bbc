"""What VBench-I2V's networks cost: seconds of a clip in each dimension, on the device at hand.

    python benchmarks/vbench.py                      # one core: CPU seconds
    python benchmarks/vbench.py --device cuda        # a GPU: seconds on the clock, and its memory

The networks have their published sizes and random weights, which cost the same: nothing is needed
and nothing is downloaded. Measured is what `evaluate vbench` does with a clip that is decoded. The
flow is held at zero, so that dynamic degree looks at every pair, which is the most that it takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from motionmerge.evaluation.backbones.dreamsim import DreamSim, build_dreamsim
from motionmerge.evaluation.backbones.raft import Raft
from motionmerge.evaluation.backbones.vision import VisionTower, build_tower
from motionmerge.evaluation.vbench.dimensions import Decoded, measure_of
from motionmerge.evaluation.vbench.frames import ERAS
from motionmerge.evaluation.vbench.sources import Networks
from motionmerge.evaluation.vbench.suite import SuiteClip

NETWORKS = {
    "i2v_subject": "DINO ViT-B/16, 224 x 224",
    "subject_consistency": "DINO ViT-B/16, 224 x 358",
    "background_consistency": "CLIP ViT-B/32",
    "aesthetic_quality": "CLIP ViT-L/14",
    "i2v_background": "DreamSim, three ViT-B/16",
    "dynamic_degree": "RAFT, 20 iterations",
    "temporal_flickering": "none",
}
LORA_RANK = 16


class RandomNetworks(Networks):
    """Networks of the published sizes, with random weights in place of files."""

    def dino(self) -> VisionTower:
        """DINO ViT-B/16."""
        state = tower_state(width=768, depth=12, patch=16)
        return build_tower(state, source="DINO", activation="gelu", epsilon=1e-6).to(self.device)

    def clip(self, name: str) -> VisionTower:
        """CLIP's image tower of either size."""
        sizes = {
            "clip-b32": {"width": 768, "depth": 12, "patch": 32, "output": 512},
            "clip-l14": {"width": 1024, "depth": 24, "patch": 14, "output": 768},
        }
        state = tower_state(**sizes[name])
        tower = build_tower(state, source=name, activation="quick_gelu", epsilon=1e-5)
        return tower.to(self.device)

    def dreamsim(self) -> DreamSim:
        """DreamSim's ensemble with its LoRA."""
        size = {"width": 768, "depth": 12, "patch": 16}
        branches = [tower_state(**size), *(tower_state(**size, output=512) for _ in range(2))]
        lora = {}
        for branch in range(3):
            for block in range(12):
                name = f"extractor_list.{branch}.model.blocks.{block}.attn.qkv"
                lora[f"{name}.lora_A.weight"] = 0.02 * torch.randn(LORA_RANK, 768)
                lora[f"{name}.lora_B.weight"] = 0.02 * torch.randn(3 * 768, LORA_RANK)
        network = build_dreamsim(branches, lora, alpha=LORA_RANK)
        for tower in network.towers:
            tower.to(self.device)
        return network

    def raft(self) -> Raft:
        """RAFT, whose flow stays zero."""
        network = Raft()
        state = network.state_dict()
        for name in state:
            if "flow_head.conv2" in name:
                state[name].zero_()
        network.load_state_dict(state)
        return network.to(self.device).eval()

    def aesthetic_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """LAION's linear layer."""
        return torch.randn(1, 768), torch.zeros(1)


def tower_state(
    *, width: int, depth: int, patch: int, output: int | None = None
) -> dict[str, torch.Tensor]:
    """Random tensors of a vision transformer, under the names of DINO's hub."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + (224 // patch) ** 2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if output is None:
        shapes["patch_embed.proj.bias"] = (width,)
    else:  # a CLIP
        shapes |= {"proj": (width, output), "pos_drop.weight": (width,), "pos_drop.bias": (width,)}
    layers = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for block in range(depth):
        for name, shape in layers.items():
            shapes[f"blocks.{block}.{name}.weight"] = shape
            shapes[f"blocks.{block}.{name}.bias"] = shape[:1]
    return {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}


def seconds_of(dimension: str, decoded: Decoded, *, device: str, repeats: int) -> dict[str, object]:
    """Time a clip in a dimension, after one that warms up a GPU."""
    measure = measure_of(dimension, RandomNetworks({}, {}, device), era=ERAS[0])
    found, is_gpu = [], device == "cuda"
    clock = time.perf_counter if is_gpu else time.process_time
    if is_gpu:
        measure(decoded)
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        begin = clock()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as `evaluate vbench`
            measure(decoded)
        if is_gpu:
            torch.cuda.synchronize()
        found.append(clock() - begin)
    memory = torch.cuda.max_memory_allocated() if is_gpu else None
    return {"dimension": dimension, "seconds": found, "gpu_bytes": memory}


def main() -> None:
    """Print a table, and write the rows as they come where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=tuple(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    what = torch.cuda.get_device_name() if options.device == "cuda" else "one core, CPU seconds"
    size = f"{options.frames} frames of {options.height} x {options.width}"
    print(f"{size}, torch {torch.__version__}, {what}: median (least to most) of {options.repeats}")
    rows = []
    with TemporaryDirectory() as folder:
        image = Path(folder) / "photo.png"
        frames = torch.randint(0, 256, (options.frames, options.height, options.width, 3))
        frames = frames.to(torch.uint8).numpy()
        Image.fromarray(frames[0]).save(image)
        clip = SuiteClip(
            path=Path("clip.mp4"), prompt="", dimensions=options.only, image=image, camera=None
        )
        for dimension in options.only:
            row = seconds_of(
                dimension,
                Decoded(clip, frames, 8.0),
                device=options.device,
                repeats=options.repeats,
            )
            rows.append({**row, "device": what, "size": size})
            if options.output is not None:
                options.output.write_text(json.dumps(rows, indent=1))
            own = row["seconds"]
            memory = f"{row['gpu_bytes'] / 1e9:8.2f} GB" if row["gpu_bytes"] else ""
            times = f"{statistics.median(own):8.3f} s ({min(own):.3f} to {max(own):.3f})"
            print(f"{dimension:24}{NETWORKS[dimension]:28}{times}{memory}", flush=True)


if __name__ == "__main__":
    main()
