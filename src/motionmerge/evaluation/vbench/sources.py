"""The files that each dimension needs, and the networks built from them.

Nothing is downloaded. MUSIQ, AMT-S and CoTracker come as a Python file of the user's, because the
licences of their code do not let us ship it; its bytes are hashed like weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.evaluation.backbones.dreamsim import DreamSim, build_dreamsim
from motionmerge.evaluation.backbones.protocol import hash_sources, read_state
from motionmerge.evaluation.backbones.raft import Raft, build_raft
from motionmerge.evaluation.backbones.vision import VisionTower, build_tower
from motionmerge.io.hashing import hash_file
from motionmerge.io.json_file import read_json

SOURCES: Mapping[str, str] = {
    "dino": "DINO ViT-B/16: dino_vitbase16_pretrain.pth, or the folder of facebook/dino-vitb16",
    "clip-b32": "CLIP ViT-B/32: the folder of openai/clip-vit-base-patch32",
    "clip-l14": "CLIP ViT-L/14: the folder of openai/clip-vit-large-patch14",
    "aesthetic": "LAION's linear head: sa_0_4_vit_l_14_linear.pth",
    "dreamsim-dino": "DreamSim's DINO branch: dino_vitb16_pretrain.pth of its release",
    "dreamsim-clip": "DreamSim's CLIP branch: clip_vitb16_pretrain.pth.tar of its release",
    "dreamsim-open-clip": "DreamSim's open_clip branch: open_clip_vitb16_pretrain.pth.tar",
    "dreamsim-lora": "the folder of DreamSim's ensemble LoRA, with adapter_config.json",
    "raft": "RAFT: raft-things.pth",
}
"""What each name of a weights file stands for."""

PLUGINS: Mapping[str, tuple[str, str]] = {
    "amt": ("in_between", "AMT-S: in_between(first, second) -> the frame between, uint8"),
    "musiq": ("quality", "MUSIQ (SPAQ): quality(frames in [0, 1]) -> 0..100 for each"),
    "cotracker": ("track", "CoTracker 2: track(frames in 0..255) -> [frames, 100, 2]"),
}
"""The function that a plugin's file must have, and what it stands for."""

NEEDS: Mapping[str, tuple[str, ...]] = {
    "i2v_subject": ("dino",),
    "i2v_background": ("dreamsim-dino", "dreamsim-clip", "dreamsim-open-clip", "dreamsim-lora"),
    "camera_motion": ("cotracker",),
    "subject_consistency": ("dino",),
    "background_consistency": ("clip-b32",),
    "motion_smoothness": ("amt",),
    "dynamic_degree": ("raft",),
    "aesthetic_quality": ("clip-l14", "aesthetic"),
    "imaging_quality": ("musiq",),
    "temporal_flickering": (),
}


