"""What DynamiCrafter's original code calls the layers of our U-Net and image projector.

The blocks of the original are counted through all levels, so a name depends on the whole model.
Whole checkpoints are converted elsewhere (`models.dynamicrafter.key_maps`); here are the paths
alone, as LoRA files have them. A test holds the two against each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_OUTSIDE = (
    (r"^time_embedding\.linear_1\b", "time_embed.0"),
    (r"^time_embedding\.linear_2\b", "time_embed.2"),
    (r"^fps_embedding\.linear_1\b", "fps_embedding.0"),
    (r"^fps_embedding\.linear_2\b", "fps_embedding.2"),
    (r"^conv_in\b", "input_blocks.0.0"),
    (r"^norm_out\b", "out.0"),
    (r"^conv_out\b", "out.2"),
    (r"^temporal_adapter\.queries\b", "queries"),
    (r"^temporal_adapter\b", "qformer"),
    (r"^temporal_in\.fusion\.proj\b", "init_attn.0.cc_projection"),
    (r"^temporal_in\b", "init_attn.0"),
)
_INSIDE = (
    (r"^resnet\.norm1\b", 0, "in_layers.0"),
    (r"^resnet\.conv1\b", 0, "in_layers.2"),
    (r"^resnet\.time_emb_proj\b", 0, "emb_layers.1"),
    (r"^resnet\.norm2\b", 0, "out_layers.0"),
    (r"^resnet\.conv2\b", 0, "out_layers.3"),
    (r"^resnet\.conv_shortcut\b", 0, "skip_connection"),
    (r"^temporal_conv\b", 0, "temopral_conv"),
    (r"^attention\.(.*\.attn2)\.processor\.(to_[kv]_ip)\.0\b", 1, r"\1.\2"),
    (r"^attention\.", 1, ""),
    (r"^temporal_attention\.fusion\.proj\b", 2, "cc_projection"),
    (r"^temporal_attention\.", 2, ""),
)
"""What is in a stage, with the number of its part: residual block, spatial, temporal attention."""

_PROJECTOR = (
    (r"\bln0$", "0.norm1"),
    (r"\bln1$", "0.norm2"),
    (r"\battn\.to_out\.0$", "0.to_out"),
    (r"\battn\.", "0."),
    (r"\bff\.0$", "1.0"),
    (r"\bff\.1\.net\.0\.proj$", "1.1"),
    (r"\bff\.1\.net\.2$", "1.3"),
)


class OriginalPaths:
    """The original path of each layer of a model.

    Args:
        paths: Our paths of all layers of the U-Net, without a prefix.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        paths = list(paths)
        levels = _count(r"^downsamplers\.(\d+)\.", paths) + 1
        stages = _count(r"^down_stages\.(\d+)\.", paths)
        self._layers = stages // levels if stages % levels == 0 else 0
        self._attends = {
            int(found[1]) for path in paths if (found := re.match(r"up_stages\.(\d+)\.att", path))
        }

    def of_unet(self, path: str) -> str | None:
        """Give the original path of a layer of the U-Net; None if it has none."""
        if not self._layers:
            return None
        if found := re.match(r"(down|mid|up)_stages\.(\d+)\.(.+)$", path):
            return self._in_stage(found[1], int(found[2]), found[3])
        per_level = self._layers + 1
        if found := re.match(r"downsamplers\.(\d+)\.conv$", path):
            return f"input_blocks.{(int(found[1]) + 1) * per_level}.0.op"
        if found := re.match(r"upsamplers\.(\d+)\.conv$", path):
            block = int(found[1]) * per_level + self._layers
            return f"output_blocks.{block}.{3 if block in self._attends else 1}.conv"
        return next(
            (re.sub(ours, old, path) for ours, old in _OUTSIDE if re.match(ours, path)), None
        )

    def _in_stage(self, kind: str, number: int, path: str) -> str | None:
        for ours, part, original in _INSIDE:
            if re.match(ours, path):
                inner = re.sub(ours, original, path)
                if kind == "down":
                    level, layer = divmod(number, self._layers)
                    block = level * (self._layers + 1) + 1 + layer
                    return f"input_blocks.{block}.{part}.{inner}"
                if kind == "up":
                    return f"output_blocks.{number}.{part}.{inner}"
                return f"middle_block.{part + 3 * number}.{inner}"
        return None


def of_projector(path: str) -> str:
    """Give the original path of a layer of the image projector; `to_kv` is cut into two there."""
    for ours, original in _PROJECTOR:
        if re.search(ours, path):
            return re.sub(ours, original, path)
    return path


def _count(pattern: str, paths: Iterable[str]) -> int:
    return len({found[1] for path in paths if (found := re.match(pattern, path))})
