"""LoRA files for other tools hold the change of an expert, and come back as it."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
)
from safetensors.torch import load_file, save_file

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.exports.lora_factors import factors_of
from motionmerge.exports.loras import export_loras
from motionmerge.exports.names import naming, parts_of_model
from motionmerge.exports.targets import TARGETS
from motionmerge.merging.algebra.functions import factorise
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.lora.report import describe_lora
from motionmerge.merging.lora.task_vector import lora
from motionmerge.merging.merge import realise
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.switching.lora_layers import read_lora

from ..tiny.denoisers import DENOISERS, state_of, tiny_image_wan

FULL_RANK = 64
MORE = Recipe.parse("inputs: {base: a, tuned: b}\nexperts: {more: base + 2 * (tuned - base)}")


def moved(state, *, spread=0.05):
    generator = torch.Generator().manual_seed(1)
    return {
        name: value + spread * torch.randn(value.shape, generator=generator)
        for name, value in state.items()
    }


def inputs_of(kind):
    base = state_of(kind)
    return {"base": base, "tuned": moved(base)}


def again(base, path, scale=1.0):
    """Add a LoRA file to a model, with our own reading."""
    return (Checkpoint.from_tensors(base, name="base") + lora(path, scale)).tensors()


def different(found, wanted):
    return {name for name in wanted if not torch.equal(found[name], wanted[name])}


def named(state, names):
    """Give a model other names."""
    (part,) = parts_of_model({name: tuple(value.shape) for name, value in state.items()})
    return {
        name: torch.cat([state[p.name].flatten()[p.begin : p.end] for p in tensor.pieces]).reshape(
            tensor.shape
        )
        for name, tensor in names(part).items()
    }


def rank_of(state):
    return max(min(value.flatten(1).shape) for value in state.values() if value.ndim > 1)


def applied(state, tensors):
    """Add a LoRA file to a model whose tensors have its names, by plain arithmetic."""
    result, left = {}, dict(tensors)
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        keys = {
            "weight": (f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.diff"),
            "bias": (f"{path}.lora_B.bias", f"{path}.diff_b", f"{name}.diff"),
        }.get(leaf, (f"{name}.diff",))
        parts = [left.pop(key) for key in keys if key in left]
        if len(parts) == 2:
            parts = [(parts[1].flatten(1) @ parts[0].flatten(1)).view(value.shape)]
        result[name] = value + parts[0] if parts else value
    assert not left
    return result


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_file_of_full_rank_gives_the_expert_bit_for_bit_to_the_tool_and_to_us(
    kind, target, tmp_path
):
    inputs = inputs_of(kind)
    tool, rank = TARGETS[target], rank_of(inputs["base"])
    written = export_loras(MORE, tmp_path, rank=rank, target=target, inputs=inputs)["more"]
    expert = realise(MORE, inputs=inputs)["more"]
    found = again(inputs["base"], tmp_path / "more.safetensors")
    assert different(found, expert) == set(written.left_out)
    expert |= {name: inputs["base"][name] for name in written.left_out}
    assert not different(found, expert)
    base, wanted = (
        named(state, naming(tool.style, tool.front)) for state in (inputs["base"], expert)
    )
    assert not different(applied(base, load_file(tmp_path / "more.safetensors")), wanted)
    total = written.groups["all"]
    assert total.captured + total.left_out == pytest.approx(1)
    if tool.plain_differences and not tool.drops:
        assert not written.left_out and total.captured == pytest.approx(1)


@pytest.mark.parametrize("kind", ["wan", "hunyuan-video", "ltx", "cogvideox"])
def test_original_named_files_give_the_same_lora_as_diffusers_named_ones(kind, tmp_path):
    inputs = inputs_of(kind)
    export_loras(MORE, tmp_path / "ours", rank=4, target="comfyui", inputs=inputs)
    for prefix in ("", "model.diffusion_model."):
        theirs = {
            name: named(state, naming("original", lambda _, front=prefix: front))
            for name, state in inputs.items()
        }
        export_loras(MORE, tmp_path / "theirs", rank=4, target="comfyui", inputs=theirs,
                     overwrite=True)  # fmt: skip
        found, wanted = (load_file(tmp_path / n / "more.safetensors") for n in ("theirs", "ours"))
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_the_names_are_those_that_each_tool_loads(tmp_path):
    spelled = {
        "comfyui": "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "wan2gp": "diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight",
        "diffusers": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    }
    for target, key in spelled.items():
        export_loras(MORE, tmp_path / target, rank=2, target=target,
                     inputs=inputs_of("hunyuan-video"))  # fmt: skip
        keys = load_file(tmp_path / target / "more.safetensors").keys()
        assert key in keys
        assert not any(name.endswith(".alpha") for name in keys)
    keys = load_file(tmp_path / "comfyui" / "more.safetensors").keys()
    for path in ("time_in", "guidance_in", "txt_in.t_embedder", "txt_in.c_embedder"):
        for layer in ("in_layer", "out_layer"):
            assert f"diffusion_model.{path}.{layer}.lora_B.weight" in keys or path == "guidance_in"


def test_wan2gp_gets_factors_of_linear_layers_only_and_no_modulation(tmp_path):
    inputs = inputs_of("wan")
    written = export_loras(MORE, tmp_path, rank=2, target="wan2gp", inputs=inputs)["more"]
    tensors = load_file(tmp_path / "more.safetensors")
    assert all(value.ndim == 2 for name, value in tensors.items() if ".lora_" in name)
    assert "diffusion_model.patch_embedding.diff" in tensors
    assert not any("modulation" in name for name in tensors)
    assert all("scale_shift_table" in name for name in written.left_out)
    assert len(written.left_out) == 3 and "Left out" in str(written)


# what diffusers makes of the files


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two Wan 2.2 folders with two denoisers each, `base` and `tuned`."""
    folder = tmp_path_factory.mktemp("pair")
    for name, seed in (("base", 0), ("tuned", 5)):
        WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=tiny_image_wan(seed),
            transformer_2=tiny_image_wan(seed + 1),
            boundary_ratio=0.9,
        ).save_pretrained(folder / name)
    return folder


