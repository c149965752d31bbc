"""Exported experts run in plain diffusers: a two-expert Wan folder, and LoRAs."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image

from motionmerge.errors import CheckpointError, ConfigError, RecipeError
from motionmerge.io.weights import open_weights
from motionmerge.merge.algebra import Checkpoint
from motionmerge.merge.engine import realise
from motionmerge.merge.export import export_two_experts
from motionmerge.merge.lora import lora
from motionmerge.merge.lora_export import export_loras
from motionmerge.merge.lora_layout import matrices, original_layout
from motionmerge.merge.lora_names import ModelNames
from motionmerge.merge.recipe import Recipe


def tiny_transformer(seed):
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16,
        text_dim=8, freq_dim=16, ffn_dim=16, num_layers=2,
    )  # fmt: skip


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
        transformer=tiny_transformer(0),
    )
    pipeline.save_pretrained(folder / "base")
    tuned = tiny_transformer(0)
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
        {**tiny_transformer(0).config, "num_layers": 1}
    ).save_pretrained(tmp_path / "other" / "transformer")
    with pytest.raises(CheckpointError, match="does not give the tensors"):
        export_two_experts(recipe_for(wan), tmp_path / "other", tmp_path / "out")
    index["transformer"] = ["diffusers", "LTXVideoTransformer3DModel"]
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="no Wan pipeline"):
        export_two_experts(recipe_for(wan), tmp_path / "other", tmp_path / "out")


def test_a_lora_of_full_rank_gives_the_expert_back(wan, tmp_path):
    recipe = recipe_for(wan)
    reports = export_loras(recipe, tmp_path, rank=400)
    base = Checkpoint.load(wan / "base" / "transformer", name="base")
    for expert, tensors in realise(recipe).items():
        again = (base + lora(tmp_path / f"{expert}.safetensors", 1.0)).tensors()
        for name, value in tensors.items():
            if name.endswith("weight") and value.ndim > 1:
                torch.testing.assert_close(again[name], value, atol=1e-5, rtol=1e-4)
        everything = reports[expert].groups["all"]
        assert everything.captured + everything.left_out == pytest.approx(1)
        assert 0 < everything.rank_90 <= everything.rank_99 <= 144


def test_the_energy_captured_is_that_of_the_difference_that_the_lora_makes(wan, tmp_path):
    report = export_loras(recipe_for(wan), tmp_path, rank=3)["dynamics"]
    base = Checkpoint.load(wan / "base" / "transformer", name="base").tensors()
    start = Checkpoint.from_tensors(base, name="base")
    held = (start + lora(tmp_path / "dynamics.safetensors", 1.0)).tensors()
    ideal = realise(recipe_for(wan))["dynamics"]

    def energy(state):
        return sum(float((state[name] - base[name]).double().square().sum()) for name in base)

    assert report.groups["all"].captured == pytest.approx(energy(held) / energy(ideal), abs=1e-3)
    assert set(report.groups) == {"joint", "cross_attention", "residual", "embeddings", "all"}
    assert report.rank == 3 and "rank 90%" in str(report)


def test_diffusers_loads_an_exported_lora_at_scale_one(wan, tmp_path):
    export_loras(recipe_for(wan), tmp_path, rank=4)
    pipeline = load(wan / "base")
    pipeline.load_lora_weights(tmp_path / "dynamics.safetensors")
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    base = Checkpoint.load(wan / "base" / "transformer", name="base")
    merged = (base + lora(tmp_path / "dynamics.safetensors", 1.0)).tensors()
    for name, value in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-4)


def test_original_keys_hold_the_same_lora(wan, tmp_path):
    reports = export_loras(recipe_for(wan), tmp_path / "ours", rank=4)
    again = export_loras(recipe_for(wan), tmp_path / "original", rank=4, layout=original_layout)
    assert again["dynamics"].groups == reports["dynamics"].groups
    ours, original = (tmp_path / n / "dynamics.safetensors" for n in ("ours", "original"))
    with open_weights(original) as reader:
        assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in reader
        assert "diffusion_model.head.head.lora_B.weight" in reader
    base = Checkpoint.load(wan / "base" / "transformer", name="base")
    expected, found = ((base + lora(path, 1.0)).tensors() for path in (ours, original))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_diffusers_understands_original_keys(wan, tmp_path):
    blocks = Recipe.parse(
        "inputs: {base: base/transformer, tuned: tuned}\n"
        "experts: {moved: 'base - 0.5 * only(tuned - base, \"blocks.*\")'}",
        folder=wan,
    )  # diffusers does not read original keys of the patch embedding
    export_loras(blocks, tmp_path, rank=4, layout=original_layout)
    pipeline = load(wan / "base")
    pipeline.load_lora_weights(tmp_path / "moved.safetensors")
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    base = Checkpoint.load(wan / "base" / "transformer", name="base")
    merged = (base + lora(tmp_path / "moved.safetensors", 1.0)).tensors()
    for name, value in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-4)


def test_original_hunyuan_video_keys_stack_the_projections(tmp_path):
    torch.manual_seed(0)
    base = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    ).state_dict()  # fmt: skip
    tuned = {name: value + 0.1 * torch.randn(value.shape) for name, value in base.items()}
    tuned["transformer_blocks.0.attn.to_k.weight"] = base["transformer_blocks.0.attn.to_k.weight"]
    recipe = Recipe.parse("inputs: {base: a, tuned: b}\nexperts: {more: base + 2*(tuned - base)}")
    inputs = {"base": base, "tuned": tuned}
    report = export_loras(recipe, tmp_path, rank=64, layout=original_layout, inputs=inputs)["more"]
    with open_weights(tmp_path / "more.safetensors") as reader:
        assert reader.shape("diffusion_model.double_blocks.0.img_attn_qkv.lora_B.weight")[0] == 48
        assert reader.shape("diffusion_model.single_blocks.0.linear1.lora_B.weight")[0] == 112
        tensors = {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118
    merged = (Checkpoint.from_tensors(base, name="base") + lora(tensors, 1.0)).tensors()
    expert = realise(recipe, inputs=inputs)["more"]
    for name, value in base.items():
        if name == "norm_out.linear.weight" or value.ndim < 2:
            assert torch.equal(merged[name], value)
        else:
            torch.testing.assert_close(merged[name], expert[name], atol=1e-5, rtol=1e-4)
    assert report.groups["residual"].left_out > 0.1


FAMILIES_WITH_ORIGINAL_KEYS = {
    "WanTransformer3DModel": {
        "num_layers": 2, "image_dim": 8, "added_kv_proj_dim": 16, "pos_embed_seq_len": 4,
    },
    "SkyReelsV2Transformer3DModel": {"num_layers": 2, "inject_sample_info": True},
    "HunyuanVideoTransformer3DModel": {"num_layers": 2, "num_single_layers": 2},
    "LTXVideoTransformer3DModel": {"num_layers": 2},
}  # fmt: skip
OTHERS = {
    "HunyuanVideo15Transformer3DModel": {"num_layers": 2},
    "LTX2VideoTransformer3DModel": {"num_layers": 2},
    "CogVideoXTransformer3DModel": {"num_layers": 2},
    "Kandinsky5Transformer3DModel": {"num_visual_blocks": 2},
}


def shapes_of(denoiser, config):
    with torch.device("meta"):
        module = getattr(diffusers, denoiser)(**config)
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("denoiser", "config"),
    FAMILIES_WITH_ORIGINAL_KEYS.items(),
    ids=list(FAMILIES_WITH_ORIGINAL_KEYS),
)
def test_every_layer_has_an_original_name_that_leads_back_to_it(denoiser, config):
    shapes = shapes_of(denoiser, config)
    layers = original_layout({f"transformer.{name}": shape for name, shape in shapes.items()})
    names = [name for layer in layers for name in layer.weights]
    missing = {f"transformer.{name}" for name in matrices(shapes)}.difference(names)
    assert missing <= {"transformer.norm_out.linear.weight"}
    assert len(names) == len(set(names)) and len({layer.path for layer in layers}) == len(layers)
    model = ModelNames(shapes)
    for layer in layers:
        found = model.weights(layer.path)
        if len(layer.weights) > 1:
            (found,) = model.find_parts(layer.path, of_bias=False)[1]
        assert tuple(f"transformer.{name}" for name in found) == layer.weights


@pytest.mark.parametrize(("denoiser", "config"), OTHERS.items(), ids=list(OTHERS))
def test_a_family_without_known_original_keys_is_refused(denoiser, config):
    with pytest.raises(ConfigError, match="No original names are known"):
        original_layout(shapes_of(denoiser, config))


def test_original_keys_are_for_one_denoiser():
    shapes = shapes_of("WanTransformer3DModel", {"num_layers": 1})
    both = {
        f"{m}.{name}": s for m in ("transformer", "transformer_2") for name, s in shapes.items()
    }
    with pytest.raises(ConfigError, match="transformer, transformer_2"):
        original_layout(both)


def test_a_lora_for_another_base_or_of_no_change_is_refused(wan, tmp_path):
    with pytest.raises(RecipeError, match="no input `bass`"):
        export_loras(recipe_for(wan), tmp_path, rank=4, base="bass")
    with pytest.raises(RecipeError, match="not a positive integer"):
        export_loras(recipe_for(wan), tmp_path, rank=0)
    still = Recipe.parse("inputs: {base: base/transformer}\nexperts: {same: base}", folder=wan)
    with pytest.raises(CheckpointError, match="equals `base`"):
        export_loras(still, tmp_path, rank=4)
    (tmp_path / "dynamics.safetensors").touch()
    with pytest.raises(ConfigError, match="exists already"):
        export_loras(recipe_for(wan), tmp_path, rank=4)
