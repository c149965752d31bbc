"""Over HTTP: a workflow gives what `motionmerge.experts` gives in diffusers, with one sampler."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import comfy.latent_formats
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import save_file

from motionmerge.exports.files import export_comfyui
from motionmerge.exports.loras import export_loras
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.switching.expert_bank import experts

from ..comfyui_pack.load import PACK, load_pack
from . import tiny
from .server import running

STEPS, SEED = 8, 11
RECIPE = """
inputs: {base: memory:base, style: style.safetensors}
experts: {dynamics: "base + lora(style, -0.25)", consistency: "base + lora(style, 1.0)"}
schedule: [{expert: dynamics, above: 0.875}, {expert: consistency}]
"""
NODES = {
    "MotionMergeKnobLora",
    "MotionMergeKnobCheckpoints",
    "MotionMergeSwitch",
    "MotionMergeExpert",
    "MotionMergeApplyExperts",
    "MotionMergeShowSchedule",
    "MotionMergeRecipe",
}


UNLOADED = ("unet missing", "unet unexpected", "left over keys")
"""What ComfyUI logs of keys that it does not load."""


def transformer(seed=0):
    torch.manual_seed(seed)
    network = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=36, out_channels=16,
        text_dim=4096, freq_dim=256, ffn_dim=64, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return network.eval()


def style():
    """A LoRA without the layers for an image embedding, which Wan 2.2 has not."""
    return {name: value for name, value in tiny.lora("wan").items() if "img" not in name}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    with torch.inference_mode(False):
        for name, seed in (("tiny", 0), ("other", 1)):
            export_comfyui(
                Recipe.parse(f"inputs: {{base: a}}\nexperts: {{{name}: base}}"),
                base / "written",
                inputs={"base": transformer(seed).state_dict()},
                overwrite=True,
            )
    for folder in ("diffusion_models", "loras"):
        (base / "models" / folder).mkdir(parents=True)
    for file in (base / "written").glob("*.safetensors"):
        shutil.copy(file, base / "models" / "diffusion_models")
    save_file(style(), base / "models" / "loras" / "style.safetensors")
    with running(base) as started:
        yield started


def workflow(*, cfgs=(0.0, 0.0), sampler="euler", cfg=3.5):
    """Motion Knob (LoRA) and KSampler on random embeddings."""
    return {
        "1": {"class_type": "UNETLoader", "inputs": {
            "unet_name": "tiny.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "MotionMergeKnobLora", "inputs": {
            "model": ["1", 0], "lora": "style.safetensors", "motion": 0.25, "strength": 1.0,
            "boundary": 0.875, "cfg_noisy": cfgs[0], "cfg_details": cfgs[1]}},
        "3": {"class_type": "TestRandomConditioning", "inputs": {"seed": 1, "width": 4096}},
        "4": {"class_type": "TestRandomConditioning", "inputs": {"seed": 2, "width": 4096}},
        "5": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {
            "width": 32, "height": 32, "length": 5, "batch_size": 1}},
        "6": {"class_type": "KSampler", "inputs": {
            "model": ["2", 0], "seed": SEED, "steps": STEPS, "cfg": cfg, "sampler_name": sampler,
            "scheduler": "simple", "positive": ["3", 0], "negative": ["4", 0],
            "latent_image": ["5", 0], "denoise": 1.0}},
        "7": {"class_type": "SaveLatent", "inputs": {
            "samples": ["6", 0], "filename_prefix": "x"}},
    }  # fmt: skip


def in_diffusers(recipe, lora=None, *, cfg=3.5):
    """The same loop with diffusers' network and scheduler, in ComfyUI's latent space."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    sampling = tiny.model("wan").get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    shape = (1, 16, 2, 4, 4)
    latents = torch.randn(shape, generator=torch.manual_seed(SEED))
    texts = [tiny.conditioning("wan", seed)[0][0] for seed in (1, 2)]
    still = torch.zeros(1, 20, *shape[2:])

    def run():
        x = latents
        for timestep in scheduler.timesteps:
            first, second = (
                network(torch.cat([x, still], 1), timestep[None], text, return_dict=False)[0]
                for text in texts
            )
            x = scheduler.step(second + cfg * (first - second), timestep, x, return_dict=False)[0]
        return x

    with torch.inference_mode(False), torch.no_grad():
        network, texts = transformer(), [text.clone() for text in texts]
        lora = {name: value.clone() for name, value in (lora or {}).items()}
        if recipe is None:
            found = run()
        else:
            with experts(network, recipe, inputs={"style": lora}, scheduler=scheduler):
                found = run()
    return comfy.latent_formats.Wan21().process_out(found)


def difference(one, two):
    return float((one - two).abs().max() / two.abs().max())