def recipe_of(pair, *, above=0.9):
    return Recipe.parse(
        f"""
inputs: {{base: base, tuned: tuned}}
experts: {{fast: base - 0.5 * (tuned - base), calm: base + 0.25 * (tuned - base)}}
schedule: [{{expert: fast, above: {above}}}, {{expert: calm}}]
""",
        folder=pair,
    )


def fused(pair, files, folder):
    """Load LoRA files into the pair as diffusers does, and return the weights."""
    pipeline = WanImageToVideoPipeline.from_pretrained(
        pair / "base", text_encoder=None, tokenizer=None
    )
    for name, keywords in files.items():
        pipeline.load_lora_weights(
            folder, weight_name=f"{name}.safetensors", adapter_name=name, **keywords
        )
    pipeline.set_adapters(list(files), [1.0] * len(files))
    pipeline.fuse_lora(components=["transformer", "transformer_2"])
    pipeline.unload_lora_weights()
    return {
        f"{module}.{name}": value
        for module in ("transformer", "transformer_2")
        for name, value in getattr(pipeline, module).state_dict().items()
    }


@pytest.mark.parametrize("kind", ["hunyuan-video-1.5", "cosmos", "cosmos-2"])
def test_what_is_to_be_typed_works_where_the_pipeline_itself_loads_no_lora(kind, tmp_path):
    if not hasattr(DENOISERS[kind]().__class__, "load_lora_adapter"):
        pytest.skip("this version of diffusers gives the denoiser no LoRAs")
    inputs = inputs_of(kind)
    written = export_loras(MORE, tmp_path, rank=FULL_RANK, target="diffusers", inputs=inputs)
    pipe = SimpleNamespace(transformer=DENOISERS[kind]())
    pipe.transformer.load_state_dict(inputs["base"])
    for line in written.usage[1:]:
        exec(line.strip(), {"pipe": pipe})
    wanted = realise(MORE, inputs=inputs)["more"]
    changed = 0
    for path, layer in pipe.transformer.named_modules():
        if isinstance(getattr(layer, "base_layer", None), torch.nn.Linear):
            name = f"{path}.weight"
            found = layer.base_layer.weight + layer.get_delta_weight("more")
            torch.testing.assert_close(found, wanted[name], atol=1e-4, rtol=1e-4)
            changed += 1
    held = load_file(tmp_path / "more.safetensors")
    loaded = {name for name in pipe.transformer.state_dict() if ".lora_" in name}
    assert changed > 10 and len(loaded) == len(held)
    assert ("cond_type_embed.weight" in written["more"].left_out) == (kind == "hunyuan-video-1.5")


