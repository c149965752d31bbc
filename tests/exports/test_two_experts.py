"""Exported experts run in plain diffusers: a two-expert Wan folder, and LoRAs."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image

from motionmerge.errors import CheckpointError, ConfigError, RecipeError
from motionmerge.exports.two_experts import export_two_experts
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.merge import realise
from motionmerge.merging.recipes.recipe import Recipe

from ..tiny.denoisers import tiny_image_wan


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A folder with `base`, a Wan pipeline, and `tuned`, its transformer after fine-tuning."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_image_wan(0),
    )
    pipeline.save_pretrained(folder / "base")
    tuned = tiny_image_wan(0)
    with torch.no_grad():
        for index, parameter in enumerate(tuned.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(folder / "tuned")
    return folder


def recipe_for(wan, *, schedule="{expert: dynamics, above: 0.8}", base="base/transformer"):
    return Recipe.parse(
        f"""
inputs: {{base: {base}, tuned: tuned}}
experts:
  dynamics: base - 0.5 * (tuned - base)
  consistency: tuned + 0.25 * dare(tuned - base, drop_rate=0.7, seed=1)
schedule:
  - {schedule}
  - {{expert: consistency}}
""",
        folder=wan,
    )


def load(folder):
    return WanImageToVideoPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)


def sample(pipeline):
    return pipeline(
        image=Image.new("RGB", (16, 16), (200, 80, 40)), height=16, width=16, num_frames=5,
        num_inference_steps=4, guidance_scale=1.0, output_type="pt",
        prompt_embeds=torch.ones(1, 4, 8), negative_prompt_embeds=torch.zeros(1, 4, 8),
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip


def test_plain_diffusers_loads_and_runs_two_experts(wan, tmp_path):
    recipe = recipe_for(wan)
    written = export_two_experts(recipe, wan / "base", tmp_path / "out")
    assert written.boundary_ratio == 0.8
    pipeline = load(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.boundary_ratio == 0.8
    experts = realise(recipe)
    for module, expert in (("transformer", "dynamics"), ("transformer_2", "consistency")):
        state = getattr(pipeline, module).state_dict()
        assert state.keys() == experts[expert].keys()
        assert all(torch.equal(state[name], experts[expert][name]) for name in state)
    calls = {"transformer": 0, "transformer_2": 0}
    for module in calls:
        getattr(pipeline, module).register_forward_hook(
            lambda *_, module=module: calls.update({module: calls[module] + 1})
        )
    assert torch.isfinite(sample(pipeline)).all()
    assert calls == {"transformer": 2, "transformer_2": 2}  # steps at 1000, 900; 750, 500
    with open_weights(tmp_path / "out" / "transformer") as reader:
        assert Recipe.parse(reader.metadata["motionmerge.recipe"]).inputs["base"].sha256


def test_of_a_model_with_two_denoisers_each_expert_gives_its_own(wan, tmp_path):
    export_two_experts(recipe_for(wan), wan / "base", tmp_path / "two")
    shift = (
        f"inputs: {{base: {tmp_path / 'two'}, old: {tmp_path / 'two'}}}\n"
        + """
experts:
  high: base + 2 * (base - old)
  low: base
schedule: [{expert: high, timestep: 900}, {expert: low}]
"""
    )
    written = export_two_experts(Recipe.parse(shift), tmp_path / "two", tmp_path / "again")
    assert written.boundary_ratio == 0.9
    for module in ("transformer", "transformer_2"):
        old, new = (Checkpoint.load(tmp_path / f / module).tensors() for f in ("two", "again"))
        assert new.keys() == old.keys()
        assert all(torch.equal(new[name], old[name]) for name in old)


def test_an_export_refuses_what_a_folder_cannot_say(wan, tmp_path):
    late = recipe_for(wan, schedule="{expert: dynamics, step_fraction: 0.5}")
    with pytest.raises(RecipeError, match="number of steps"):
        export_two_experts(late, wan / "base", tmp_path / "out")
    with pytest.raises(RecipeError, match="1 entries"):
        export_two_experts(
            Recipe.parse("inputs: {b: x}\nexperts: {e: b}"), wan / "base", tmp_path / "out"
        )
    with pytest.raises(ConfigError, match="no diffusers pipeline folder"):
        export_two_experts(recipe_for(wan), wan / "tuned", tmp_path / "out")
    (tmp_path / "there").touch()
    with pytest.raises(ConfigError, match="exists already"):
        export_two_experts(recipe_for(wan), wan / "base", tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_export_refuses_a_pipeline_that_is_not_the_checkpoints(wan, tmp_path):
    (tmp_path / "other" / "transformer").mkdir(parents=True)
    index = json.loads((wan / "base" / "model_index.json").read_text())
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    WanTransformer3DModel.from_config(
        {**tiny_image_wan(0).config, "num_layers": 1}
    ).save_pretrained(tmp_path / "other" / "transformer")
    with pytest.raises(CheckpointError, match="does not give the tensors"):
        export_two_experts(recipe_for(wan), tmp_path / "other", tmp_path / "out")
    index["transformer"] = ["diffusers", "LTXVideoTransformer3DModel"]
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="no Wan pipeline"):
        export_two_experts(recipe_for(wan), tmp_path / "other", tmp_path / "out")


def test_a_folder_is_whole_or_absent_and_can_be_replaced(wan, tmp_path, monkeypatch):
    recipe = recipe_for(wan)
    monkeypatch.setattr(
        "motionmerge.exports.two_experts.stream",
        lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        export_two_experts(recipe, wan / "base", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert export_two_experts(recipe, wan / "base", tmp_path / "out", dry_run=True).path is None
    assert not list(tmp_path.iterdir())
    export_two_experts(recipe, wan / "base", tmp_path / "out")
    (tmp_path / "out" / "old").touch()
    export_two_experts(recipe, wan / "base", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old").exists() and load(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    index = json.loads((wan / "base" / "model_index.json").read_text())
    assert "boundary_ratio" not in index or index["boundary_ratio"] is None


def test_signed_loras_on_the_loaded_model_mean_the_pipeline(wan, tmp_path):
    q = "transformer.blocks.0.attn1.to_q"
    style = {f"{q}.lora_A.weight": torch.ones(1, 24), f"{q}.lora_B.weight": torch.ones(24, 1)}
    save_weights(tmp_path / "style.safetensors", style)
    recipe = Recipe.parse(
        """
inputs: {base: 'memory:base', style: style.safetensors}
experts: {away: 'base + lora(style, -0.5)', closer: 'base + lora(style, 1.0)'}
schedule: [{expert: away, above: 0.9}, {expert: closer}]
""",
        folder=tmp_path,
    )
    export_two_experts(recipe, wan / "base", tmp_path / "out")
    base = Checkpoint.load(wan / "base" / "transformer").tensors()
    for module, scale in (("transformer", -0.5), ("transformer_2", 1.0)):
        found = Checkpoint.load(tmp_path / "out" / module).tensors()
        name = "blocks.0.attn1.to_q.weight"
        torch.testing.assert_close(found[name], base[name] + scale)
        assert all(torch.equal(found[n], base[n]) for n in base if n != name)
