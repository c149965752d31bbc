"""VideoCrafter1's image-to-video model as a configuration of DynamiCrafter's classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from motionmerge.models.dynamicrafter import (
    DynamiCrafterUNet,
    DynamicRescaleDDIMScheduler,
    ImageProjector,
    convert_checkpoint,
    convert_unet_state_dict,
    from_original,
    unet_config_from_official,
)
from motionmerge.models.dynamicrafter.checkpoint_folder import to_official
from motionmerge.models.dynamicrafter.conversion import OfficialCheckpoint
from motionmerge.models.dynamicrafter.lazy_tensors import LazyTensor
from motionmerge.models.dynamicrafter.official_config import (
    default_size,
    videocrafter_scheduler_config,
)

from .reference_weights import official_keys, official_weights, vectors

VECTORS = vectors("videocrafter")


def released_buffers() -> dict[str, torch.Tensor]:
    """The schedule of the released file, which is in fp16."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scale = torch.cat([torch.linspace(1, 0.7, 400), torch.full((1000,), 0.7)])
    return {"alphas_cumprod": torch.cumprod(1 - betas, 0).half(), "scale_arr": scale.half()}


def scheduler() -> DynamicRescaleDDIMScheduler:
    return DynamicRescaleDDIMScheduler(**videocrafter_scheduler_config(released_buffers()))


def closed_form(sample: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.9 * sample) * (0.6 + timestep / 2000) + 0.25 * tokens


def predicted(sample: torch.Tensor, timestep: torch.Tensor, guidance: float) -> torch.Tensor:
    given, none = (
        closed_form(sample, timestep, VECTORS[name]) for name in ("closed.c", "closed.uncond")
    )
    return none + guidance * (given - none)


def assert_close(made: torch.Tensor, expected: torch.Tensor) -> None:
    assert (made - expected).abs().max() < 5e-4 * expected.std()


def official_unet() -> DynamiCrafterUNet:
    unet = DynamiCrafterUNet(
        **unet_config_from_official(official_keys("videocrafter_unet")["config"])
    )
    unet.load_state_dict(convert_unet_state_dict(official_weights("videocrafter_unet")))
    return unet.eval()


def test_the_unet_without_image_latents_equals_the_official_one() -> None:
    names = ("x", "timesteps", "context", "fps", "out")
    *inputs, expected = (VECTORS[f"unet.{name}"] for name in names)
    with torch.no_grad():
        torch.testing.assert_close(official_unet()(*inputs).sample, expected, atol=2e-5, rtol=0)