@pytest.mark.parametrize("target", ["diffusers", "comfyui"])
def test_diffusers_loads_one_file_for_each_denoiser(pair, target, tmp_path):
    recipe = recipe_of(pair)
    written = export_loras(recipe, tmp_path, rank=FULL_RANK, target=target)
    assert list(written) == ["fast_high_noise", "calm_low_noise"]
    found = fused(
        pair, {"fast_high_noise": {}, "calm_low_noise": {"load_into_transformer_2": True}}, tmp_path
    )
    experts = realise(recipe)
    base = Checkpoint.load(pair / "base").tensors()
    for name, value in found.items():
        expert = experts["fast" if name.startswith("transformer.") else "calm"][name]
        # of a file for ComfyUI, diffusers leaves out what is no linear layer of a known name
        known = target == "diffusers" or "patch_embedding" not in name
        held = known and ("norm" not in name and "scale_shift_table" not in name)
        torch.testing.assert_close(value, expert if held else base[name], atol=1e-5, rtol=1e-4)


def test_what_is_typed_for_diffusers_is_code_that_runs(pair, tmp_path):
    written = export_loras(recipe_of(pair), tmp_path, rank=4, target="diffusers")
    pipe = WanImageToVideoPipeline.from_pretrained(pair / "base", text_encoder=None, tokenizer=None)
    lines = [line.strip() for line in written.usage if line.startswith("  pipe.")]
    assert len(lines) == 4
    for line in lines:
        exec(line, {"pipe": pipe})
    assert pipe.get_list_adapters() == {
        "transformer": ["fast_high_noise"], "transformer_2": ["calm_low_noise"],
    }  # fmt: skip


def test_two_denoisers_in_one_file_come_back_exactly(pair, tmp_path):
    recipe = recipe_of(pair)
    written = export_loras(recipe, tmp_path, rank=FULL_RANK)
    assert list(written) == ["fast", "calm"] and "--for comfyui" in written.usage[0]
    base = Checkpoint.load(pair / "base", name="base").tensors()
    for expert, wanted in realise(recipe).items():
        found = again(base, tmp_path / f"{expert}.safetensors")
        assert not different(found, wanted)


def test_files_of_two_denoisers_come_back_exactly_where_they_are_restricted(pair, tmp_path):
    export_loras(recipe_of(pair), tmp_path, rank=FULL_RANK, target="comfyui")
    back = Recipe.parse(
        f"""
inputs: {{base: {pair}/base, h: {tmp_path}/fast_high_noise.safetensors,
          l: {tmp_path}/calm_low_noise.safetensors}}
experts:
  both: 'base + only(lora(h, 1.0), "transformer.*") + only(lora(l, 1.0), "transformer_2.*")'
"""
    )  # fmt: skip
    found, experts = realise(back)["both"], realise(recipe_of(pair))
    for module, expert in (("transformer.", "fast"), ("transformer_2.", "calm")):
        wanted = {n: v for n, v in experts[expert].items() if n.startswith(module)}
        assert not different(found, wanted)


@pytest.mark.parametrize("target", ["comfyui", "diffusers", "wan2gp"])
def test_files_of_two_denoisers_go_where_their_headers_say(pair, target, tmp_path):
    recipe = recipe_of(pair)
    written = export_loras(recipe, tmp_path, rank=FULL_RANK, target=target)
    files = {"transformer.": "fast_high_noise", "transformer_2.": "calm_low_noise"}
    base = Checkpoint.load(pair / "base", name="base")
    both = base
    for file in files.values():
        both += lora(tmp_path / f"{file}.safetensors", 1.0)
    wanted = base.tensors()
    for (module, file), expert in zip(files.items(), realise(recipe).values(), strict=True):
        wanted |= {
            name: value
            for name, value in expert.items()
            if name.startswith(module) and name not in written[file].left_out
        }
    assert not different(both.tensors(), wanted)


def test_files_of_two_denoisers_are_attached_where_their_headers_say(pair, tmp_path):
    export_loras(recipe_of(pair), tmp_path, rank=FULL_RANK, target="diffusers")
    denoisers = {"transformer": tiny_image_wan(0), "transformer_2": tiny_image_wan(1)}
    base = Checkpoint.load(pair / "base").tensors()
    experts = realise(recipe_of(pair))
    for file, own, other in (
        ("fast_high_noise", "transformer", "transformer_2"),
        ("calm_low_noise", "transformer_2", "transformer"),
    ):
        path = tmp_path / f"{file}.safetensors"
        assert describe_lora(path).modules == (own,)
        found = read_lora(path, denoisers, name="style").layers
        assert not found[other] and len(found[own]) > 20
        expert = experts[file.partition("_")[0]]
        for layer, factors in found[own].items():
            name = f"{own}.{layer}.weight"
            product = factors.alpha / factors.rank * factors.up.flatten(1) @ factors.down.flatten(1)
            change = (expert[name] - base[name]).flatten(1)
            torch.testing.assert_close(product, change, atol=1e-6, rtol=1e-4)


