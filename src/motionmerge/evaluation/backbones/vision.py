"""Vision transformers of four makers in one class: DINO, CLIP, open_clip, and DreamSim's branches.

transformers' CLIP encoder holds the layers. What differs is around it: a norm before the layers or
none, where the features are taken, and how position embeddings are stretched. The hub's DINO uses
scale factors with 0.1 added; transformers uses sizes, which moves subject_consistency by up to
3e-4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from motionmerge.errors import CheckpointError, ShapeError
from motionmerge.evaluation.backbones.protocol import State, fill, named_source

_HEAD_WIDTH = 64
"""Channels of a head in every published network of these makers."""


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """Sizes of a vision transformer, all read from its tensors.

    Attributes:
        width: Channels of a token.
        num_layers: Layers.
        num_heads: Heads of a layer.
        patch: Pixels of a patch's side.
        grid: Patches of a side in the position embeddings.
        hidden: Channels inside a layer's MLP.
        output: Channels after the projection; None without one.
        has_pre_norm: There is a norm between the embeddings and the layers (CLIP).
        has_patch_bias: The patches' convolution has a bias (DINO).
    """

    width: int
    num_layers: int
    num_heads: int
    patch: int
    grid: int
    hidden: int
    output: int | None
    has_pre_norm: bool
    has_patch_bias: bool


class VisionTower(nn.Module):
    """A vision transformer that gives one feature vector a frame.

    Args:
        shape: Its sizes.
        activation: `gelu`, or `quick_gelu` for OpenAI's CLIP.
        epsilon: Of all norms.
        takes_last_norm: Features come after the last norm; in DreamSim's DINO branch before.
    """

    def __init__(
        self, shape: VisionShape, *, activation: str, epsilon: float, takes_last_norm: bool = True
    ) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig
        from transformers.models.clip.modeling_clip import CLIPEncoder

        config = CLIPVisionConfig(
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            hidden_act=activation,
            layer_norm_eps=epsilon,
        )
        config._attn_implementation = "sdpa"
        self.shape = shape
        self.takes_last_norm = takes_last_norm
        self.token = nn.Parameter(torch.zeros(shape.width))
        self.positions = nn.Parameter(torch.zeros(1 + shape.grid**2, shape.width))
        self.patches = nn.Conv2d(
            3, shape.width, shape.patch, stride=shape.patch, bias=shape.has_patch_bias
        )
        self.pre_norm = (
            nn.LayerNorm(shape.width, eps=epsilon) if shape.has_pre_norm else nn.Identity()
        )
        self.encoder = CLIPEncoder(config)
        self.norm = nn.LayerNorm(shape.width, eps=epsilon)
        self.projection = (
            nn.Identity()
            if shape.output is None
            else nn.Linear(shape.width, shape.output, bias=False)
        )
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode normalised frames `[frames, 3, height, width]` into `[frames, channels]`.

        Raises:
            ShapeError: A frame is smaller than a patch.
        """
        if min(pixels.shape[-2:]) < self.shape.patch:
            raise ShapeError(
                f"Frames of {list(pixels.shape[-2:])} pixels are smaller than a patch.",
                fix=f"Use frames of at least {self.shape.patch} pixels a side.",
            )
        patches = self.patches(pixels.to(self.token.device))
        positions = self.stretched(*patches.shape[-2:])
        tokens = patches.flatten(2).transpose(1, 2)
        first = self.token.expand(len(tokens), 1, -1)
        tokens = torch.cat([first, tokens], 1) + positions
        tokens = self.encoder(inputs_embeds=self.pre_norm(tokens), attention_mask=None)
        features = tokens.last_hidden_state[:, 0]
        return self.projection(self.norm(features) if self.takes_last_norm else features)

    def stretched(self, height: int, width: int) -> torch.Tensor:
        """Return position embeddings `[1 + height * width, channels]` by the rule of DINO's hub.

        Bicubic with the scale factors (height + 0.1) / grid and (width + 0.1) / grid.
        """
        grid = self.shape.grid
        if (height, width) == (grid, grid):
            return self.positions
        square = self.positions[1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        factors = ((height + 0.1) / grid, (width + 0.1) / grid)
        wide = F.interpolate(square, scale_factor=factors, mode="bicubic")
        return torch.cat([self.positions[:1], wide[0].flatten(1).T])


def build_tower(
    state: Mapping[str, torch.Tensor],
    *,
    source: str,
    activation: str,
    epsilon: float,
    takes_last_norm: bool = True,
    num_heads: int | None = None,
) -> VisionTower:
    """Build a tower from tensors under the names of DINO's hub, CLIP, open_clip or transformers.

    Args:
        state: The tensors; those of a CLIP's text tower are ignored.
        source: What errors call it.
        activation: See `VisionTower`.
        epsilon: See `VisionTower`.
        takes_last_norm: See `VisionTower`.
        num_heads: Heads of a layer; by default the width over 64.

    Raises:
        CheckpointError: The tensors are those of another network.
    """
    with named_source(source):
        ours = _our_names(state, source=source)
        shape = _shape_of(ours, num_heads=num_heads)
    tower = VisionTower(
        shape, activation=activation, epsilon=epsilon, takes_last_norm=takes_last_norm
    )
    fill(tower, ours, source=source)
    return tower


def _shape_of(state: State, *, num_heads: int | None) -> VisionShape:
    width, _, patch, _ = state["patches.weight"].shape
    layers = {
        int(found[1]) for name in state if (found := re.match(r"encoder\.layers\.(\d+)", name))
    }
    projection = state.get("projection.weight")
    return VisionShape(
        width=width,
        num_layers=len(layers),
        num_heads=num_heads or max(width // _HEAD_WIDTH, 1),
        patch=patch,
        grid=round((len(state["positions"]) - 1) ** 0.5),
        hidden=len(state["encoder.layers.0.mlp.fc1.weight"]),
        output=None if projection is None else len(projection),
        has_pre_norm="pre_norm.weight" in state,
        has_patch_bias="patches.bias" in state,
    )


_HUB = (  # DINO's hub, timm, DreamSim's branches
    (r"cls_token", "token"),
    (r"pos_embed", "positions"),
    (r"patch_embed\.proj\.(\w+)", r"patches.\1"),
    (r"pos_drop\.(\w+)", r"pre_norm.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"encoder.layers.\1.mlp.\2.\3"),
    (r"norm\.(\w+)", r"norm.\1"),
    (r"proj", "projection.weight"),
)
_OPENAI = (  # OpenAI's CLIP and open_clip
    (r"visual\.class_embedding", "token"),
    (r"visual\.positional_embedding", "positions"),
    (r"visual\.conv1\.weight", "patches.weight"),
    (r"visual\.ln_pre\.(\w+)", r"pre_norm.\1"),
    (
        r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)",
        r"encoder.layers.\1.layer_norm\2.\3",
    ),
    (
        r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)",
        r"encoder.layers.\1.self_attn.qkv.\2",
    ),
    (
        r"visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)",
        r"encoder.layers.\1.self_attn.out_proj.\2",
    ),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"encoder.layers.\1.mlp.fc2.\2"),
    (r"visual\.ln_post\.(\w+)", r"norm.\1"),
    (r"visual\.proj", "projection.weight"),
)
_HF_CLIP = (
    (r"vision_model\.embeddings\.class_embedding", "token"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "positions"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "patches.weight"),
    (r"vision_model\.pre_layrnorm\.(\w+)", r"pre_norm.\1"),
    (r"vision_model\.encoder\.layers\.(.+)", r"encoder.layers.\1"),
    (r"vision_model\.post_layernorm\.(\w+)", r"norm.\1"),
    (r"visual_projection\.weight", "projection.weight"),
)
_HF_VIT = (
    (r"embeddings\.cls_token", "token"),
    (r"embeddings\.position_embeddings", "positions"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patches.\1"),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.(\w+)", r"encoder.layers.\1.layer_norm1.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.(\w+)", r"encoder.layers.\1.layer_norm2.\2"),
    (
        r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(\w+)",
        r"encoder.layers.\1.self_attn.q_proj.\2",
    ),
    (
        r"encoder\.layer\.(\d+)\.attention\.attention\.key\.(\w+)",
        r"encoder.layers.\1.self_attn.k_proj.\2",
    ),
    (
        r"encoder\.layer\.(\d+)\.attention\.attention\.value\.(\w+)",
        r"encoder.layers.\1.self_attn.v_proj.\2",
    ),
    (
        r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)",
        r"encoder.layers.\1.self_attn.out_proj.\2",
    ),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"encoder.layers.\1.mlp.fc2.\2"),
    (r"layernorm\.(\w+)", r"norm.\1"),
)
_MAKERS = {
    "blocks.0.norm1.weight": _HUB,
    "visual.ln_pre.weight": _OPENAI,
    "vision_model.pre_layrnorm.weight": _HF_CLIP,
    "encoder.layer.0.layernorm_before.weight": _HF_VIT,
}
"""A name that gives each maker away."""

