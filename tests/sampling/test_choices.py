"""What is chosen decides the name of a video, and what does not go together is told at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from motionmerge.cli.video_flags import VideoFlags
from motionmerge.errors import ConfigError, MotionMergeError
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.request.experts import ExpertChoice, WeightedLora, from_loras
from motionmerge.sampling.request.folder import find_pipeline
from motionmerge.sampling.request.loading import check_device, empty_modules
from motionmerge.sampling.request.model import FolderModel
from motionmerge.sampling.request.request import VideoRequest
from motionmerge.sampling.videos.settings import VideoSettings

from ..tiny.folders import save_lora


def add_variant(folder: Path, shift: float, *, keep_plain: bool = True) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with open_weights(file) as reader:
        moved = {key: reader.read(key) + shift for key in reader.keys()}  # noqa: SIM118
    save_weights(file.with_name("diffusion_pytorch_model.ema.safetensors"), moved)
    if not keep_plain:
        file.unlink()


def fingerprint(folder: Path, variant: str | None) -> dict[str, object]:
    chosen = find_pipeline(folder, variant=variant)
    return FolderModel(folder=chosen, device=torch.device("cpu"), variant=variant).fingerprint()


def test_a_variant_is_hashed_with_its_own_files(own_wan: Path) -> None:
    before = fingerprint(own_wan, None)
    add_variant(own_wan, 0.1)
    first = fingerprint(own_wan, "ema")
    add_variant(own_wan, 0.2)
    assert fingerprint(own_wan, None) == before
    assert len({str(one) for one in (before, first, fingerprint(own_wan, "ema"))}) == 3


def test_a_variant_beside_plain_weights_is_not_extrapolated(
    own_wan: Path, stored_wan: Path
) -> None:
    flags = VideoFlags(model=str(own_wan), variant="ema", base=stored_wan, motion=0.5, device="cpu")
    add_variant(own_wan, 0.1)
    with pytest.raises(ConfigError, match=r"plain weights beside the variant ema"):
        flags.chosen_experts(flags.request.open_model())
    add_variant(own_wan, 0.1, keep_plain=False)
    assert flags.chosen_experts(flags.request.open_model()).recipe is not None


def test_settings_beside_a_lora_are_hashed(tmp_path: Path) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    save_lora(tmp_path / "adapter_model.safetensors", layer, "0")
    choice = from_loras([WeightedLora(tmp_path / "adapter_model.safetensors")])
    found = [choice.fingerprint()]
    for alpha in (2, 200):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha, "r": 2}))
        found.append(choice.fingerprint())
    assert len({str(one) for one in found}) == 3
    assert "lora_settings" not in found[0]


TWO = "inputs: {a: a.safetensors, b: b.safetensors}\nexperts: {one: a, two: b, three: a}\n"


@pytest.mark.parametrize(("boundary", "words"), [(None, "3 experts"), (0.5, "3 experts")])
def test_experts_without_a_schedule_are_refused_before_anything_is_loaded(
    boundary: float | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        ExpertChoice(Recipe.parse(TWO), boundary)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "xpu", "vulkan"])
def test_a_device_that_is_not_here_is_refused(device: str) -> None:
    check_device(torch.device("cpu"))
    with pytest.raises(ConfigError, match=rf"no device {device} here, but cpu"):
        check_device(torch.device(device))


@pytest.mark.parametrize(
    "flags",
    [
        {"lora": ["LONG"]},
        {"lora": ["~nobody-here/style.safetensors"]},
        {"recipe": "LONG"},
        {"motion": 0.5, "base": "LONG"},
        {"motion": 0.5, "base": "~nobody-here/base"},
        {"weights": "~nobody-here/merged.safetensors"},
    ],
    ids=str,
)
def test_a_name_that_no_file_can_have_is_an_error_with_a_fix(
    stored_wan: Path, flags: dict[str, object]
) -> None:
    long = {key: "x" * 300 if value == "LONG" else value for key, value in flags.items()}
    long = {key: ["x" * 300] if value == ["LONG"] else value for key, value in long.items()}
    if "base" in long:
        long["base"] = Path(str(long["base"]))
    asked = VideoFlags(model=str(stored_wan), device="cpu", **long)  # type: ignore[arg-type]
    with pytest.raises(MotionMergeError, match=r"(?s)xxx|nobody-here.*Fix: "):
        asked.chosen_experts(asked.request.open_model())


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"weights": "tuned", "motion": 1.0}, "`weights=` is one set .* `motion=` is for recipes"),
        ({"weights": "tuned", "recipe": "calm"}, "`recipe=` is for recipes"),
        ({"weights": "tuned", "loras": ["a"]}, "`loras=` is for recipes"),
        ({"weights": "tuned", "boundary": 0.5}, "`boundary=` needs experts"),
        ({"motion": float("nan")}, "`motion=` is nan"),
        ({"motion": 1.0, "parameters": {"motion": 2.0}}, "`motion` is given twice"),
        ({"loras": ["a"], "recipe": "calm"}, "`loras=` goes alone"),
        ({"loras": ["a"], "parameters": {"motion": 1.0}}, "there is no recipe"),
        ({"base": "b", "motion": 1.0}, "`base=` is not for the pocket model"),
        ({"model": "wan", "base": "b"}, "`base=` is for `motion=`"),
        ({"model": "wan", "base": "b", "recipe": "calm"}, "`base=` is not for recipes"),
        ({"model": "wan", "parameters": {"motion": 1.0}}, "there is no recipe"),
        ({"inputs": {"base": "b"}}, "`inputs=` replaces"),
        ({"device": "cpu"}, "`device=` is not for the pocket model"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_in_words_of_python_before_files_are_looked_for(
    asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        VideoRequest(**asked).open_model()
    assert caught.value.fix


def test_a_request_in_python_chooses_as_the_flags_do(stored_wan: Path, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    denoiser = empty_modules(find_pipeline(stored_wan))["transformer"]
    save_lora(lora, denoiser, "blocks.0.attn1.to_q")
    asked = VideoRequest(model=str(stored_wan), device="cpu", loras=[lora], motion=0.25)
    assert asked.weighted_loras() == [WeightedLora(lora, -0.25, 1.0)]
    flags = VideoFlags(model=str(stored_wan), device="cpu", lora=[str(lora)], motion=0.25)
    assert flags.request == replace(asked, loras=[str(lora)])
    chosen = asked.open_experts(asked.open_model())
    assert chosen == flags.chosen_experts(flags.request.open_model())


def test_every_setting_of_a_video_is_a_flag_of_the_same_name_in_python() -> None:
    given: dict[str, Any] = {
        "seed": 3,
        "negative_prompt": "blur",
        "height": 64,
        "width": 96,
        "num_frames": 8,
        "frame_rate": 8.0,
        "num_inference_steps": 5,
        "guidance_scale": 2.0,
        "guidance_scale_2": 1.0,
        "start_step": 900,
        "image_guidance_scale": 1.5,
        "frame_stride": 5.0,
        "shift": 3.0,
    }
    assert given.keys() | {"prompt", "sigmas"} == VideoSettings.model_fields.keys()
    flags = VideoFlags(**given, sigmas="1,0.5")
    assert flags.settings() == VideoSettings(**given, sigmas=(1.0, 0.5))
