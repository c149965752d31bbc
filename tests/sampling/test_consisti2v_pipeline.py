"""ConsistI2V's pipeline against official runs, and what the official pipeline gets wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from safetensors import safe_open

from motionmerge.errors import CheckpointError, ConfigError, ShapeError
from motionmerge.models import ConsistI2VUNet
from motionmerge.sampling import ConsistI2VPipeline, FrameInit
from motionmerge.sampling.request.folder import find_pipeline
from motionmerge.sampling.request.loading import load_pipeline
from motionmerge.sampling.videos.make_video import encode_ahead, make_video
from motionmerge.sampling.videos.phases import make_videos
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.switching.expert_bank import experts

from ..models.reference_weights import DATA, official_keys, official_weights, vectors
from ..tiny.consisti2v import consisti2v_scheduler, tiny_consisti2v
from ..tiny.dynamicrafter import tiny_pipeline

VECTORS = vectors("consisti2v")
with safe_open(DATA / "consisti2v.safetensors", "pt") as file:
    RUNS = json.loads(file.metadata()["runs"])
CLOSED = ("text_guidance", "both_guidances", "no_guidance_no_frameinit", "vanilla_batch2")


class ClosedForm(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is untyped here
    """The closed form of the official runs in place of a U-Net."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        cross_attention_dim: int = 48,
        block_out_channels: tuple[int, ...] = (1,),
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        stride: float,
        first: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor]:
        told = 0.3 * first + 0.25 * text.mean((1, 2))[:, None, None, None, None]
        return (torch.tanh(0.9 * sample) * (0.6 + timestep / 2000) + told,)


def official_vae() -> AutoencoderKL:
    keys = official_keys("consisti2v_vae")
    vae = AutoencoderKL(**keys["config"])
    vae.load_state_dict(official_weights("consisti2v_vae"))
    return vae.eval()


def run_of(name: str, unet: Any) -> tuple[ConsistI2VPipeline, dict[str, Any]]:
    """Return a pipeline with a denoiser, and the arguments of an official run."""
    run = RUNS[name]
    pipeline = ConsistI2VPipeline(
        unet.eval(), official_vae(), None, None, consisti2v_scheduler(), height=64, width=64
    )
    pipeline.set_progress_bar_config(disable=True)
    is_guided = run["g_txt"] > 1 or run["g_img"] > 1
    negative = {"negative_prompt_embeds": VECTORS[f"{name}.uncond"]} if is_guided else {}
    return pipeline, {
        "image": torch.zeros(run["batch"], 3, 64, 64),
        "image_latents": VECTORS[f"{name}.first_frame"],
        "prompt_embeds": VECTORS[f"{name}.text"],
        **negative,
        "latents": VECTORS[f"{name}.start"],
        "num_frames": 5,
        "num_inference_steps": run["steps"],
        "guidance_scale": run["g_txt"],
        "image_guidance_scale": run["g_img"],
        "guidance_rescale": run.get("rescale", 0.0),
        "eta": run["eta"],
        "frame_stride": run["stride"],
        "output_type": "latent",
    }


@pytest.mark.parametrize("name", CLOSED)
def test_an_official_run_is_reproduced(name: str) -> None:
    pipeline, arguments = run_of(name, ClosedForm())
    made, expected = pipeline(**arguments).frames, VECTORS[f"{name}.latents"]
    assert (made - expected).abs().max() < 5e-4 * expected.std()
    assert pipeline.scheduler.timesteps.tolist() == RUNS[name]["timesteps"]


def test_the_official_run_of_a_tiny_unet_is_reproduced_with_and_without_batching() -> None:
    unet = ConsistI2VUNet(**official_keys("consisti2v_unet")["config"])
    unet.load_state_dict(official_weights("consisti2v_unet"))
    pipeline, arguments = run_of("tiny_unet", unet)
    expected = VECTORS["tiny_unet.latents"]
    for batches in (None, True):
        pipeline.batches_guidance = batches
        made = pipeline(**arguments).frames
        assert (made - expected).abs().max() < 5e-4 * expected.std()