_NOT_OF_THE_TOWER = (
    r"(transformer|token_embedding|positional_embedding|ln_final|text_projection|logit_scale"
    r"|logit_bias|text_model|vision_model\.embeddings\.position_ids|pooler"
    r"|input_resolution|context_length|vocab_size)\b.*"
)
"""A CLIP's text tower, numbers that are no weights, and the pooler of transformers' ViT."""


def _our_names(state: Mapping[str, torch.Tensor], *, source: str) -> State:
    """Rename a maker's tensors; fused queries, keys and values become three."""
    table = next((table for name, table in _MAKERS.items() if name in state), None)
    if table is None:
        raise CheckpointError(
            f"{source} holds no vision transformer of a known maker; its first tensor is "
            f"`{next(iter(state), '')[:100]}`.",
            fix="Give DINO's, CLIP's or open_clip's weights, in their names or transformers'.",
        )
    ours: State = {}
    for name, value in state.items():
        new = next((re.sub(o, n, name) for o, n in table if re.fullmatch(o, name)), None)
        if new is None:
            if not re.fullmatch(_NOT_OF_THE_TOWER, name):
                raise CheckpointError(
                    f"{source} holds `{name[:100]}`, which no vision transformer has.",
                    fix="Give the weights of the vision transformer alone.",
                )
            continue
        if name in ("proj", "visual.proj"):
            value = value.T.contiguous()
        if new in ("token", "positions"):
            value = value.reshape(-1, value.shape[-1]) if new == "positions" else value.flatten()
        if ".qkv." in new:
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                ours[new.replace("qkv", part)] = piece.contiguous()
        else:
            ours[new] = value
    return ours
