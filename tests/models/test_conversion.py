"""Official names and ours: every tensor has its place, and the way back gives the same file."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPVisionModel

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.models.dynamicrafter import (
    DynamiCrafterUNet,
    DynamicRescaleDDIMScheduler,
    ImageProjector,
    checkpoint_folder,
    convert_unet_state_dict,
    from_original,
    unet_config_from_official,
)
from motionmerge.models.dynamicrafter.checkpoint_folder import (
    convert_checkpoint,
    inspect_checkpoint,
    to_official,
)
from motionmerge.models.dynamicrafter.conversion import (
    OfficialCheckpoint,
    unconvert_unet_state_dict,
)
from motionmerge.models.dynamicrafter.lazy_tensors import LazyTensor
from motionmerge.models.dynamicrafter.official_config import scheduler_config_from_buffers
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline

from .official_checkpoint import OVERRIDES, small_official_checkpoint
from .reference_weights import official_keys, official_weights

SCHEDULE_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "scale_arr",
)  # fmt: skip
RELEASED = {"unet": 1516, "vae": 248, "text_encoder": 372, "image_encoder": 519}
RELEASED["image_projector"] = 55


def on_meta(shapes: dict[str, list[int]]) -> dict[str, LazyTensor]:
    return {
        name: LazyTensor.of(torch.empty(shape, device="meta")) for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple:
    path = tmp_path_factory.mktemp("original") / "model.ckpt"
    tensors = small_official_checkpoint()
    torch.save({"state_dict": tensors, "global_step": 3}, path)
    return path, tensors


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_checkpoint(original[0], folder, overrides=OVERRIDES)
    return folder


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_every_key_of_the_released_512_checkpoint_has_its_place() -> None:
    keys = official_keys("checkpoint_512")
    checkpoint = OfficialCheckpoint(on_meta(keys["shapes"]))
    parts = checkpoint.components
    assert {name: len(part.tensors) for name, part in parts.items()} == RELEASED
    taken = sum(len(part.official) - len(part.unused) for part in parts.values())
    assert taken + len(checkpoint.unused) == len(keys["shapes"]) == 2520
    assert parts["unet"].num_parameters == keys["params"]["unet"]
    assert parts["vae"].num_parameters == keys["params"]["first_stage_model"]
    assert parts["image_projector"].num_parameters == keys["params"]["image_proj_model"]
    assert checkpoint.configs["unet"] == {
        "in_channels": 8,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_levels": [True, True, True, False],
        "layers_per_block": 2,
        "attention_head_dim": 64,
        "cross_attention_dim": 1024,
    }


def test_what_no_class_takes_is_known_by_name() -> None:
    checkpoint = OfficialCheckpoint(on_meta(official_keys("checkpoint_512")["shapes"]))
    heads = {f"cond_stage_model.model.{name}" for name in ("text_projection", "logit_scale")}
    last_layer = "cond_stage_model.model.transformer.resblocks.23."
    second_text_tower = {
        f"embedder.model.{name}"
        for name in (
            "positional_embedding",
            "text_projection",
            "logit_scale",
            "token_embedding.weight",
            "ln_final.weight",
            "ln_final.bias",
        )
    }
    expected = {*SCHEDULE_BUFFERS, *heads, *second_text_tower, "embedder.model.visual.proj"}
    found = {name for name in checkpoint.unused if not name.startswith(last_layer)}
    assert found == expected
    assert len(checkpoint.unused) == len(expected) + 12


def test_the_released_adapter_has_its_place() -> None:
    keys = official_keys("checkpoint_512")
    checkpoint = OfficialCheckpoint(on_meta({**keys["shapes"], **keys["adapter"]}))
    config = checkpoint.configs["unet"]
    assert config["temporal_context_dim"] == config["adapter_text_dim"] == 1024
    assert (config["adapter_heads"], config["adapter_head_dim"]) == (8, 128)
    added = checkpoint.components["unet"].num_parameters - keys["params"]["unet"]
    assert added == 30_181_056


@pytest.mark.parametrize("reference", ["unet_tiny", "unet_adapter"])
def test_a_unet_comes_back_bit_for_bit(reference: str) -> None:
    official = official_weights(reference)
    assert_same_tensors(unconvert_unet_state_dict(convert_unet_state_dict(official)), official)


def test_the_unet_is_found_in_a_whole_checkpoint(original) -> None:
    tensors = original[1]
    prefix = "model.diffusion_model."
    alone = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    assert_same_tensors(convert_unet_state_dict(tensors), convert_unet_state_dict(alone))


@pytest.mark.parametrize("reference", ["unet_tiny", "unet_adapter"])
def test_shapes_and_yaml_give_the_same_configuration(reference: str) -> None:
    keys = official_keys(reference)
    from_yaml = unet_config_from_official(keys["config"])
    checkpoint = OfficialCheckpoint(on_meta(keys["shapes"]))
    from_shapes = checkpoint.configs["unet"]
    shared = from_yaml.keys() & from_shapes.keys()
    assert len(shared) >= 7
    assert {name: from_yaml[name] for name in shared} == {
        name: from_shapes[name] for name in shared
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_relative_position": True}, "use_relative_position"),
        ({"num_res_block": 1}, "Unknown official U-Net parameter"),
        ({"context_dim": None}, None),
    ],
)
def test_an_unsupported_official_unet_is_refused(change: dict, message: str | None) -> None:
    params = {**official_keys("unet_tiny")["config"], **change}
    if message is None:
        params = {name: value for name, value in params.items() if value is not None}
        message = "lack context_dim"
    with pytest.raises(ConfigError, match=message):
        unet_config_from_official(params)


def test_old_spellings_are_understood() -> None:
    official = official_weights("unet_tiny")
    old = {
        f"_forward_module.model.diffusion_model.{name}".replace(
            "fps_embedding", "framestride_embed"
        ): value
        for name, value in official.items()
    }
    assert_same_tensors(convert_unet_state_dict(old), convert_unet_state_dict(official))


def test_the_learned_image_scale_of_the_256_model_is_folded_into_the_values() -> None:
    official = official_weights("unet_tiny")
    block = "input_blocks.1.1.transformer_blocks.0.attn2"
    alpha = torch.tensor(0.3)
    converted = convert_unet_state_dict({**official, f"{block}.alpha": alpha})
    ours = "down_stages.0.attention.transformer_blocks.0.attn2.processor.to_v_ip.0.weight"
    expected = official[f"{block}.to_v_ip.weight"] * (1 + alpha.tanh())
    torch.testing.assert_close(converted[ours], expected)
    assert converted.keys() == convert_unet_state_dict(official).keys()


def test_unknown_unet_tensors_are_refused() -> None:
    official = {**official_weights("unet_tiny"), "input_blocks.1.7.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"input_blocks\.1\.7"):
        convert_unet_state_dict(official)
    with pytest.raises(CheckpointError, match="not the tensors of a DynamiCrafter U-Net"):
        convert_unet_state_dict({"weight": torch.zeros(1)})


def test_a_checkpoint_with_missing_tensors_is_refused(original) -> None:
    tensors = {name: LazyTensor.of(value) for name, value in original[1].items()}
    del tensors["first_stage_model.encoder.conv_out.bias"]
    with pytest.raises(CheckpointError, match=r"encoder.conv_out.bias.*missing"):
        OfficialCheckpoint(tensors, overrides=OVERRIDES)


def test_a_checkpoint_of_something_else_is_refused() -> None:
    with pytest.raises(CheckpointError, match="None of the tensors belongs"):
        OfficialCheckpoint({"weight": LazyTensor.of(torch.zeros(1))})


def test_the_autoencoder_map_equals_that_of_diffusers(original, folder) -> None:
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    official = {k: v for k, v in original[1].items() if k.startswith("first_stage_model.")}
    expected = convert_ldm_vae_checkpoint(official, dict(vae.config))
    assert_same_tensors(dict(vae.state_dict()), expected)


def test_the_scheduler_is_read_off_the_buffers(original, folder) -> None:
    scheduler = DynamicRescaleDDIMScheduler.from_pretrained(folder / "scheduler")
    torch.testing.assert_close(scheduler.alphas_cumprod, original[1]["alphas_cumprod"])
    assert scheduler.config.base_scale == 0.7
    assert scheduler.config.rescale_steps == 400
    assert scheduler.config.prediction_type == "v_prediction"
    older = scheduler_config_from_buffers({"alphas_cumprod": torch.linspace(0.99, 0.005, 1000)})
    assert older["prediction_type"] == "epsilon"
    assert older["base_scale"] is None
    assert scheduler_config_from_buffers({}) == {}


def test_a_checkpoint_survives_the_way_to_a_folder_and_back(original, folder, tmp_path) -> None:
    count = to_official(folder, tmp_path / "back.safetensors")
    assert count == len(original[1])
    assert_same_tensors(load_file(tmp_path / "back.safetensors"), original[1])


def test_a_ckpt_can_be_written_for_the_official_code(original, folder, tmp_path) -> None:
    to_official(folder, tmp_path / "back.ckpt")
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert_same_tensors(back, original[1])


def test_the_folder_loads_with_the_usual_classes(original, folder) -> None:
    loaded = from_original(original[0], overrides=OVERRIDES)
    classes = {
        "unet": DynamiCrafterUNet,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "image_encoder": CLIPVisionModel,
        "image_projector": ImageProjector,
    }
    for name, model in classes.items():
        module = model.from_pretrained(folder / name)
        assert_same_tensors(dict(module.state_dict()), dict(loaded[name].state_dict()))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DynamiCrafterPipeline"
    assert index["tokenizer"] == [None, None]
    assert loaded["scheduler"].config.base_scale == 0.7


def test_a_converted_checkpoint_makes_a_video(original, tmp_path) -> None:
    vocabulary = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(vocabulary, "wt", encoding="utf-8") as file:
        file.write("#version\nd o\n")
    folder = tmp_path / "model"
    convert_checkpoint(original[0], folder, tokenizer=vocabulary, overrides=OVERRIDES)
    pipeline = DynamiCrafterPipeline.from_pretrained(folder)
    assert (pipeline.config.height, pipeline.config.width) == (320, 512)
    settings = {"height": 64, "width": 64, "num_frames": 8, "num_inference_steps": 2}
    generator = torch.Generator().manual_seed(0)
    image = Image.new("RGB", (64, 64), "red")
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(image, "do!", **settings, generator=generator, output_type="pt")
    assert out.frames.shape == (1, 8, 3, 64, 64)
    assert out.frames.isfinite().all()
    pipeline.save_pretrained(tmp_path / "again")
    to_official(tmp_path / "again", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], original[1][name]) for name in back)


def test_components_saved_by_their_own_classes_come_back_too(original, folder, tmp_path) -> None:
    for name, model in from_original(original[0], overrides=OVERRIDES).items():
        if name != "scheduler":
            model.save_pretrained(tmp_path / "saved" / name)
    to_official(tmp_path / "saved", tmp_path / "back.safetensors")
    unused = load_file(folder / "unused.safetensors")
    expected = {name: value for name, value in original[1].items() if name not in unused}
    assert_same_tensors(load_file(tmp_path / "back.safetensors"), expected)


def test_weights_can_be_written_in_half_precision(original, tmp_path) -> None:
    convert_checkpoint(original[0], tmp_path / "half", dtype=torch.float16, overrides=OVERRIDES)
    unet = DynamiCrafterUNet.from_pretrained(tmp_path / "half" / "unet", torch_dtype=torch.float16)
    expected = from_original(original[0], subset="unet", overrides=OVERRIDES)["unet"].half()
    assert_same_tensors(dict(unet.state_dict()), dict(expected.state_dict()))


def test_an_adapter_added_while_converting_changes_nothing_yet(original, folder, tmp_path) -> None:
    report = convert_checkpoint(
        original[0], tmp_path / "adapted", add_adapter=True, overrides=OVERRIDES
    )
    assert report.has_adapter
    plain = DynamiCrafterUNet.from_pretrained(folder / "unet").eval()
    adapted = DynamiCrafterUNet.from_pretrained(tmp_path / "adapted" / "unet").eval()
    inputs = (torch.randn(1, 8, 2, 4, 4), 500, torch.randn(1, 77 + 16, 128), 24)
    with torch.no_grad():
        torch.testing.assert_close(adapted(*inputs).sample, plain(*inputs).sample)


def test_a_unet_alone_is_enough(tmp_path) -> None:
    save_file(official_weights("unet_tiny"), tmp_path / "unet.safetensors")
    report = inspect_checkpoint(tmp_path / "unet.safetensors")
    assert list(report.parameters) == ["unet"]
    assert isinstance(from_original(tmp_path / "unet.safetensors")["unet"], DynamiCrafterUNet)


def test_a_full_folder_is_not_overwritten(original, folder) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        convert_checkpoint(original[0], folder)


def test_an_earlier_conversion_is_replaced_when_asked_and_only_as_a_whole(
    original, folder, tmp_path, monkeypatch
) -> None:
    target = tmp_path / "converted"
    convert_checkpoint(original[0], target, overrides=OVERRIDES)
    (target / "left").touch()
    monkeypatch.setattr(checkpoint_folder, "_save_config", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_checkpoint(original[0], target, overwrite=True, overrides=OVERRIDES)
    assert (target / "left").exists()
    monkeypatch.undo()
    convert_checkpoint(original[0], target, overwrite=True, overrides=OVERRIDES)
    assert not (target / "left").exists() and (target / "model_index.json").is_file()