def test_rescale_and_fresh_noise_are_the_official_ones_in_the_first_step() -> None:
    pipeline, arguments = run_of("text_rescale_eta1", ClosedForm())
    step, noise = pipeline.scheduler.step, VECTORS["text_rescale_eta1.step_noise"][0]

    def with_noise(*given: Any, eta: float, generator: Any, return_dict: bool) -> Any:
        return step(*given, eta=eta, variance_noise=noise, return_dict=False)

    pipeline.scheduler.step = with_noise
    seen: list[torch.Tensor] = []

    def keep(_: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return tensors

    pipeline(**arguments, callback_on_step_end=keep)
    expected = VECTORS["text_rescale_eta1.x"][0]
    assert (seen[0] - expected).abs().max() < 5e-4 * expected.std()


@pytest.fixture(scope="module")
def tiny() -> ConsistI2VPipeline:
    return tiny_consisti2v()


@pytest.fixture
def photo() -> Image.Image:
    return Image.radial_gradient("L").resize((24, 20)).convert("RGB")


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def video_of(pipeline: ConsistI2VPipeline, image: Any, prompt: Any = "a cat", **own: Any) -> Any:
    settings = {"num_frames": 4, "num_inference_steps": 2, "output_type": "pt"}
    return pipeline(image, prompt, **{"generator": seeded(), **settings, **own}).frames


def test_a_video_begins_with_the_photo_that_the_autoencoder_keeps(
    tiny: ConsistI2VPipeline, photo: Image.Image
) -> None:
    video = video_of(tiny, photo)
    assert video.shape == (1, 4, 3, 16, 16)
    with torch.no_grad():
        conditions = tiny.encode(photo, num_frames=2, guided=False)
        kept = tiny.decode_latents(conditions.image_latents, conditions.pixels)
    torch.testing.assert_close(video[:, 0], kept[:, 0])


def test_everything_that_is_told_matters_and_the_defaults_are_the_papers(
    tiny: ConsistI2VPipeline, photo: Image.Image
) -> None:
    video = video_of(tiny, photo)
    defaults = {"guidance_scale": 7.5, "image_guidance_scale": 1.0, "frame_stride": 3, "eta": 0.0}
    assert torch.equal(video_of(tiny, photo, **defaults, guidance_rescale=0.0), video)
    for told in (
        {"prompt": "the camera pans left"},
        {"negative_prompt": "jumps up"},
        {"frame_stride": 5},
        {"image_guidance_scale": 2.0},
        {"image_guidance_scale": 2.0, "guidance_rescale": 0.7},
        {"guidance_scale": 1.0},
        {"start": None},
        {"start": FrameInit(timestep=500)},
        {"eta": 1.0},
    ):
        assert not torch.equal(video_of(tiny, photo, **told), video), told


def test_two_prompts_with_generators_of_their_own_and_two_videos_each_equal_single_ones(
    tiny: ConsistI2VPipeline, photo: Image.Image
) -> None:
    prompts = ["a cat", "up"]
    many = video_of(
        tiny,
        photo,
        prompts,
        num_videos_per_prompt=2,
        generator=[seeded(i) for i in range(4)],
        image_guidance_scale=1.5,
    )
    for i, prompt in enumerate(["a cat", "a cat", "up", "up"]):
        alone = video_of(tiny, photo, prompt, generator=seeded(i), image_guidance_scale=1.5)
        torch.testing.assert_close(many[i : i + 1], alone, atol=2e-3, rtol=0)


def test_a_photo_of_another_shape_has_no_black_bars(tiny: ConsistI2VPipeline) -> None:
    wide = Image.new("RGB", (20, 40), "white")
    pixels = tiny.encode(wide, height=16, width=32, num_frames=2, guided=False).pixels
    assert pixels.min() == 1


def test_a_video_of_settings_is_the_pipelines_own_also_when_encoded_ahead(
    photo: Image.Image,
) -> None:
    pipeline = tiny_consisti2v()
    told = {"frame_stride": 5.0, "image_guidance_scale": 2.0, "guidance_scale": 1.0}
    asked = VideoSettings(prompt="a cat", num_inference_steps=2, num_frames=4, **told)
    own = {"generator": seeded(0), "height": 16, "width": 16}
    expected = video_of(pipeline, photo, **own, **told)[0]
    assert torch.equal(make_video(pipeline, photo, asked), expected)
    (conditions,) = encode_ahead(pipeline, photo, [asked])
    assert pipeline.text_encoder is None
    assert torch.equal(make_video(pipeline, photo, asked, conditions=conditions), expected)


@pytest.mark.parametrize("image_guidance_scale", [None, 2.0])
def test_videos_with_experts_are_those_that_are_made_one_by_one(
    photo: Image.Image, image_guidance_scale: float | None
) -> None:
    pipeline = tiny_consisti2v()
    weights = {
        expert: {f"unet.{n}": v * share for n, v in pipeline.unet.state_dict().items()}
        for expert, share in (("dynamics", 0.9), ("consistency", 1.1))
    }
    asked = [
        VideoSettings(
            prompt="a cat",
            seed=seed,
            num_inference_steps=4,
            num_frames=3,
            image_guidance_scale=image_guidance_scale,
        )
        for seed in (1, 2)
    ]
    with experts(pipeline, weights, boundary=0.64) as bank:
        made = list(make_videos(pipeline, [(photo, one) for one in asked], bank))
        for outcome, one in zip(made, asked, strict=True):
            assert outcome.error is None and outcome.video is not None
            assert torch.equal(outcome.video, make_video(pipeline, photo, one))


def test_other_families_have_no_frame_stride(photo: Image.Image) -> None:
    for name in ("frame_stride", "image_guidance_scale"):
        asked = VideoSettings(prompt="a cat", **{name: 2.0})
        with pytest.raises(ConfigError, match=rf"dynamicrafter has no {name}(.|\n)*`{name}` out"):
            make_video(tiny_pipeline(), photo, asked)


def as_the_hub_has_it(folder: Path) -> ConsistI2VPipeline:
    """Write a pipeline's folder with the hub's names of classes; give the pipeline."""
    pipeline = tiny_consisti2v()
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "ConditionalAnimationPipeline"
    index["unet"] = ["consisti2v.models.videoldm_unet", "VideoLDMUNet3DConditionModel"]
    del index["height"], index["width"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "unet" / "config.json").read_text())
    config |= {"_class_name": "VideoLDMUNet3DConditionModel", "act_fn": "silu"}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    return pipeline


