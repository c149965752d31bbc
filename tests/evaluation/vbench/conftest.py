"""VBench's own clips and numbers, and networks with random weights by one rule.

Source of the numbers: VBench's own code (45e79ec) run on these clips with these weights. The rule:
RandomState(crc32(name) + seed), so that no network needs to be stored.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from motionmerge.evaluation.backbones.raft import Raft
from motionmerge.evaluation.vbench.sources import Networks

VECTORS = Path(__file__).parents[2] / "data" / "vbench.safetensors"
SEED = 11
_HALF = ("pos_embed", "positional_embedding", "cls_token", "class_embedding")

HILLS, WALL = "a valley of blue hills", "a patterned wall with a moving light"


def random_state(
    shapes: Mapping[str, Sequence[int]],
    *,
    seed: int = SEED,
    gains: Mapping[str, float] | None = None,
) -> dict[str, torch.Tensor]:
    """Draw the tensors of a network; the result depends on names and shapes alone."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
            continue
        random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
        value = _scaled(name, random.standard_normal(tuple(shape)))
        gain = next((gain for part, gain in (gains or {}).items() if part in name), 1.0)
        state[name] = torch.from_numpy(np.asarray(value * gain, dtype=np.float32))
    return state


def _scaled(name: str, z: np.ndarray) -> np.ndarray:
    if name.endswith("running_var"):
        return 1 + 0.25 * np.abs(z)
    if name.endswith("running_mean"):
        return 0.1 * z
    if any(part in name for part in _HALF):
        return 0.5 * z
    if z.ndim == 1:
        return 1 + 0.1 * z if name.endswith("weight") else 0.05 * z
    return z / np.sqrt(np.prod(z.shape[1:]))


def hub_shapes(*, width: int = 48, depth: int = 12, projection: int | None = None):
    """Names and shapes of DINO's hub; with a projection, of DreamSim's CLIP branches."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
    }
    if projection is not None:
        shapes |= {"pos_drop.weight": (width,), "pos_drop.bias": (width,)}
        shapes["proj"] = (width, projection)
    layers = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for number in range(depth):
        for name, shape in layers.items():
            shapes[f"blocks.{number}.{name}.weight"] = shape
            shapes[f"blocks.{number}.{name}.bias"] = shape[:1]
    return {**shapes, "norm.weight": (width,), "norm.bias": (width,)}


def openai_shapes(*, output: int, patch: int, width: int = 64, depth: int = 3):
    """Names and shapes of an OpenAI CLIP, with a tensor of its text tower."""
    shapes = {
        "text_projection": (width, output),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (1 + (224 // patch) ** 2, width),
        "visual.proj": (width, output),
        "visual.conv1.weight": (width, 3, patch, patch),
    }
    layers = {"ln_1": (width,), "attn.out_proj": (width, width), "ln_2": (width,)}
    layers |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    for number in range(depth):
        block = f"visual.transformer.resblocks.{number}"
        shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
        for name, shape in layers.items():
            shapes[f"{block}.{name}.weight"] = shape
            shapes[f"{block}.{name}.bias"] = shape[:1]
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.weight": (width,), f"visual.{norm}.bias": (width,)}
    return shapes


def lora_shapes(*, width: int = 48, depth: int = 12, rank: int = 4):
    """Names and shapes of DreamSim's adapter."""
    layers = [
        f"base_model.model.extractor_list.{branch}.model.blocks.{number}.attn.qkv.lora"
        for branch in range(3)
        for number in range(depth)
    ]
    a = {f"{layer}_A.weight": (rank, width) for layer in layers}
    return a | {f"{layer}_B.weight": (3 * width, rank) for layer in layers}


@pytest.fixture(scope="session")
def vbench(tmp_path_factory):
    """VBench's clips as files, its numbers, and every network of ours as a file."""
    folder = tmp_path_factory.mktemp("vbench")
    tensors = load_file(VECTORS)
    for name, value in tensors.items():
        if name.startswith("file/"):
            path = folder / name.removeprefix("file/")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(value.numpy().tobytes())
    branch = hub_shapes(projection=32)
    states = {
        "dino": random_state(hub_shapes()),
        "clip-b32": random_state(openai_shapes(output=32, patch=32)),
        "clip-l14": random_state(openai_shapes(output=768, patch=14)),
        "aesthetic": random_state({"weight": (1, 768), "bias": (1,)}, gains={"weight": 20}),
        "dreamsim-dino": random_state(hub_shapes()),
        "dreamsim-clip": random_state(branch, seed=SEED + 1),
        "dreamsim-open-clip": random_state(branch, seed=SEED + 2),
        "raft": random_state(
            {name: tuple(value.shape) for name, value in Raft().state_dict().items()},
            gains={"flow_head.conv2": 0.0983},
        ),
    }
    paths = {}
    for name, state in states.items():
        paths[name] = folder / f"{name}.safetensors"
        save_file(state, paths[name])
    paths["dreamsim-lora"] = folder / "lora"
    paths["dreamsim-lora"].mkdir()
    lora = random_state(lora_shapes(), gains={"lora_B": 0.5})
    save_file(lora, folder / "lora" / "adapter_model.safetensors")
    (folder / "lora" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    between = np.frombuffer(zlib.decompress(tensors["interpolated.zlib"].numpy()), np.uint8)
    return SimpleNamespace(
        folder=folder,
        videos=folder / "videos",
        images=folder / "images",
        states=states,
        networks=Networks(paths, {"dino": 3, "dreamsim-dino": 3}),
        flow=tensors["raft.flow_up_every_4th"],
        between=between.reshape(3, 128, 192, 3),
    )
