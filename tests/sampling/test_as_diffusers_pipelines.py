"""Our pipelines under everything that diffusers' own offer, as its test mixins check it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from motionmerge.errors import CheckpointError, ConfigError, DataError, ShapeError
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.dynamicrafter.encoders import text_encoder_config
from motionmerge.models.text_adapters import add_text_adapter
from motionmerge.sampling.pipelines.consisti2v import ConsistI2VPipeline
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.sampling.pipelines.pocket import PocketPipeline, load_pocket
from motionmerge.sampling.pipelines.svd_adapter import SvdAdapterPipeline
from motionmerge.sampling.pipelines.videocrafter import VideoCrafterPipeline
from motionmerge.switching.expert_bank import experts

from ..tiny import builders as build
from ..tiny.consisti2v import tiny_consisti2v
from ..tiny.dynamicrafter import tiny_pipeline, tiny_videocrafter

STEPS = 2
PIPELINES: dict[str, Callable[[], Any]] = {
    "DynamiCrafter": tiny_pipeline,
    "VideoCrafter": lambda: seeded(tiny_videocrafter),
    "ConsistI2V": tiny_consisti2v,
}
every_pipeline = pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def picture() -> Image.Image:
    return Image.radial_gradient("L").resize((16, 16)).convert("RGB")


def run(pipeline: Any, **options: Any) -> torch.Tensor:
    arguments = {
        "image": picture(),
        "prompt": "a cat",
        "num_frames": 3,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(7),
        "output_type": "pt",
    }
    made = pipeline(**{**arguments, **options}).frames
    assert torch.isfinite(made).all()
    return made


@every_pipeline
def test_who_calls_back_sees_the_call_and_may_end_it(make: Callable[[], Any]) -> None:
    pipeline, seen = make(), []
    assert not pipeline.interrupt

    def watch(called: Any, step: int, _: Any, tensors: Any) -> Any:
        assert (called.guidance_scale, called.num_timesteps) == (3.0, STEPS)
        seen.append(tensors["latents"].clone())
        called._interrupt = step == last
        return tensors

    last = STEPS
    whole = run(pipeline, callback_on_step_end=watch, output_type="latent")
    assert len(seen) == STEPS
    last = 0
    ended = run(pipeline, callback_on_step_end=watch, output_type="latent")
    assert len(seen) == STEPS + 1 and torch.equal(seen[0], seen[-1])
    assert torch.equal(ended[:, :, -2:], seen[-1][:, :, -2:])
    last = STEPS
    assert torch.equal(run(pipeline, output_type="latent"), whole), "the next call is whole again"


@every_pipeline
def test_guidance_set_by_who_calls_back_is_used(make: Callable[[], Any]) -> None:
    pipeline = make()

    def setting(scales: list[float]) -> Callable[..., Any]:
        def change(called: Any, step: int, _: Any, tensors: Any) -> Any:
            called._guidance_scale = scales[step]
            return tensors

        return change

    plain = run(pipeline)
    same = run(pipeline, callback_on_step_end=setting([3.0] * STEPS))
    assert torch.equal(same, plain)
    without = run(pipeline, guidance_scale=1.0)
    calls: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    lowered = run(pipeline, callback_on_step_end=setting([1.0] * STEPS))
    hook.remove()
    assert len(calls) == 2 + 1, "no second pass where guidance is 1"
    assert not torch.equal(lowered, plain) and not torch.equal(lowered, without)
    raised = setting([3.0] * STEPS)
    with pytest.raises(ConfigError, match="began without any"):
        run(pipeline, guidance_scale=1.0, callback_on_step_end=raised)


def test_an_image_is_the_same_from_pil_a_path_an_array_and_a_tensor(tmp_path: Path) -> None:
    pipeline, image, path = tiny_pipeline(), picture(), tmp_path / "photo.png"
    image.save(path)
    pixels = np.asarray(image)
    one_step = {"num_inference_steps": 1, "guidance_scale": 1.0}
    expected = run(pipeline, **one_step)
    for given in (path, str(path), pixels, [path], [pixels], pixels[None]):
        assert torch.equal(run(pipeline, image=given, **one_step), expected)
    floats = pixels.astype(np.float32) / 255
    tensor = torch.from_numpy(floats).permute(2, 0, 1)
    for given in (floats, floats[None], [floats], tensor, tensor[None], [tensor], [tensor[None]]):
        torch.testing.assert_close(run(pipeline, image=given, **one_step), expected)


def test_a_text_is_one_prompt() -> None:
    pipelines = [tiny_pipeline(), tiny_consisti2v(), load_pocket(), svd_with_adapter()]
    for pipeline in pipelines:
        prompt = "the red ball moves left" if isinstance(pipeline, PocketPipeline) else "a cat"
        tokens = pipeline.encode_prompt(prompt)
        assert len(tokens) == 1
        assert torch.equal(tokens, pipeline.encode_prompt([prompt]))
        assert torch.equal(tokens.expand(2, -1, -1), pipeline.encode_prompt((prompt, prompt)))
        with pytest.raises(ConfigError, match="A prompt is 7"):
            pipeline.encode_prompt([7])


@every_pipeline
def test_a_prompt_is_encoded_without_the_network_and_used_without_the_encoder(
    make: Callable[[], Any],
) -> None:
    parts = dict(make().components)
    encoding = {name for name in parts if name.startswith(("text", "token"))}
    encoder = type(make())(**{name: parts[name] if name in encoding else None for name in parts})
    with torch.no_grad():
        embeds = {
            "prompt_embeds": encoder.encode_prompt("a cat"),
            "negative_prompt_embeds": encoder.encode_prompt("the camera pans"),
        }
    rest = {name: None if name in encoding else parts[name] for name in parts}
    network = type(encoder)(**rest, height=16, width=16)
    network.set_progress_bar_config(disable=True)
    own = {"negative_prompt": "the camera pans", "num_inference_steps": 1}
    expected = run(type(encoder)(**parts, height=16, width=16), **own)
    made = run(network, prompt=None, **embeds, num_inference_steps=1)
    assert torch.equal(made, expected)


@every_pipeline
def test_saved_as_a_variant_and_with_parts_of_other_types_it_is_loaded(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    pipeline, one_step = make(), {"num_inference_steps": 1}
    kind, expected = type(pipeline), run(pipeline, **one_step)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert all(".fp16." in file.name for file in tmp_path.rglob("*.safetensors"))
    with pytest.raises((OSError, ValueError), match=r"fp16|no file named"):
        kind.from_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, variant="fp16")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(loaded, **one_step), expected, rtol=0, atol=1e-4)
    dtypes = {"unet": torch.bfloat16, "default": torch.float32}
    mixed = kind.from_pretrained(tmp_path, variant="fp16", torch_dtype=dtypes)
    mixed.set_progress_bar_config(disable=True)
    assert (mixed.unet.dtype, mixed.vae.dtype) == (torch.bfloat16, torch.float32)
    halves = run(mixed.to(dtype=torch.bfloat16), **one_step)
    assert mixed.vae.dtype == torch.bfloat16 and halves.dtype == torch.float32
    assert mixed.to("meta").unet.device.type == "meta"


@every_pipeline
def test_a_pipeline_of_another_one_s_parts_is_that_pipeline(make: Callable[[], Any]) -> None:
    pipeline = make()
    other = type(pipeline).from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    assert other.components == pipeline.components
    assert other.config.height == pipeline.config.height == 16
    one_step = {"num_inference_steps": 1}
    assert torch.equal(run(other, **one_step), run(pipeline, **one_step))


@every_pipeline
def test_forms_of_the_result_agree_and_latents_that_are_given_decide(
    make: Callable[[], Any],
) -> None:
    pipeline, seeds = make(), [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    one_step = {"num_inference_steps": 1, "eta": 0.0}
    two = run(pipeline, num_videos_per_prompt=2, generator=seeds, **one_step)
    single = run(pipeline, **one_step)
    assert two.shape == (2, 3, 3, 16, 16)
    torch.testing.assert_close(two[:1], single, rtol=0, atol=1e-4)
    assert not torch.equal(two[0], two[1])
    given = {**one_step, "latents": torch.randn(1, 4, 3, 8, 8)}
    if isinstance(pipeline, ConsistI2VPipeline):
        given["start"] = None
    made, again = (
        run(pipeline, generator=torch.Generator().manual_seed(seed), **given) for seed in (1, 2)
    )
    assert torch.equal(made, again) and not torch.equal(made, single)
    call = {"image": picture(), "prompt": "a cat", "num_frames": 3, "guidance_scale": 3.0, **given}
    frames, pictures = (
        pipeline(**call, output_type=form, return_dict=False)[0] for form in ("np", "pil")
    )
    assert frames.shape == (1, 3, 16, 16, 3)
    torch.testing.assert_close(torch.from_numpy(frames).permute(0, 1, 4, 2, 3), made)
    assert np.abs(np.stack(pictures[0]) / 255 - frames[0]).max() <= 0.5 / 255 + 1e-6


@every_pipeline
def test_keys_are_computed_again_after_who_calls_back_as_weights_may_have_changed(
    make: Callable[[], Any],
) -> None:
    pipeline, calls = make(), []
    width = pipeline.unet.config.cross_attention_dim
    modules = pipeline.unet.named_modules()
    of_tokens = (m for name, m in modules if name.endswith("to_k") and m.in_features == width)
    next(of_tokens).register_forward_hook(lambda *_: calls.append(1))
    run(pipeline)
    kept = len(calls)
    run(pipeline, callback_on_step_end=lambda *given: given[-1])
    assert len(calls) == kept + STEPS * kept


@every_pipeline
def test_latents_of_who_calls_back_are_used(make: Callable[[], Any]) -> None:
    def end_grey(called: Any, step: int, _: Any, tensors: Any) -> Any:
        is_last = step == called.num_timesteps - 1
        return {"latents": tensors["latents"] * (0 if is_last else 1)}

    pipeline = make()
    names = pipeline._callback_tensor_inputs
    options = {"callback_on_step_end_tensor_inputs": names, "output_type": "latent"}
    made = run(pipeline, callback_on_step_end=end_grey, **options)
    stays = 1 if isinstance(pipeline, ConsistI2VPipeline) else 0  # its first frame is the photo's
    assert not made[:, :, stays:].any() and made[:, :, :stays].any() == bool(stays)


def test_pipelines_show_the_arguments_and_defaults_of_their_call() -> None:
    for kind in (DynamiCrafterPipeline, VideoCrafterPipeline, PocketPipeline, ConsistI2VPipeline):
        shown = inspect.signature(kind.__call__).parameters
        assert {"image", "prompt", "negative_prompt", "prompt_embeds", "latents"} <= shown.keys()
        assert {"height", "width", "generator", "output_type", "return_dict"} <= shown.keys()
    assert (
        inspect.signature(tiny_videocrafter().__call__).parameters["guidance_scale"].default == 12
    )
    assert inspect.signature(PocketPipeline.__call__).parameters["eta"].default == 0


@every_pipeline
def test_videos_of_a_batch_do_not_depend_on_each_other(make: Callable[[], Any]) -> None:
    pipeline = make()
    seeds = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    both = run(pipeline, prompt=["a cat", "the camera pans left"], generator=seeds)
    assert len(both) == 2
    torch.testing.assert_close(both[:1], run(pipeline), rtol=0, atol=1e-4)


def sequentially(pipeline: Any, folder: Path) -> None:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload(part, torch.device("cpu"))


def by_model(pipeline: Any, folder: Path) -> None:
    pipeline.enable_model_cpu_offload(device="cpu")


def in_groups(pipeline: Any, folder: Path) -> None:
    pipeline.enable_group_offload(
        "cpu", offload_type="leaf_level", offload_to_disk_path=str(folder)
    )


def in_fp8(pipeline: Any, folder: Path) -> None:
    pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


@pytest.mark.parametrize("how", [sequentially, by_model, in_groups, in_fp8])
@every_pipeline
def test_with_less_memory_it_makes_the_same_video(
    make: Callable[[], Any], how: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    pipeline = make()
    expected = run(pipeline, num_inference_steps=1)
    how(pipeline, tmp_path)
    tolerance = 0.5 if how is in_fp8 else 1e-4
    for _ in range(2):
        made = run(pipeline, num_inference_steps=1)
        torch.testing.assert_close(made, expected, rtol=0, atol=tolerance)


def test_the_pocket_model_runs_in_bf16_with_weights_in_fp8() -> None:
    pipeline = load_pocket().to(dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    photo = picture().resize((64, 64))
    video = run(pipeline, image=photo, prompt="the red ball moves left", num_frames=16)
    assert video.shape == (1, 16, 3, 64, 64)


def save_lora(make: Callable[[], Any], folder: Path, *, seed: int, rank: int) -> torch.Tensor:
    """Write a LoRA whose alpha is not its rank; returns the video that it makes."""
    pipeline = make()
    layers = ["to_q", "to_k", "ff.net.0.proj", "time_emb_proj"]
    settings = {"r": rank, "lora_alpha": 3 * rank, "target_modules": layers}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline.unet.add_adapter(LoraConfig(**settings, init_lora_weights=False))
    for name, one in pipeline.unet.named_parameters():
        if "lora_B" in name and make is tiny_pipeline:  # which amplifies all changes
            one.data *= 0.1
    tensors = get_peft_model_state_dict(pipeline.unet)
    settings = pipeline.unet.peft_config["default"].to_dict()
    pipeline.save_lora_weights(folder, tensors, unet_lora_adapter_metadata=settings)
    return run(pipeline, num_inference_steps=1)


@every_pipeline
def test_loras_are_loaded_mixed_swapped_fused_and_unloaded(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    acting = {
        name: save_lora(make, tmp_path / name, seed=seed, rank=rank)
        for name, seed, rank in (("one", 1, 2), ("two", 2, 4))
    }
    pipeline = make()
    plain = run(pipeline, num_inference_steps=1)

    def check(expected: torch.Tensor, tolerance: float = 2e-3) -> None:
        made = run(pipeline, num_inference_steps=1)
        torch.testing.assert_close(made, expected, rtol=0, atol=tolerance)

    assert all((plain - one).abs().max() > 0.01 for one in acting.values())
    pipeline.load_lora_weights(tmp_path / "one", adapter_name="one")
    check(acting["one"])
    pipeline.set_adapters("one", 0.0)
    check(plain, tolerance=0)  # a LoRA of weight 0 changes no bit
    pipeline.set_adapters("one", {"unet": {"time_emb": 0.0, "to_q": 0.0, "to_k": 0, "proj": 0.0}})
    check(plain, tolerance=0)
    for parts in ({"to_qq": 0.0}, {"to_q": {"block_0": 0.0}}):
        with pytest.raises(ConfigError, match="part of a layer's name"):
            pipeline.set_adapters(["one"], [{"unet": parts}])
    file = tmp_path / "two" / "pytorch_lora_weights.safetensors"
    pipeline.load_lora_weights(str(file.parent), adapter_name="two", weight_name=file.name)
    pipeline.set_adapters(["one", "two"], [0.0, 1.0])
    check(acting["two"])
    assert pipeline.get_list_adapters() == {"unet": ["one", "two"]}
    pipeline.delete_adapters("two")
    pipeline.set_adapters("one")
    pipeline.fuse_lora()
    check(acting["one"])
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    check(plain)
    pipeline.enable_lora_hotswap(target_rank=4)
    pipeline.load_lora_weights(tmp_path / "one", adapter_name="one")
    pipeline.load_lora_weights(file, adapter_name="one", hotswap=True)
    check(acting["two"])


def test_a_lora_is_loaded_while_parts_or_layers_take_turns_but_not_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acting = save_lora(tiny_pipeline, tmp_path, seed=1, rank=2)
    pipeline = tiny_pipeline()
    in_groups(pipeline, tmp_path / "parts")
    with pytest.raises(ConfigError, match="wait in files"):
        pipeline.load_lora_weights(tmp_path)
    pipeline = tiny_pipeline()
    with pytest.raises(ConfigError, match="earlier group offload"):
        in_groups(pipeline, tmp_path / "parts")
    plain = run(pipeline, num_inference_steps=1)
    pipeline.enable_group_offload("cpu", offload_type="leaf_level", exclude_modules="vae")
    pipeline.load_lora_weights(tmp_path, adapter_name="one")
    made = run(pipeline, num_inference_steps=1)
    torch.testing.assert_close(made, acting, rtol=0, atol=2e-3)
    pipeline.delete_adapters("one")
    made = run(pipeline, num_inference_steps=1)
    torch.testing.assert_close(made, plain, rtol=0, atol=2e-3)
    pipeline = tiny_pipeline()
    offload = type(pipeline).enable_model_cpu_offload  # diffusers' loading calls it again
    on_cpu = functools.partialmethod(offload, device="cpu")
    monkeypatch.setattr(type(pipeline), "enable_model_cpu_offload", on_cpu)
    pipeline.enable_model_cpu_offload()
    pipeline.load_lora_weights(tmp_path)
    made = run(pipeline, num_inference_steps=1)
    torch.testing.assert_close(made, acting, rtol=0, atol=2e-3)


def test_parts_in_files_have_folders_of_their_own(tmp_path: Path) -> None:
    pipeline = svd_with_adapter()  # two towers of CLIP, whose layers have the same names
    own = {"offload_type": "leaf_level", "offload_to_disk_path": tmp_path}
    own["exclude_modules"] = ["unet", "vae"]
    prompt = pipeline.encode_prompt("a cat")
    pipeline.enable_group_offload("cpu", **own)
    assert {one.name for one in tmp_path.iterdir()} == {"image_encoder", "text_encoder"}
    torch.testing.assert_close(pipeline.encode_prompt("a cat"), prompt)
    with pytest.raises(ConfigError, match="earlier group offload"):
        svd_with_adapter().enable_group_offload("cpu", **own)


def test_svd_with_adapter_shares_its_parts_with_another_pipeline() -> None:
    pipeline = svd_with_adapter()
    assert SvdAdapterPipeline.from_pipe(pipeline).components == pipeline.components


def test_a_lora_that_does_not_fit_is_refused_by_name() -> None:
    pipeline = tiny_pipeline()
    layer = "temporal_in.transformer_blocks.0.attn1.to_q"
    own = pipeline.unet.get_submodule(layer).weight

    def pair(name: str, width: int) -> dict[str, torch.Tensor]:
        down, up = torch.zeros(2, width), torch.zeros(own.shape[0], 2)
        return {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}

    with pytest.raises(CheckpointError, match="mid_block"):
        pipeline.load_lora_weights({**pair(layer, own.shape[1]), **pair("mid_block.attn", 8)})
    with pytest.raises(ShapeError, match=layer):
        pipeline.load_lora_weights(pair(layer, own.shape[1] + 1))
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        pipeline.load_lora_weights({"weight": torch.zeros(2, 2)})
    assert not hasattr(pipeline.unet, "peft_config")
    lora = pair(layer, own.shape[1])
    recipe = Recipe.knob(lora="memory:style", motion=0.5)
    attached = experts(pipeline, recipe=recipe, inputs={"style": lora})
    with attached, pytest.raises(ConfigError, match="Experts are attached"):
        pipeline.load_lora_weights(lora)
    pipeline.load_lora_weights(lora)


def test_a_lora_is_saved_with_what_its_strength_depends_on(tmp_path: Path) -> None:
    unet = tiny_pipeline().unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"]))
    tensors, settings = get_peft_model_state_dict(unet), unet.peft_config["default"].to_dict()
    file = tmp_path / "pytorch_lora_weights.safetensors"
    DynamiCrafterPipeline.save_lora_weights(tmp_path, tensors, unet_lora_adapter_metadata=settings)
    for source in (tmp_path, file):
        read, kept = DynamiCrafterPipeline.lora_state_dict(source, return_lora_metadata=True)
        assert kept["unet.lora_alpha"] == 6 and kept["unet.r"] == 2
        assert read.keys() == {f"unet.{name}" for name in tensors}
        assert all(torch.equal(read[f"unet.{name}"], one) for name, one in tensors.items())
    with pytest.warns(UserWarning, match="loaded with its rank as alpha"):
        DynamiCrafterPipeline.save_lora_weights(tmp_path, tensors, safe_serialization=False)
    pickled = tmp_path / "pytorch_lora_weights.bin"
    assert DynamiCrafterPipeline.lora_state_dict(pickled).keys() == read.keys()
    assert DynamiCrafterPipeline.lora_state_dict(pickled, return_lora_metadata=True)[1] is None
    assert {one.name for one in tmp_path.iterdir()} == {file.name, pickled.name}
    with pytest.raises(ConfigError, match="no LoRA tensors"):
        DynamiCrafterPipeline.save_lora_weights(tmp_path, {})
    with pytest.raises(ConfigError, match="pickle cannot hold"):
        DynamiCrafterPipeline.save_lora_weights(
            tmp_path, tensors, unet_lora_adapter_metadata=settings, safe_serialization=False
        )
    with pytest.raises(DataError, match="Cannot write"):
        DynamiCrafterPipeline.save_lora_weights(file, tensors, unet_lora_adapter_metadata=settings)


def svd_with_adapter() -> SvdAdapterPipeline:
    pipeline = build.svd()
    add_text_adapter(pipeline.unet, text_dim=8, num_frames=2, num_heads=2, head_dim=4)
    size = {"width": 8, "layers": 1, "heads": 2, "num_tokens": 16}
    from transformers import CLIPTextModel

    tower = CLIPTextModel(text_encoder_config(**size, vocab_size=len(build.WORDS))).eval()
    return SvdAdapterPipeline.around(pipeline, text_encoder=tower, tokenizer=build.tokenizer())


def test_a_lora_acts_on_svd_with_adapter_too(tmp_path: Path) -> None:
    pipeline = svd_with_adapter()
    pipeline.set_progress_bar_config(disable=True)
    own = {
        "height": 16,
        "width": 16,
        "num_frames": 2,
        "num_inference_steps": 1,
        "decode_chunk_size": 2,
    }

    def make() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(picture(), "a cat", generator=generator, output_type="latent", **own).frames

    plain = make()
    pipeline.unet.add_adapter(
        LoraConfig(r=2, target_modules=["fusion.proj"], init_lora_weights=False)
    )
    acting = make()
    pipeline.unet.save_lora_adapter(tmp_path)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(make(), acting, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(acting, plain, atol=1e-3)
