"""A training run from clips to a recipe, on tiny pipelines of diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextModel

import motionmerge
from motionmerge.errors import CheckpointError, MotionMergeError
from motionmerge.io.video import read_frames
from motionmerge.io.weights import open_weights
from motionmerge.models.dynamicrafter.encoders import text_encoder_config
from motionmerge.parameter_groups import group_of
from motionmerge.sampling.request.folder import find_pipeline
from motionmerge.sampling.request.loading import load_pipeline
from motionmerge.sampling.videos.make_video import family_and_limits, make_video
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.training.clip_run import ClipRun
from motionmerge.training.config_file import ConfigFile
from motionmerge.training.denoisers.encoding import encode_condition, settings_like
from motionmerge.training.held_out_videos import VideoFigures
from motionmerge.training.run_model import load_model
from motionmerge.training.run_plan import plan_run
from motionmerge.training.views import whole_frame_rate

from ..tiny.builders import WORDS, cogvideox, tokenizer
from ..tiny.clips import clip_run, losses_of, save_clips, weights_of
from ..tiny.folders import family_named, save_tiny
from ..tiny.hunyuan_text import hunyuan_1_5_with_text, hunyuan_with_text
from ..tiny.pipelines import photo, tiny
from ..tiny.processes import as_two

WAN_LORA = {
    "trains": ConfigFile.load("wan-lora").content["trains"],
    "lora": {"rank": 2},
    "objective": {"drop_caption": 0.3},
}

SVD_SIZE = {"data": {"sizes": [[32, 32]], "num_frames": 3}}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clips(tmp_path_factory.mktemp("data") / "clips")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    save_tiny("Wan 2.1", folder)
    return folder


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("svd")
    save_tiny("SVD", folder)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    text_tower().save_pretrained(folder / "text_encoder")
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def test_a_text_tower_without_weights_is_found_before_a_run(svd, tower, run_of, tmp_path):
    shutil.copytree(tower, tmp_path / "tower", ignore=lambda *_: ["model.safetensors"])
    with pytest.raises(CheckpointError, match="text_encoder holds no safetensors"):
        run_of(svd, adapter={"text_encoder": tmp_path / "tower"}, **SVD_SIZE)


def text_tower() -> CLIPTextModel:
    size = {"width": 8, "layers": 1, "heads": 2, "num_tokens": 16, "vocab_size": len(WORDS)}
    return CLIPTextModel(text_encoder_config(**size)).eval()


@pytest.fixture
def run_of(manifest: Path, tmp_path: Path):
    def make(model: Path, name: str = "run", **changes: Any) -> ClipRun:
        data = {"num_frames": 5, "frame_stride": [1, 1], "views": 1}
        return clip_run(
            model,
            manifest,
            tmp_path / name,
            data=data | changes.pop("data", {}),
            settings={"steps": 2, "save_every": 1, "shard": changes.pop("shard", False)},
            **changes,
        )

    return make


def video_of(pipeline: Any, frames: int, side: int = 16) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    size = {"num_frames": frames, "height": side, "width": side}
    told = {"prompt": "a cat jumps", "num_inference_steps": 2}
    settings = settings_like(*family_and_limits(pipeline), **size, **told)
    return make_video(pipeline, photo(side), settings)


def test_a_lora_of_wan_is_trained_with_and_without_kept_views_and_makes_videos(wan, run_of):
    kept, fresh = run_of(wan, **WAN_LORA), run_of(wan, "fresh", data={"cache": False}, **WAN_LORA)
    assert plan_run(kept).trained.keys() == {"joint", "cross_attention"}
    result, made = kept.train()
    assert losses_of(fresh)[-1] == result.loss
    mine, other = weights_of(made.weights), weights_of(fresh.config.output / "lora.safetensors")
    assert mine and all(torch.equal(value, other[name]) for name, value in mine.items())
    with open_weights(made.weights) as file:
        assert file.metadata["motionmerge.modules"] == "transformer"
    assert losses_of(kept) == []  # it was done already
    pipeline = load_pipeline(find_pipeline(made.model))
    plain = video_of(pipeline, 5)
    with motionmerge.experts(pipeline, made.recipe):
        assert not torch.equal(video_of(pipeline, 5), plain)


def test_an_adapter_on_svd_begins_as_nothing_and_ends_in_experts(svd, tower, run_of):
    run = run_of(
        svd,
        trains="adapter",
        adapter={"text_encoder": tower},
        **SVD_SIZE,
        objective={"time_noise": {"strength": 15}},
    )
    assert plan_run(run).trained.keys() == {"adapter", "temporal"}
    _, made = run.train()
    output = run.config.output
    base, tuned = weights_of(output / "base/unet"), weights_of(output / "tuned/unet")
    own = weights_of(svd / "unet")
    assert all(torch.equal(base[name], value) for name, value in own.items())
    assert {group_of(name) for name in base.keys() - own.keys()} == {"adapter"}
    changed = {group_of(name) for name, value in tuned.items() if not value.equal(base[name])}
    assert changed == {"adapter", "temporal"}
    assert made.model == str(output / "base")
    pipeline = load_pipeline(find_pipeline(made.model))
    plain = load_pipeline(find_pipeline(svd))
    plain.set_progress_bar_config(disable=True)
    settings = VideoSettings(num_frames=3, height=32, width=32, num_inference_steps=2)
    before = video_of(pipeline, 3, 32)
    assert torch.equal(before, make_video(plain, photo(32), settings))
    with motionmerge.experts(pipeline, made.recipe):
        assert not torch.equal(video_of(pipeline, 3, 32), before)


def test_an_adapter_on_i2vgen_xl_reads_the_models_own_text(run_of, tmp_path):
    pipeline = tiny(family_named("I2VGen-XL"))
    pipeline.register_modules(text_encoder=text_tower(), tokenizer=tokenizer())
    pipeline.save_pretrained(tmp_path / "model")
    run = run_of(
        tmp_path / "model",
        trains="adapter-only",
        lora={"rank": 2},
        data={"sizes": [[32, 32]], "num_frames": 2},
    )
    result, made = run.train()
    assert result.steps == 2 and made.model == str(run.config.output / "base")
    pipeline = load_pipeline(find_pipeline(made.model))
    assert "text_adapter" in pipeline.unet.config
    with motionmerge.experts(pipeline, made.recipe):
        pass


OTHERS = {
    "CogVideoX": {"trains": "all", "data": {"num_frames": 9, "sizes": [[16, 16]]}},
    "Hunyuan": {"trains": "joint", "data": {"num_frames": 9}},
    "Hunyuan 1.5": {"trains": "all", "lora": {"rank": 2}, "data": {"sizes": [[16, 16]]}},
    "LTX": {"trains": "*.attn1.*", "data": {"num_frames": 9, "sizes": [[32, 32]]}},
    "Wan 2.2-A14B": {"trains": "all"},
    "Wan 2.2-5B": {"trains": "*.ffn.*", "lora": {"rank": 2}, "data": {"sizes": [[32, 32]]}},
}


READING = {
    "CogVideoX": lambda: cogvideox(num_tokens=226),
    "Hunyuan": hunyuan_with_text,
    "Hunyuan 1.5": hunyuan_1_5_with_text,
}
"""Tiny pipelines that read prompts by themselves; elsewhere these are told tokens."""


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_of_any_family_shows_its_videos_and_ends_in_experts(name, run_of, tmp_path):
    if name in READING:
        READING[name]().save_pretrained(tmp_path / "model")
    else:
        save_tiny(name, tmp_path / "model")
    validation = {"every": 2, "clips": 1, "video_steps": 2}
    run = run_of(tmp_path / "model", **OTHERS[name], validation=validation)
    shown: list[list[float]] = []

    def measured(path: Path, photo: Path) -> VideoFigures:
        frames, _ = read_frames(path)
        dropped = run.folder.limits.dropped_frames
        assert len(frames) == run.config.data.num_frames - dropped and photo.is_file()
        shown.append(frames.astype(float).mean((1, 2, 3)).tolist())
        return VideoFigures(motion_degree=3.0)

    result, made = run.train(measure_video=measured)
    assert result.steps == 2 and len(shown) == 2 and shown[0] != shown[1]
    pipeline = load_pipeline(find_pipeline(made.model))
    size = run.config.data.num_frames, run.config.data.sizes[0][0]
    plain = video_of(pipeline, *size)
    with motionmerge.experts(pipeline, made.recipe):
        assert not torch.equal(video_of(pipeline, *size), plain)


def test_a_sharded_lora_is_that_of_one_process(wan, run_of):
    alone, both = run_of(wan, **WAN_LORA), run_of(wan, "both", **WAN_LORA, shard=True)
    alone.train()
    as_two(both.train)
    mine, theirs = (weights_of(run.config.output / "lora.safetensors") for run in (alone, both))
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=0)


def test_of_two_networks_one_alone_is_trained_where_it_denoises(run_of, tmp_path):
    save_tiny("Wan 2.2-A14B", tmp_path / "model")
    levels = {"above": 0.9}
    run = run_of(tmp_path / "model", trains="transformer.*", objective={"noise_range": levels})
    _, made = run.train()
    changed = {
        name: any(
            not value.equal(weights_of(tmp_path / "model" / name)[key])
            for key, value in weights_of(made.weights / name).items()
        )
        for name in ("transformer", "transformer_2")
    }
    assert changed == {"transformer": True, "transformer_2": False}


@pytest.mark.parametrize("name", ["svd", "wan"])
def test_a_sample_is_told_what_the_pipeline_tells_and_drops_what_its_guidance_drops(
    name, run_of, request
):
    changes = {"svd": SVD_SIZE | {"objective": {"drop": 0.3}}, "wan": WAN_LORA}[name]
    run = run_of(request.getfixturevalue(name), **changes | {"trains": "all", "lora": None})
    model = load_model(run.folder, run.config, dtype=torch.float32)
    draw = run.objective(model).draw
    dropped = set()
    for index in (0, 1, 10, 15):  # every way to drop something
        drawn, view = run.views.draw(index)
        (sample,) = draw([index])
        told = encode_condition(
            model.encoder.pipeline,
            model.denoiser,
            view.read(),
            "" if drawn.without_caption else view.shot.clip.caption,
            frame_rate=whole_frame_rate(view),
        )
        dropped.add((drawn.without_caption, drawn.without_image))
        kept = 0 if drawn.without_image else 1
        torch.testing.assert_close(sample.prompt_embeds, told.prompt_embeds)
        torch.testing.assert_close(sample.image_embeds, kept * told.image_embeds)
        if name == "svd":
            assert sample.frame_rate.tolist() == told.frame_rate.tolist() == [7]
        assert sample.shown.any() == bool(kept) and sample.shown.shape == told.latents.shape
    every = {(False, False), (True, False), (False, True), (True, True)}
    assert dropped == (every if name == "svd" else {(False, False), (True, False)})


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("svd", {}, r"svd without text, and the adapter reads text"),
        ("svd", {"adapter": {"text_encoder": "nowhere"}}, "no folder `text_encoder`"),
        ("svd", {"trains": "all", "objective": {"drop_caption": 0.1}}, "reads no captions"),
        ("svd", {"trains": "all", "data": {"sizes": [[20, 32]]}}, r"\[20, 32\], a size that"),
        ("svd", {"trains": "all", "objective": {"interpolates": True}}, "for DynamiCrafter"),
        ("wan", {"trains": "adapter"}, "no adapter can be added to a wan"),
        ("wan", {"trains": "all", "objective": {"drop": 0.1}}, "never drops the image"),
        ("wan", {"trains": "all", "objective": {"time_noise": {}}}, "shown a mask"),
        ("wan", {"trains": "all", "data": {"num_frames": 6}}, "6, a length that this wan"),
        ("wan", {"trains": "all", "data": {"condition_frames": 2}}, "begins with the image"),
        ("wan", {"trains": "all", "adapter": {"text_encoder": "x"}}, "nothing .* would read it"),
    ],
)
def test_what_a_family_cannot_is_refused_by_name(model, changes, message, run_of, request):
    size = SVD_SIZE if model == "svd" and "data" not in changes else {}
    with pytest.raises(MotionMergeError, match=message):
        run_of(request.getfixturevalue(model), **size | changes)
