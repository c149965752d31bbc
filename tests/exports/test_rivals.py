"""Exports of VideoCrafter and ConsistI2V: LoRAs that load again, and an official file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from motionmerge.exports.loras import export_loras
from motionmerge.models.dynamicrafter.checkpoint_folder import to_official
from motionmerge.models.dynamicrafter.conversion import convert_unet_state_dict
from motionmerge.switching.expert_bank import experts

from ..tiny.dynamicrafter import tiny_videocrafter
from ..tiny.loras import with_weights
from ..tiny.pipelines import OURS, Family, generate, tiny

TEMPORAL = """
inputs: {{base: {base}, tuned: {tuned}}}
experts: {{moving: 'base - 0.5 * only(tuned - base, "temporal")'}}
"""


def two_folders(unet: torch.nn.Module, folder: Path) -> str:
    """Write a U-Net before and after its attention is moved a little; give a recipe for both."""
    unet.save_pretrained(folder / "base" / "unet")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if value.ndim == 2 and "attn" in name:
                shape = (value.shape[0], 1), (1, value.shape[1])
                left, right = (torch.randn(one, generator=generator) for one in shape)
                value.add_(0.05 * left * right)
    unet.save_pretrained(folder / "tuned" / "unet")
    return TEMPORAL.format(base=folder / "base", tuned=folder / "tuned")


@pytest.mark.parametrize("family", OURS, ids=lambda family: family.name)
def test_a_temporal_task_vector_comes_back_as_a_lora(family: Family, tmp_path: Path) -> None:
    pipeline, recipe = tiny(family), tmp_path / "recipe.yaml"
    recipe.write_text(two_folders(pipeline.unet, tmp_path))
    export_loras(recipe, tmp_path / "loras", rank=1, target="motionmerge")
    (file,) = (tmp_path / "loras").glob("*.safetensors")
    names = load_file(file)
    assert names and all("temp" in name for name in names)
    pipeline = tiny(family)
    plain = generate(pipeline, family)
    with experts(pipeline, recipe):
        dense = generate(pipeline, family)
    with experts(pipeline, **with_weights(file, {"moving": 1.0})):
        made = generate(pipeline, family)
    torch.testing.assert_close(made, dense, atol=2e-3, rtol=2e-3)
    assert (made - plain).abs().max() > 20 * (made - dense).abs().max()


def test_the_official_file_of_a_videocrafter_has_its_weights(tmp_path: Path) -> None:
    unet = tiny_videocrafter().unet
    unet.save_pretrained(tmp_path / "folder" / "unet")
    to_official(tmp_path / "folder", tmp_path / "model.safetensors")
    back = convert_unet_state_dict(load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(value, back[name]) for name, value in unet.state_dict().items())