def test_a_file_for_a_denoiser_that_the_model_lacks_is_refused_by_name(pair, tmp_path):
    export_loras(recipe_of(pair), tmp_path, rank=2, target="diffusers")
    high, low = (tmp_path / f"{n}.safetensors" for n in ("fast_high_noise", "calm_low_noise"))
    alone = {f"transformer.{name}": value for name, value in tiny_image_wan(0).state_dict().items()}
    words = r"(?s)`transformer_2`; the model has `transformer`\..*Fix: Use it with the model that"
    with pytest.raises(CheckpointError, match=words):
        again(alone, low)
    with pytest.raises(CheckpointError, match=words):
        read_lora(low, {"transformer": tiny_image_wan(0)}, name="style")
    assert different(again(alone, high), alone)
    # One denoiser's own weights have no names of modules: whoever gives them says which they are.
    bare = tiny_image_wan(0).state_dict()
    assert different(again(bare, low), bare)
    assert read_lora(low, {"denoiser": tiny_image_wan(0)}, name="style").layers["denoiser"]


def test_a_file_for_both_denoisers_that_changes_one_leaves_the_other_alone(pair, tmp_path):
    base = Checkpoint.load(pair / "base").tensors()
    tuned = {n: v + 1 if n.startswith("transformer.") else v for n, v in base.items()}
    export_loras(MORE, tmp_path, rank=1, inputs={"base": base, "tuned": tuned})
    found = different(again(base, tmp_path / "more.safetensors"), base)
    assert found and all(name.startswith("transformer.") for name in found)


def test_a_header_that_names_no_module_of_a_pipeline_is_refused(tmp_path):
    path = tmp_path / "odd.safetensors"
    file = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}
    save_file(file, path, metadata={"motionmerge.modules": "transformer_3"})
    with pytest.raises(CheckpointError, match=r"`transformer_3`, as `motionmerge\.modules`"):
        again({"x.weight": torch.zeros(2, 2)}, path)


def test_an_expert_gets_files_only_for_the_denoisers_that_run_while_it_is_in_force(pair, tmp_path):
    for above, phases in {
        0.9: {"fast_high_noise": "1;0", "calm_low_noise": "0;1"},
        0.5: {"fast_high_noise": "1;0;0", "fast_low_noise": "0;1;0", "calm_low_noise": "0;0;1"},
        0.95: {"fast_high_noise": "1;0;0", "calm_high_noise": "0;1;0", "calm_low_noise": "0;0;1"},
    }.items():
        written = export_loras(
            recipe_of(pair, above=above), tmp_path, rank=1, target="wan2gp", dry_run=True
        )
        assert {name: found.multipliers for name, found in written.items()} == phases
        assert f"Loras Multipliers: {' '.join(phases.values())}" in "\n".join(written.usage)
    assert not list(tmp_path.iterdir())


def test_comfyui_is_told_where_its_samplers_are_cut(pair, tmp_path):
    written = export_loras(
        recipe_of(pair, above=0.875), tmp_path, rank=1, target="comfyui", dry_run=True
    )
    text = "\n".join(written.usage)
    assert "fast_high_noise: LoraLoaderModelOnly on the high-noise model" in text
    assert "falls to 0.9" in text  # where the denoisers change; the recipe's boundary is below
    share = float(re.search(r"([\d.]+) x steps at shift 5", text)[1])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(1000)
    assert share == pytest.approx(float((scheduler.sigmas > 0.9).float().mean()), abs=0.01)


# factors


def spectrum(kind, rows=1500, columns=1200):
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    values = {
        "steep": torch.arange(1, columns + 1).float() ** -1.5,
        "flat": torch.linspace(1, 0.5, columns),
        "step": torch.cat([torch.ones(20), torch.full((columns - 20,), 1e-3)]),
    }[kind]
    return (left * values) @ right.T


@pytest.mark.parametrize("kind", ["steep", "flat", "step"])
def test_the_factors_of_a_large_matrix_hold_nearly_what_the_best_ones_do(kind):
    matrix = spectrum(kind)
    best = torch.linalg.svdvals(matrix.double())[:32].square().sum()
    found = factors_of(matrix, rank=32, name="x")
    left = (matrix - found.up @ found.down).double().square().sum()
    held = matrix.double().square().sum() - left
    assert held / best > (0.98 if kind == "flat" else 0.9999)
    assert found.held == pytest.approx(float(held), rel=1e-3)
    assert not found.is_whole