def test_a_folder_of_the_hub_is_read_by_our_classes(tmp_path: Path, photo: Image.Image) -> None:
    size = {"height": 16, "width": 16}
    expected = video_of(as_the_hub_has_it(tmp_path), photo, **size)
    found = find_pipeline(tmp_path)
    assert found.family.name == "consisti2v"
    assert (found.limits.height, found.limits.num_frames) == (256, 3)
    for loaded in (load_pipeline(found), ConsistI2VPipeline.from_pretrained(tmp_path)):
        assert isinstance(loaded.unet, ConsistI2VUNet)
        loaded.set_progress_bar_config(disable=True)
        torch.testing.assert_close(video_of(loaded, photo, **size), expected, atol=1e-3, rtol=0)


def test_code_in_a_folder_of_the_hub_is_not_run(tmp_path: Path) -> None:
    as_the_hub_has_it(tmp_path / "hub")
    shutil.copytree(tmp_path / "hub", tmp_path / "other")
    index = json.loads((tmp_path / "other" / "model_index.json").read_text())
    index["unet"][0] = "consisti2v.models.other_unet"
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "hub" / "unet" / "code.py").write_text("raise SystemExit")
    for folder in ("hub", "other"):
        with pytest.raises(CheckpointError, match="needs code of its own"):
            find_pipeline(tmp_path / folder)


def test_what_it_cannot_make_is_refused(tiny: ConsistI2VPipeline, photo: Image.Image) -> None:
    latents = torch.zeros(1, 4, 4, 8, 8)
    for wrong, words in (
        ({"num_frames": 1}, "after its first one"),
        ({"frame_stride": 0}, "frame_stride is 0"),
        ({"image_guidance_scale": float("nan")}, "image_guidance_scale is nan"),
        ({"latents": latents, "start": FrameInit()}, "Both latents and start"),
        ({"generator": [seeded(), seeded()]}, "2 generators for 1 videos"),
    ):
        with pytest.raises(ConfigError, match=words):
            video_of(tiny, photo, **wrong)
    with pytest.raises(ShapeError, match=r"expected \[pairs, 4, 1, 8, 8\]"):
        video_of(tiny, photo, image_latents=latents)