@dataclass(frozen=True)
class Networks:
    """The files that a user gave.

    Attributes:
        paths: By the names of `SOURCES` and `PLUGINS`.
        num_heads: Heads of the vision transformers where not the width over 64, by name.
        device: Where the networks compute, `cpu` or `cuda`; plugins choose for themselves.
    """

    paths: Mapping[str, Path]
    num_heads: Mapping[str, int]
    device: str = "cpu"

    def __post_init__(self) -> None:
        known = {**SOURCES, **PLUGINS}
        for name, path in self.paths.items():
            if name not in known:
                raise ConfigError(
                    f"`{name}` is no network of VBench-I2V.", fix=f"Use one of {', '.join(known)}."
                )
            if not path.exists():
                raise ConfigError(f"There is no {path} for `{name}`.", fix="Check the path.")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"`{self.device}` is no device.", fix="Use `cpu` or `cuda`.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("PyTorch sees no GPU here.", fix="Use device='cpu'.")

    def missing_for(self, dimension: str) -> tuple[str, ...]:
        """Return the names of files that a dimension still needs."""
        return tuple(name for name in NEEDS[dimension] if name not in self.paths)

    def hashes(self, dimension: str) -> dict[str, str]:
        """Return the SHA-256 of every file that a dimension is measured with.

        Raises:
            CheckpointError: One cannot be read.
        """
        found = {}
        for name in NEEDS[dimension]:
            path = self.paths[name]
            try:
                found[name] = f"sha256:{hash_file(path)}" if path.is_file() else _folder_hash(path)
            except OSError as error:
                raise CheckpointError(f"Cannot read {path}: {error}", fix="Check it.") from error
        return found

    def dino(self) -> VisionTower:
        """Build DINO ViT-B/16."""
        return self._tower("dino", activation="gelu", epsilon=1e-6)

    def clip(self, name: str) -> VisionTower:
        """Build CLIP's image tower `clip-b32` or `clip-l14`."""
        return self._tower(name, activation="quick_gelu", epsilon=1e-5)

    def dreamsim(self) -> DreamSim:
        """Build DreamSim's ensemble.

        Raises:
            CheckpointError: A file is another's, or the adapter does not give `lora_alpha`.
        """
        branches = [read_state(self.paths[name]) for name in NEEDS["i2v_background"][:3]]
        folder = self.paths["dreamsim-lora"]
        config = read_json((folder if folder.is_dir() else folder.parent) / "adapter_config.json")
        alpha = config.get("lora_alpha")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise CheckpointError(
                f"{folder}: adapter_config.json gives lora_alpha as {alpha!r}.",
                fix="Give the folder of DreamSim's LoRA as it was released.",
            )
        lora = read_state(folder)
        num_heads = self.num_heads.get("dreamsim-dino")
        network = build_dreamsim(branches, lora, alpha=alpha, num_heads=num_heads)
        for tower in network.towers:
            tower.to(self.device)
        return network

    def raft(self) -> Raft:
        """Build RAFT."""
        path = self.paths["raft"]
        return build_raft(read_state(path), source=str(path)).to(self.device)

    def aesthetic_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read LAION's head: weight `[1, 768]` and bias `[1]`.

        Raises:
            CheckpointError: The file holds another head.
        """
        state = read_state(self.paths["aesthetic"])
        if set(state) != {"weight", "bias"} or state["weight"].shape != (1, 768):
            raise CheckpointError(
                f"{self.paths['aesthetic']} is not LAION's head of 768 channels.",
                fix="Give sa_0_4_vit_l_14_linear.pth.",
            )
        return state["weight"], state["bias"]

    def plugin(self, name: str) -> Callable[..., Any]:
        """Run a plugin's file, which the user chose, and return its function.

        Raises:
            ConfigError: It cannot be run, or lacks the function.
        """
        path, (function, what) = self.paths[name], PLUGINS[name]
        spec = importlib.util.spec_from_file_location(f"motionmerge_plugin_{name}", path)
        if spec is None or spec.loader is None or path.suffix != ".py":
            raise ConfigError(f"{path} is no Python file.", fix=f"Write one for {what}.")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ConfigError(
                f"The plugin {path} fails: {type(error).__name__}: {error}", fix="Correct it."
            ) from error
        found = getattr(module, function, None)
        if not callable(found):
            raise ConfigError(f"{path} has no function {function}.", fix=f"Write {what}.")

        def called(*arguments: Any) -> Any:
            try:
                return found(*arguments)
            except Exception as error:
                raise ConfigError(
                    f"The plugin {path} fails: {type(error).__name__}: {error}", fix="Correct it."
                ) from error

        return called

    def _tower(self, name: str, *, activation: str, epsilon: float) -> VisionTower:
        path = self.paths[name]
        tower = build_tower(
            read_state(path),
            source=str(path),
            activation=activation,
            epsilon=epsilon,
            num_heads=self.num_heads.get(name),
        )
        return tower.to(self.device)


def _folder_hash(path: Path) -> str:
    (digest,) = hash_sources([path])
    return digest