def test_the_factors_of_a_small_matrix_are_the_best_ones():
    matrix = spectrum("flat", rows=90, columns=60)
    found = factors_of(matrix, rank=7, name="x")
    best = torch.linalg.svdvals(matrix.double())[:7].square().sum()
    assert found.held == pytest.approx(float(best), rel=1e-6) and found.is_whole
    assert torch.equal(found.up, factorise(matrix, rank=7).up)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4), (6, 6)])
def test_factors_of_full_rank_multiply_to_the_matrix_bit_for_bit(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = factors_of(matrix, rank=10, name="x")
    assert torch.equal(found.up @ found.down, matrix) and found.up.shape[1] == 10


def test_a_file_does_not_depend_on_the_order_in_which_threads_finish(tmp_path, monkeypatch):
    base = {f"blocks.{n}.attn1.to_q.weight": torch.randn(400, 300) for n in range(12)}
    inputs = {"base": base, "tuned": moved(base)}
    made = []
    for number, threads in enumerate((1, 3, 3)):
        monkeypatch.setattr(
            "motionmerge.merging.compute.streaming.num_threads", lambda _, n=threads: n
        )
        export_loras(MORE, tmp_path / str(number), rank=5, inputs=inputs)
        made.append((tmp_path / str(number) / "more.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]


# refusals


def test_a_dry_run_says_what_there_will_be_and_writes_nothing(tmp_path):
    written = export_loras(MORE, tmp_path / "out", rank=4, inputs=inputs_of("wan"), dry_run=True)
    assert written["more"].path is None and not (tmp_path / "out").exists()
    assert "dry run" in str(written["more"])


def test_a_target_that_is_unknown_or_has_no_names_for_the_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no tool") as error:
        export_loras(MORE, tmp_path, rank=4, target="comfy", inputs=inputs_of("wan"))
    assert "comfyui" in error.value.fix
    odd = {"base": {"a.weight": torch.ones(4, 4)}, "tuned": {"a.weight": torch.zeros(4, 4)}}
    with pytest.raises(ConfigError, match="No original names are known"):
        export_loras(MORE, tmp_path, rank=4, target="comfyui", inputs=odd)
    assert not list(tmp_path.iterdir())


def test_nothing_is_computed_when_a_file_is_in_the_way(tmp_path):
    (tmp_path / "more.safetensors").mkdir()
    with pytest.raises(ConfigError, match="Cannot write"):
        export_loras(MORE, tmp_path, rank=4, inputs=inputs_of("wan"), overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Cannot write"):
        export_loras(MORE, tmp_path / "file", rank=4, inputs=inputs_of("wan"))


def test_an_expert_that_only_moves_what_the_tool_cannot_load_is_refused(tmp_path):
    base = state_of("wan")
    tuned = {**base, "scale_shift_table": base["scale_shift_table"] + 1}
    inputs = {"base": base, "tuned": tuned}
    with pytest.raises(CheckpointError, match="would be empty"):
        export_loras(MORE, tmp_path, rank=4, target="diffusers", inputs=inputs)
    assert not list(tmp_path.iterdir())
    export_loras(MORE, tmp_path, rank=4, target="comfyui", inputs=inputs)
    tensors = load_file(tmp_path / "more.safetensors")
    assert list(tensors) == ["diffusion_model.head.modulation.diff"]


def test_signed_loras_on_a_loaded_model_are_exported_with_a_base(tmp_path):
    base = state_of("wan")
    q = "transformer.blocks.0.attn1.to_q"
    style = {f"{q}.lora_A.weight": torch.ones(1, 24), f"{q}.lora_B.weight": torch.ones(24, 1)}
    save_file(style, tmp_path / "style.safetensors")
    recipe = Recipe.parse(
        "inputs: {base: 'memory:base', style: style.safetensors}\n"
        "experts: {away: 'base + lora(style, -0.5)'}",
        folder=tmp_path,
    )
    with pytest.raises(CheckpointError, match="leaves the input `base` to you") as error:
        export_loras(recipe, tmp_path / "out", rank=1)
    assert "inputs={'base'" in error.value.fix
    export_loras(recipe, tmp_path / "out", rank=1, inputs={"base": base})
    tensors = load_file(tmp_path / "out" / "away.safetensors")
    product = tensors[f"{q}.lora_B.weight"] @ tensors[f"{q}.lora_A.weight"]
    torch.testing.assert_close(product, torch.full((24, 24), -0.5))
    assert len(tensors) == 2
