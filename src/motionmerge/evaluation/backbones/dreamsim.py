"""DreamSim's ensemble: three vision transformers with LoRA, as one feature vector.

Paper: Fu et al. 2023 (arXiv 2306.09344). Branches: DINO, OpenAI's CLIP, open_clip, all ViT-B/16.
The embedding is what its `normalize_embeds` makes: minus its mean over channels, unit length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from motionmerge.errors import CheckpointError
from motionmerge.evaluation.backbones.protocol import State
from motionmerge.evaluation.backbones.vision import VisionTower, build_tower

_DINO_MEAN, _DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BRANCHES = ("DINO", "CLIP", "open_clip")
_STATISTICS = ((_DINO_MEAN, _DINO_STD), (_CLIP_MEAN, _CLIP_STD), (_CLIP_MEAN, _CLIP_STD))
_LORA = re.compile(
    r".*extractor_list\.(\d)\.model\.(blocks\.\d+\.attn\.qkv)\.lora_([AB])\..*weight"
)


@dataclass(frozen=True)
class DreamSim:
    """The ensemble.

    Attributes:
        towers: DINO, CLIP and open_clip.
    """

    towers: Sequence[VisionTower]

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode frames `[frames, 3, 224, 224]` in [0, 1]: unit vectors `[frames, channels]`."""
        parts = []
        for tower, (mean, std) in zip(self.towers, _STATISTICS, strict=True):
            shape = (1, 3, 1, 1)
            normalised = (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
            parts.append(tower.encode(normalised))
        features = torch.cat(parts, -1)
        features = features - features.mean(-1, keepdim=True)
        return features / features.norm(dim=-1, keepdim=True)


def build_dreamsim(
    branches: Sequence[Mapping[str, torch.Tensor]],
    lora: Mapping[str, torch.Tensor],
    *,
    alpha: float,
    num_heads: int | None = None,
) -> DreamSim:
    """Build the ensemble; LoRA is added to the weights: W + alpha / rank * B A.

    Args:
        branches: Tensors of DINO, CLIP and open_clip (see `build_tower` for their names).
        lora: Tensors of the adapter, in peft's names.
        alpha: `lora_alpha` of its adapter_config.json.
        num_heads: See `build_tower`.

    Raises:
        CheckpointError: Tensors of another network, or an adapter that does not fit.
    """
    for branch, name, projects in zip(branches, _BRANCHES, (False, True, True), strict=True):
        if any(proj in branch for proj in ("proj", "visual.proj")) != projects:
            raise CheckpointError(
                f"What is given as DreamSim's {name} branch "
                f"{'lacks' if projects else 'has'} a projection, as another branch does.",
                fix="Give each file of DreamSim's release under its own name.",
            )
    adapted = add_lora(branches, lora, alpha=alpha)
    dino, clip, open_clip = (
        build_tower(
            branch,
            source=f"DreamSim's {name} branch",
            activation=activation,
            epsilon=epsilon,
            takes_last_norm=takes_last_norm,
            num_heads=num_heads,
        )
        for branch, name, activation, epsilon, takes_last_norm in zip(
            adapted,
            _BRANCHES,
            ("gelu", "quick_gelu", "gelu"),
            (1e-6, 1e-5, 1e-5),
            (False, True, True),  # DINO's feature is taken before its last norm
            strict=True,
        )
    )
    return DreamSim((dino, clip, open_clip))


def add_lora(
    branches: Sequence[Mapping[str, torch.Tensor]],
    lora: Mapping[str, torch.Tensor],
    *,
    alpha: float,
) -> list[State]:
    """Add an adapter to the fused queries, keys and values of each branch.

    Raises:
        CheckpointError: A tensor of the adapter has no place, or one of a pair is missing.
    """
    states = [dict(branch) for branch in branches]
    pairs: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name, value in lora.items():
        found = _LORA.fullmatch(name)
        place = (int(found[1]), f"{found[2]}.weight") if found else None
        if found is None or place is None or place[0] >= len(states):
            raise CheckpointError(
                f"The adapter's `{name[:120]}` belongs to no branch of DreamSim.",
                fix="Give the LoRA of DreamSim's ensemble of three.",
            )
        pairs.setdefault(place, {})[found[3]] = value
    for (branch, layer), pair in pairs.items():
        fused = _fused(states[branch], layer)
        if fused is None or set(pair) != {"A", "B"}:
            raise CheckpointError(
                f"The adapter of `{layer}` in branch {branch} is half there, or has no layer.",
                fix="Give branches in DINO's names or OpenAI's, with the ensemble's own LoRA.",
            )
        scale = alpha / len(pair["A"])
        states[branch][fused] = states[branch][fused] + scale * (pair["B"] @ pair["A"])
    return states


def _fused(state: Mapping[str, torch.Tensor], layer: str) -> str | None:
    """Find a layer's fused weight: under its own name, or OpenAI's."""
    number = layer.split(".")[1]
    names = (layer, f"visual.transformer.resblocks.{number}.attn.in_proj_weight")
    return next((name for name in names if name in state), None)