def test_sixteen_image_tokens_for_all_frames_equal_the_official_ones() -> None:
    tensors = {
        f"image_proj_model.{name}": LazyTensor.of(value)
        for name, value in official_weights("videocrafter_projector").items()
    }
    own = {"image_projector": {"dim_head": 16, "heads": 3}}
    checkpoint = OfficialCheckpoint(tensors, overrides=own)
    config = checkpoint.configs["image_projector"]
    assert (config["num_queries"], config["num_frames"]) == (16, 1)
    projector = checkpoint.components["image_projector"].load(config)
    assert isinstance(projector, ImageProjector)
    for image in ("image0", "uncond"):
        with torch.no_grad():
            tokens = projector(VECTORS[f"{image}.states"])
        torch.testing.assert_close(tokens, VECTORS[f"{image}.tokens"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("run", "timesteps", "guidance"),
    [
        ("closed_n10_eta0", range(901, 0, -100), 12.0),
        ("closed_n10_eta1", range(901, 0, -100), 12.0),
        ("closed_n30_eta1", range(991, 0, -33), 7.5),  # the official code takes 31 steps then
        ("closed_n50_eta1", range(981, 0, -20), 12.0),
    ],
)
def test_the_sampler_equals_the_official_one_to_its_last_step_at_timestep_zero(
    run: str, timesteps: range, guidance: float
) -> None:
    steps = scheduler()
    steps.set_timesteps(len(timesteps))
    if len(timesteps) != 31:
        assert steps.timesteps.tolist() == list(timesteps)
    steps.timesteps = torch.tensor(timesteps)
    latents = VECTORS[f"{run}.x_T"]
    eta = float(run.endswith("eta1"))
    for number, timestep in enumerate(steps.timesteps):
        noise = VECTORS[f"{run}.noise"][number] if eta else None
        output = predicted(latents, timestep, guidance)
        made = steps.step(output, timestep, latents, eta=eta, variance_noise=noise)
        if f"{run}.x" in VECTORS:  # of runs of ten steps
            assert_close(made.prev_sample, VECTORS[f"{run}.x"][number])
            following = int(timesteps[number + 1]) if number + 1 < len(timesteps) else 0
            clean = made.pred_original_sample / steps.rescale_factors[following]
            assert_close(clean, VECTORS[f"{run}.pred_x0"][number])
        latents = made.prev_sample
    if f"{run}.final" in VECTORS:
        assert_close(latents, VECTORS[f"{run}.final"])


def test_the_last_step_to_zero_can_be_left_out() -> None:
    off = DynamicRescaleDDIMScheduler.from_config(scheduler().config, last_step_to_zero=False)
    assert not off.config.last_step_to_zero
    assert DynamicRescaleDDIMScheduler().config.last_step_to_zero is False


@pytest.mark.parametrize(("run", "guidance"), [("unet_n4_eta0", 3.0), ("unet_n5_eta1", 12.0)])
def test_the_unet_sampled_equals_the_official_one(run: str, guidance: float) -> None:
    unet = official_unet()
    steps = scheduler()
    eta = float(run.endswith("eta1"))
    steps.set_timesteps(5 if eta else 4)
    latents = VECTORS[f"{run}.x_T"]
    for number, timestep in enumerate(steps.timesteps):
        with torch.no_grad():
            given, none = (
                unet(latents, timestep, VECTORS[f"run.{name}"], VECTORS["unet.fps"][:1]).sample
                for name in ("context", "uncond_context")
            )
        noise = VECTORS[f"{run}.noise"][number] if eta else None
        output = none + guidance * (given - none)
        latents = steps.step(output, timestep, latents, eta=eta, variance_noise=noise).prev_sample
    assert_close(latents, VECTORS[f"{run}.final"])


@pytest.mark.parametrize("count", [1, 4, 7, 30, 50, 60, 501, 999, 1000])
def test_any_number_of_steps_is_exactly_that_many(count: int) -> None:
    steps = scheduler()
    steps.set_timesteps(count)
    timesteps = steps.timesteps.tolist()
    assert len(set(timesteps)) == count and timesteps == sorted(timesteps, reverse=True)
    assert timesteps[-1] >= 0 and timesteps[0] <= 999
    if 1000 % count == 0 and count < 1000:  # the official code makes more of the others
        assert timesteps[::-1] == [step + 1 for step in range(0, 1000, 1000 // count)]


def test_a_late_start_takes_the_steps_below_it() -> None:
    steps = scheduler()
    steps.set_timesteps(7, start_step=940)
    assert steps.timesteps.tolist() == [i * 940 // 7 + 1 for i in range(6, -1, -1)]
    steps.set_timesteps(940, start_step=940)
    assert steps.timesteps.tolist() == list(range(939, -1, -1))


def test_buffers_in_half_precision_tell_the_schedule_and_none_are_needed() -> None:
    steps = scheduler()
    assert steps.config.base_scale == 0.7
    assert steps.config.rescale_steps == 400
    assert steps.config.prediction_type == "epsilon"
    assert steps.alphas_cumprod[-1] == pytest.approx(0.00466, abs=1e-5)
    assert videocrafter_scheduler_config({}).items() <= dict(steps.config).items()


def test_every_key_of_the_released_file_has_its_place() -> None:
    other = official_keys("videocrafter_512")
    shapes = {**official_keys("checkpoint_512")["shapes"], **other["different_shapes"]}
    checkpoint = OfficialCheckpoint(
        {name: LazyTensor.of(torch.empty(shape, device="meta")) for name, shape in shapes.items()}
    )
    parts = checkpoint.components
    taken = sum(len(part.official) - len(part.unused) for part in parts.values())
    assert taken + len(checkpoint.unused) == 2520
    assert parts["unet"].num_parameters == other["params"]["model"]
    assert parts["image_projector"].num_parameters == other["params"]["image_proj_model"]
    assert checkpoint.pipeline == "VideoCrafterPipeline"
    assert default_size({"rescale_betas_zero_snr": False}, checkpoint.configs["unet"]) == (320, 512)


def test_convert_reads_the_file_and_its_half_precision_buffers(tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    tensors = {
        f"{prefix}{name}": value.half()
        for name, value in official_weights("videocrafter_unet").items()
    }
    official = {**tensors, **released_buffers()}
    torch.save(
        {"module": {f"_forward_module.{k}": v for k, v in official.items()}}, tmp_path / "a.ckpt"
    )
    report = convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "folder")
    assert report.pipeline == "VideoCrafterPipeline"
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == "VideoCrafterPipeline"
    assert (index["height"], index["width"]) == (320, 512)
    made = DynamicRescaleDDIMScheduler.from_pretrained(tmp_path / "folder" / "scheduler")
    assert made.config.last_step_to_zero and made.config.base_scale == 0.7
    assert from_original(tmp_path / "a.ckpt")["scheduler"].config.last_step_to_zero
    to_official(tmp_path / "folder", tmp_path / "back.ckpt")
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], value) for name, value in official.items())
