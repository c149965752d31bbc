"""The DynamiCrafter pipeline on tiny random components of the real classes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image
from safetensors.torch import save_file

from motionmerge.errors import CheckpointError, ConfigError, DataError, ShapeError
from motionmerge.io.video import load_image
from motionmerge.models.dynamicrafter.image_projector import ImageProjector
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.sampling.pipelines.guidance import guided_prediction
from motionmerge.sampling.pipelines.start_latents import AnalyticInit, read_statistics
from motionmerge.switching.expert_bank import experts

from ..tiny.dynamicrafter import NUM_FRAMES, NUM_TOKENS, WIDTH, tiny_pipeline

Generate = Callable[..., torch.Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unet_inputs(pipeline: DynamiCrafterPipeline, run: Callable[[], object]) -> list[Any]:
    """Call `run`; give (sample, timestep, context) of every call of the U-Net."""
    calls: list[Any] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: calls.append(args))
    run()
    hook.remove()
    return calls


def test_the_video_has_the_shape_asked_for_and_every_output_type_agrees(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    video = generate(pipeline)
    assert video.shape == (1, NUM_FRAMES, 3, 16, 16)
    assert 0 <= video.min() < video.max() <= 1
    array = generate(pipeline, output_type="np")
    assert array.shape == (1, NUM_FRAMES, 16, 16, 3)
    np.testing.assert_array_equal(array, video.permute(0, 1, 3, 4, 2).numpy())
    images = generate(pipeline, output_type="pil")
    assert [len(frames) for frames in images] == [NUM_FRAMES]
    np.testing.assert_array_equal(np.asarray(images[0][0]), (array[0, 0] * 255).round())
    assert generate(pipeline, output_type="latent").shape == (1, 4, NUM_FRAMES, 8, 8)


def test_parts_of_different_models_are_refused(pipeline: DynamiCrafterPipeline) -> None:
    parts = dict(pipeline.components)
    own = parts["image_projector"].config
    wrong = ImageProjector(**{**own, "embed_dims": own.embed_dims * 2})
    with pytest.raises(ShapeError, match=r"image_encoder's `hidden_size` is \d+, the image_proj"):
        DynamiCrafterPipeline(**{**parts, "image_projector": wrong})
    assert DynamiCrafterPipeline(**{**parts, "image_projector": None}).unet is pipeline.unet


def test_same_seed_same_video(pipeline: DynamiCrafterPipeline, generate: Generate) -> None:
    video = generate(pipeline)
    assert torch.equal(generate(pipeline), video)
    assert torch.equal(generate(tiny_pipeline()), video)
    assert not torch.equal(generate(pipeline, generator=seeded(8)), video)


def test_prompt_negative_prompt_frame_rate_and_image_all_matter(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    video = generate(pipeline)
    for options in (
        {"prompt": "the camera pans left"},
        {"negative_prompt": "jumps up"},
        {"frame_rate": 3},
        {"image": Image.new("RGB", (16, 16), "red")},
        {"guidance_scale": 3.0},
        {"guidance_rescale": 0.0},
        {"eta": 0.0},
        {"start_step": 900},
    ):
        assert not torch.allclose(generate(pipeline, **options), video, atol=1e-3), options


def test_the_prompt_reaches_both_experts(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    prompt = "the camera pans left"
    expected = pipeline.encode_prompt([prompt])[0]
    weights = {
        name: {f"unet.{key}": value for key, value in tiny_pipeline(seed).unet.state_dict().items()}
        for name, seed in (("dynamics", 1), ("consistency", 2))
    }
    with experts(pipeline, weights, boundary=0.64) as bank:
        calls = unet_inputs(pipeline, lambda: generate(pipeline, prompt))
        used = [bank.expert_for(timestep) for _, timestep, _ in calls]
    assert set(used) == {"dynamics", "consistency"}
    assert len(calls) == 2 * 4
    for place, (_, _, context) in enumerate(calls):  # without and with the conditions in turn
        assert torch.equal(context[0, :NUM_TOKENS], expected) == bool(place % 2)


def test_guidance_is_one_batched_forward_a_step_or_two_and_none_is_one_of_them(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    videos = {}
    for batches, sizes in ((None, [1] * 8), (False, [1] * 8), (True, [2] * 4)):
        pipeline.batches_guidance = batches
        guided = unet_inputs(
            pipeline, lambda batches=batches: videos.update({batches: generate(pipeline)})
        )
        plain = unet_inputs(pipeline, lambda: generate(pipeline, guidance_scale=1.0))
        assert [len(sample) for sample, _, _ in guided] == sizes
        assert [len(sample) for sample, _, _ in plain] == [1] * 4
    assert torch.equal(videos[None], videos[False])
    assert torch.allclose(videos[True], videos[False], atol=1e-4)


def test_the_unconditional_half_has_the_same_latents_but_the_grey_image_and_no_prompt(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    pipeline.batches_guidance = True
    sample, _, context = unet_inputs(pipeline, lambda: generate(pipeline))[0]
    assert torch.equal(sample[0], sample[1])
    empty = pipeline.encode_prompt([""])[0]
    grey = pipeline.encode_image_tokens(torch.zeros(1, 3, 16, 16), NUM_FRAMES)[0]
    assert torch.equal(context[0], torch.cat([empty, grey]))
    assert not torch.equal(context[1, NUM_TOKENS:], grey)


def test_an_image_is_encoded_once_and_shown_to_every_frame(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    batches: list[int] = []
    hook = pipeline.vae.encoder.register_forward_pre_hook(
        lambda _, args: batches.append(len(args[0]))
    )
    sample, _, _ = unet_inputs(pipeline, lambda: generate(pipeline))[0]
    hook.remove()
    assert batches == [1]
    image_latents = sample[:, 4:]
    assert torch.equal(image_latents, image_latents[:, :, :1].expand_as(image_latents))


def test_a_last_image_conditions_the_last_frame_and_leaves_those_between_free(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    rng = np.random.default_rng(1)
    first, last = (Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(2))

    def condition(image: Image.Image, **options: Any) -> torch.Tensor:
        calls = unet_inputs(pipeline, lambda: generate(pipeline, image=image, **options))
        return calls[0][0][:1, 4:]

    between = condition(first, last_image=last)
    torch.testing.assert_close(between[:, :, 0], condition(first)[:, :, 0])
    torch.testing.assert_close(between[:, :, -1], condition(last)[:, :, 0])
    assert not between[:, :, 1:-1].any()
    with pytest.raises(ConfigError, match="at least 2"):
        generate(pipeline, image=first, last_image=last, num_frames=1)


def test_a_batch_equals_single_videos(
    pipeline: DynamiCrafterPipeline, generate: Generate, photo: Image.Image
) -> None:
    images = [photo, photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(30)]
    prompts = ["a cat jumps", "the camera pans left"]
    batch = generate(pipeline, prompts, image=images, generator=[seeded(1), seeded(2)])
    singles = [
        generate(pipeline, prompt, image=image, generator=seeded(seed))
        for prompt, image, seed in zip(prompts, images, (1, 2), strict=True)
    ]
    torch.testing.assert_close(batch, torch.cat(singles), atol=2e-3, rtol=0)


def test_one_image_goes_with_several_prompts_and_one_prompt_with_several_images(
    pipeline: DynamiCrafterPipeline, generate: Generate, photo: Image.Image
) -> None:
    many = generate(
        pipeline, ["a cat", "up"], num_videos_per_prompt=2, generator=[seeded(i) for i in range(4)]
    )
    assert many.shape[0] == 4
    second_of_first = generate(pipeline, "a cat", generator=seeded(1))
    torch.testing.assert_close(many[1:2], second_of_first, atol=2e-3, rtol=0)
    assert generate(pipeline, "a cat", image=[photo] * 3).shape[0] == 3
    assert generate(pipeline, None, guidance_scale=1.0).shape[0] == 1


def test_a_tensor_image_equals_the_image(
    pipeline: DynamiCrafterPipeline, generate: Generate, photo: Image.Image
) -> None:
    small = photo.resize((16, 16))
    tensor = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(
        generate(pipeline, image=tensor), generate(pipeline, image=small), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "LA", "RGBA", "CMYK", "turned"])
def test_an_image_of_any_mode_is_the_one_that_a_file_gives(
    pipeline: DynamiCrafterPipeline, generate: Generate, tmp_path: Path, mode: str
) -> None:
    rows = np.linspace(0, 1, 64)[:, None].repeat(64, axis=1)
    image = Image.fromarray((rows * 255).astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray((rows * 65535).astype(np.uint16))
    elif mode == "turned":
        image.getexif()[0x0112] = 6
    else:
        image = image.convert("RGB").convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray((rows.T * 255).astype(np.uint8)))
    path = tmp_path / "photo.tiff"
    image.save(path, exif=image.getexif())
    own = {"num_inference_steps": 1, "last_image": image}
    video = generate(pipeline, image=[image], **own)
    read = load_image(path)
    assert torch.equal(video, generate(pipeline, image=read, **{**own, "last_image": read}))
    with Image.open(path) as opened:
        assert torch.equal(video, generate(pipeline, image=opened, **own))
    if mode == "turned":
        assert not torch.equal(video, generate(pipeline, image=image.convert("RGB").copy(), **own))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "list of images is empty"),
        ("photo.jpg", "no image at photo.jpg"),
        (7, "The image is a int"),
        (np.zeros((16, 16)), r"array has shape \[16, 16\]"),
        (np.zeros((16, 16, 3), dtype=int), "dtype int64"),
        (np.full((16, 16, 3), 128.0), "values from 128 to 128"),
        ([torch.zeros(3, 16, 16), Image.new("RGB", (16, 16))], "of several kinds"),
        (Image.new("F", (16, 16)), "mode F"),
        (torch.full((3, 16, 16), 128, dtype=torch.uint8), r"uint8.*\n.*image / 255"),
        (torch.full((3, 16, 16), 128.0), r"values from 128 to 128.*\n.*image / 255"),
        (torch.full((3, 16, 16), -1.0), r"values from -1 to -1.*\n.*\(image \+ 1\) / 2"),
        (torch.full((3, 16, 16), torch.nan), "values from nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_in_0_to_1_is_refused(
    pipeline: DynamiCrafterPipeline, generate: Generate, image: Any, message: str
) -> None:
    with pytest.raises((DataError, ShapeError), match=message) as caught:
        generate(pipeline, image=image)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("frame_rate", float("nan")),
        ("frame_rate", 0),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("guidance_scale", None),
        ("start_step", 900.5),
        ("start_step", 0),
        ("num_inference_steps", 2.5),
        ("num_videos_per_prompt", 1.5),
        ("num_frames", 2.5),
        ("num_frames", 0),
    ],
)
def test_a_setting_that_is_no_such_number_is_named(
    pipeline: DynamiCrafterPipeline, generate: Generate, setting: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=f"`?{setting}`? is {value}") as caught:
        generate(pipeline, **{setting: value})
    assert caught.value.fix


@pytest.mark.parametrize("size", [{"height": 0}, {"width": 0}, {"height": -16}, {"width": 16.5}])
def test_a_size_of_no_pixels_is_not_the_default_size(
    pipeline: DynamiCrafterPipeline, generate: Generate, size: dict[str, Any]
) -> None:
    with pytest.raises(ShapeError, match="both must divide by"):
        generate(pipeline, **size)


def test_given_embeddings_equal_what_they_were_made_from(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    pixels = torch.rand(1, 3, 16, 16, generator=seeded(0))
    with torch.no_grad():
        embeds = {
            "prompt_embeds": pipeline.encode_prompt(["a cat"]),
            "negative_prompt_embeds": pipeline.encode_prompt(["up"]),
            "image_embeds": pipeline.encode_image_tokens(pixels * 2 - 1, NUM_FRAMES),
            "latents": torch.randn(1, 4, NUM_FRAMES, 8, 8, generator=seeded(7)),
        }
    given = generate(pipeline, None, image=pixels, eta=0.0, **embeds)
    made = generate(pipeline, "a cat", image=pixels, eta=0.0, negative_prompt="up")
    assert torch.equal(given, made)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_conditions_make_the_same_videos_without_the_encoders(
    pipeline: DynamiCrafterPipeline, generate: Generate, photo: Image.Image, scale: float
) -> None:
    prompts, common = ["a cat jumps", "up"], {"guidance_scale": scale, "num_videos_per_prompt": 2}
    generators = [seeded(seed) for seed in range(4)]
    expected = generate(pipeline, prompts, negative_prompt="left", generator=generators, **common)
    encoder = weakref.ref(pipeline.image_encoder)
    conditions = pipeline.encode(photo, prompts, negative_prompt="left", num_frames=NUM_FRAMES)
    pipeline.free_encoders()
    assert encoder() is None
    own = {"image": None, "num_frames": None, "conditions": conditions, **common}
    video = generate(pipeline, None, generator=[seeded(seed) for seed in range(4)], **own)
    assert torch.equal(video, expected)


def test_conditions_suit_every_expert_and_its_own_projector(
    pipeline: DynamiCrafterPipeline, generate: Generate, photo: Image.Image
) -> None:
    weights = {
        name: {
            f"{module}.{key}": value
            for module in ("unet", "image_projector")
            for key, value in getattr(tiny_pipeline(seed), module).state_dict().items()
        }
        for name, seed in (("dynamics", 1), ("consistency", 2))
    }
    conditions = pipeline.encode(photo, "a cat", num_frames=NUM_FRAMES)
    own = {"image": None, "num_frames": None, "conditions": conditions}
    with experts(pipeline, weights, boundary=0.64):
        expected = generate(pipeline)
        pipeline.free_encoders()
        assert torch.equal(generate(pipeline, None, **own), expected)


def test_without_a_gpu_capturing_steps_changes_nothing(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    video = generate(pipeline)
    pipeline.capture_steps()
    assert torch.equal(generate(pipeline), video)


def test_a_pipeline_without_encoders_says_what_it_takes(
    pipeline: DynamiCrafterPipeline, generate: Generate, photo: Image.Image
) -> None:
    conditions = pipeline.encode(photo, "a cat", num_frames=NUM_FRAMES, guided=False)
    with pytest.raises(ConfigError, match=r"image, num_frames and conditions.*\n.*Leave out"):
        generate(pipeline, None, conditions=conditions)
    own = {"image": None, "num_frames": None}
    with pytest.raises(ConfigError, match="guided=True"):
        generate(pipeline, None, conditions=conditions, **own)
    with pytest.raises(ConfigError, match="no image to animate"):
        generate(pipeline, "a cat", **own)
    pipeline.free_encoders()
    with pytest.raises(ConfigError, match=r"no text_encoder any more.*\n.*prompt_embeds"):
        generate(pipeline, "a cat")
    embeds = torch.zeros(1, NUM_TOKENS, WIDTH)
    with pytest.raises(ConfigError, match="no image_encoder any more"):
        generate(pipeline, None, prompt_embeds=embeds, negative_prompt_embeds=embeds)


def test_any_number_of_steps_is_finite(pipeline: DynamiCrafterPipeline, generate: Generate) -> None:
    options = {"guidance_scale": 1.0, "output_type": "latent"}  # one forward a step
    for num_steps in (1, 7, 11, 14, 15, 20, 25, 33):
        latents = generate(pipeline, num_inference_steps=num_steps, **options)
        assert latents.isfinite().all(), num_steps


def test_an_analytic_start_begins_late(pipeline: DynamiCrafterPipeline, generate: Generate) -> None:
    noise = torch.randn(1, 4, NUM_FRAMES, 8, 8, generator=seeded(0))
    start = pipeline.scheduler.analytic_init(
        torch.zeros(1), variance=0.5, noise=noise, start_step=940
    )
    calls = unet_inputs(pipeline, lambda: generate(pipeline, latents=start, start_step=940))
    assert [int(timestep) for _, timestep, _ in calls[::2]] == [939, 704, 469, 234]
    assert torch.equal(calls[0][0][:1, :4], start)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_an_analytic_start_is_read_from_the_official_file(
    pipeline: DynamiCrafterPipeline, generate: Generate, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"initial_noise.{ending}"
    mean = torch.rand(1, 4, NUM_FRAMES, 8, 8, generator=seeded(1))
    stored = {"Expectation_X0": mean, "Tr_Cov_d": torch.tensor(0.5)}
    torch.save(stored, path) if ending == "pt" else save_file(stored, path)
    noise = torch.randn(1, 4, NUM_FRAMES, 8, 8, generator=seeded(7))
    start = pipeline.scheduler.analytic_init(mean, variance=0.5, noise=noise, start_step=940)
    own = {"start_step": 940, "eta": 0.0}
    expected = generate(pipeline, latents=start, **own)
    video = generate(pipeline, analytic_init=read_statistics(path), **own)
    assert torch.equal(video, expected)
    assert not torch.equal(video, generate(pipeline, **own))


def test_statistics_that_do_not_fit_are_refused(
    pipeline: DynamiCrafterPipeline, generate: Generate, tmp_path: Path
) -> None:
    wide = AnalyticInit(torch.zeros(1, 4, NUM_FRAMES, 8, 16), 0.5)
    with pytest.raises(ShapeError, match=r"shape \[1, 4, 3, 8, 16\]; expected \[1, 4, 3, 8, 8\]"):
        generate(pipeline, analytic_init=wide, start_step=940)
    fitting = AnalyticInit(torch.zeros(4, 1, 1, 1), 0.5)
    with pytest.raises(ConfigError, match="Both latents and start"):
        generate(pipeline, analytic_init=fitting, latents=torch.zeros(1, 4, NUM_FRAMES, 8, 8))
    pipeline.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ConfigError, match="EulerDiscreteScheduler has no Analytic-Init"):
        generate(pipeline, analytic_init=fitting)
    for mean, variance, message in (
        (torch.zeros(1), torch.tensor(-1.0), "variance -1"),
        (torch.zeros(1), torch.zeros(2), "one variance"),
        (torch.full((1,), torch.nan), torch.zeros(1), "finite"),
    ):
        save_file({"Expectation_X0": mean, "Tr_Cov_d": variance}, tmp_path / "x.safetensors")
        with pytest.raises(ShapeError, match=message):
            read_statistics(tmp_path / "x.safetensors")
    save_file({"Expectation_X0": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no tensor `Tr_Cov_d`"):
        read_statistics(tmp_path / "x.safetensors")


def test_a_callback_sees_and_replaces_latents(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    seen: list[tuple[int, int]] = []

    def erase(owner: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert owner is pipeline
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = generate(pipeline, callback_on_step_end=erase, output_type="latent")
    assert seen == [(0, 999), (1, 749), (2, 499), (3, 249)]
    assert not latents.any()


def test_other_schedulers_of_diffusers_work(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    config = pipeline.scheduler.config
    pipeline.scheduler = DPMSolverMultistepScheduler(
        prediction_type="v_prediction", final_sigmas_type="sigma_min"
    )
    assert generate(pipeline).isfinite().all()
    pipeline.scheduler = DDIMScheduler.from_config(config)
    assert generate(pipeline).isfinite().all()
    with pytest.raises(ConfigError, match="cannot start late"):
        generate(pipeline, start_step=900)


def test_a_saved_pipeline_loads_and_makes_the_same_video(
    pipeline: DynamiCrafterPipeline, generate: Generate, tmp_path: Path
) -> None:
    pipeline.scheduler = DynamicRescaleDDIMScheduler(base_scale=0.5)
    video = generate(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = DynamiCrafterPipeline.from_pretrained(tmp_path)
    assert loaded.config.width == 16
    assert torch.equal(generate(loaded), video)


def test_a_half_precision_pipeline_runs(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    exact = generate(pipeline, guidance_scale=1.0, eta=0.0)
    half = generate(pipeline.to(torch.bfloat16), guidance_scale=1.0, eta=0.0)
    torch.testing.assert_close(half, exact, atol=0.1, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 2, 17, 32])
def test_a_projector_with_tokens_for_all_frames_makes_one_to_thirty_two(
    pipeline: DynamiCrafterPipeline, generate: Generate, num_frames: int
) -> None:
    own = dict(pipeline.image_projector.config)
    pipeline.image_projector = ImageProjector(**{**own, "num_frames": 1}).eval()
    video = generate(pipeline, num_frames=num_frames, num_inference_steps=2)
    assert video.shape == (1, num_frames, 3, 16, 16) and video.isfinite().all()


def test_a_prompt_longer_than_the_tokenizer_knows_is_cut_to_its_beginning(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    words = ["a", "cat", "jumps", "up"] * 30
    cut = generate(pipeline, " ".join(words[:NUM_TOKENS]), num_inference_steps=1)
    assert torch.equal(generate(pipeline, " ".join(words), num_inference_steps=1), cut)


def test_guidance_rescale_keeps_the_deviation_of_the_conditional_prediction() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 2, 4, 4).unbind(0)
    full = guided_prediction(conditional, unconditional, guidance_scale=7.5, guidance_rescale=1.0)
    deviations = [value.flatten(1).std(1) for value in (full, conditional)]
    torch.testing.assert_close(*deviations)
    none = guided_prediction(conditional, unconditional, guidance_scale=7.5, guidance_rescale=0.0)
    torch.testing.assert_close(none, unconditional + 7.5 * (conditional - unconditional))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"height": 18}, "divide by 4"),
        ({"width": -16}, "divide by 4"),
        ({"image": torch.zeros(1, 3, 16, 16), "height": 32}, r"expected \[batch, 3, 32, 16\]"),
        ({"image": torch.zeros(1, 4, 16, 16)}, r"expected \[batch, 3, 16, 16\]"),
        ({"image": torch.zeros(3, 3, 16, 16), "prompt": ["a", "cat"]}, "3 of the others"),
        ({"negative_prompt": ["a", "cat"]}, "2 of negative prompts"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 5, WIDTH)},
            "6, 16",
        ),
        ({"num_frames": 4}, "num_frames=3"),
        ({"latents": torch.zeros(1, 4, 3, 4, 4)}, "Latents have shape"),
        ({"image_embeds": torch.zeros(2, 6, WIDTH)}, "2 of image_embeds"),
        ({"image_embeds": torch.zeros(1, 5, WIDTH)}, "6, 16"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    pipeline: DynamiCrafterPipeline, generate: Generate, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        generate(pipeline, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 0},
        {"num_frames": 33},
        {"num_inference_steps": 0},
        {"num_videos_per_prompt": 0},
        {"guidance_rescale": 1.5},
        {"eta": -0.1},
        {"output_type": "gif"},
        {"start_step": 1001},
        {"generator": [torch.Generator(), torch.Generator()]},
        {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
        {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)},
        {"prompt_embeds": torch.zeros(1, NUM_TOKENS, WIDTH)},
    ],
)
def test_settings_out_of_range_are_refused(
    pipeline: DynamiCrafterPipeline, generate: Generate, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="Fix:"):
        generate(pipeline, **options)