def test_all_nodes_are_registered_with_a_description(server):
    known = server.ask("/object_info")
    ours = {name for name in known if name.startswith("MotionMerge")}
    assert ours >= NODES
    assert all(known[name]["category"] == "motionmerge" for name in ours)
    assert all(known[name]["description"] for name in ours)
    for path in (PACK / "example_workflows").glob("*.json"):
        kinds = {node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
        assert kinds <= known.keys()


def test_a_workflow_gives_what_experts_gives_in_diffusers(server, capsys):
    plain = workflow()
    plain["6"]["inputs"]["model"] = ["1", 0]
    without_us = difference(server.latents(plain, "7"), in_diffusers(None))
    ours = server.latents(workflow(), "7")
    with_us = difference(ours, in_diffusers(Recipe.parse(RECIPE), style()))
    changed = difference(ours, server.latents(plain, "7"))
    with capsys.disabled():
        print(f"\nplain {without_us:.1e}, with experts {with_us:.1e}, experts change {changed:.2f}")
    assert without_us < 1e-5 and with_us < max(10 * without_us, 1e-5) < changed / 100
    log = (server.base / "log.txt").read_text()
    assert not any(words in log for words in UNLOADED)


def test_ksampler_and_the_custom_sampler_give_the_same_latents(server):
    custom = workflow(cfgs=(3.0, 1.0))
    one = server.latents(custom, "7")
    custom = copy.deepcopy(custom)
    custom["6"] = {"class_type": "SamplerCustomAdvanced", "inputs": {
        "noise": ["61", 0], "guider": ["62", 0], "sampler": ["63", 0], "sigmas": ["64", 0],
        "latent_image": ["5", 0]}}  # fmt: skip
    custom["61"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": SEED}}
    custom["62"] = {"class_type": "CFGGuider", "inputs": {
        "model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "cfg": 3.5}}  # fmt: skip
    custom["63"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    custom["64"] = {"class_type": "BasicScheduler", "inputs": {
        "model": ["2", 0], "scheduler": "simple", "steps": STEPS, "denoise": 1.0}}  # fmt: skip
    custom["65"] = {"class_type": "MotionMergeShowSchedule", "inputs": {
        "model": ["2", 0], "sigmas": ["64", 0]}}  # fmt: skip
    assert torch.equal(server.latents(custom, "7"), one)
    (text,) = server.run(custom | {"65": copy.deepcopy(custom["65"])})["outputs"]["65"]["text"]
    assert text.splitlines()[0] == " 1  1.000  dynamics, cfg 3"
    assert text.splitlines()[-1].endswith("consistency, cfg 1")


def test_an_exception_in_mid_run_and_then_the_next_run(server):
    before = server.latents(workflow(), "7")
    broken = workflow()
    broken["8"] = {"class_type": "TestRaisesInMidRun", "inputs": {"model": ["2", 0]}}
    broken["6"]["inputs"]["model"] = ["8", 0]
    assert server.run(broken)["status"]["status_str"] == "error"
    again = workflow()
    again["6"]["inputs"]["steps"] = STEPS - 1
    server.latents(again, "7")  # else ComfyUI gives its cached answer
    again = workflow()
    again["7"]["inputs"]["filename_prefix"] = "again"
    assert torch.equal(server.latents(again, "7"), before)


def test_a_lora_that_does_not_fit_is_an_error_of_its_node(server):
    save_file(tiny.lora("ltx"), server.base / "models" / "loras" / "ltx.safetensors")
    wrong = workflow()
    wrong["2"]["inputs"]["lora"] = "ltx.safetensors"
    status = server.run(wrong)["status"]
    error = dict(status["messages"])["execution_error"]
    assert error["node_type"] == "MotionMergeKnobLora" and "Fix: " in error["exception_message"]


def is_weight(name):
    return not name.endswith(("weight_scale", "comfy_quant"))


@pytest.mark.parametrize("dtype", [None, "fp8_scaled"])
def test_every_key_of_our_files_is_loaded(dtype, tmp_path, caplog):
    """Whole files by ComfyUI's loader, LoRAs by its keys: none is left over."""
    if dtype and not any(
        "comfy_quant" in file.read_text(encoding="utf-8")
        for file in Path(comfy.sd.__file__).parent.glob("*.py")
    ):
        pytest.skip("this ComfyUI is older than the format of scaled codes that we write")
    caplog.set_level("INFO")
    recipe = Recipe.parse("inputs: {base: a, tuned: b}\nexperts: {more: base + 2 * (tuned - base)}")
    with torch.inference_mode(False):
        inputs = {"base": transformer(0).state_dict(), "tuned": transformer(1).state_dict()}
        export_comfyui(recipe, tmp_path / "whole", inputs=inputs, dtype=dtype)
        export_loras(recipe, tmp_path / "loras", rank=8, target="comfyui", inputs=inputs)
    model = comfy.sd.load_diffusion_model(str(tmp_path / "whole" / "more.safetensors"))
    assert type(model.model).__name__ == "WAN21"
    assert not [line for line in caplog.messages if any(words in line for words in UNLOADED)]
    written = comfy.utils.load_torch_file(str(tmp_path / "whole" / "more.safetensors"))
    for name, tensor in written.items():
        held = comfy.utils.get_attr(model.model.diffusion_model, name) if is_weight(name) else None
        if held is not None:
            scale = written.get(name.removesuffix("weight") + "weight_scale", torch.ones(()))
            values = held.dequantize() if hasattr(held, "dequantize") else held
            torch.testing.assert_close(values.float(), tensor.float() * scale, rtol=1e-2, atol=0)
    file = comfy.utils.load_torch_file(str(tmp_path / "loras" / "more.safetensors"))
    values, unused = load_pack().task_vectors.matched(model, file)
    assert values and not unused
