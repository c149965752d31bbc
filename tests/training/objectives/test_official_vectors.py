"""Inputs, losses and gradients of the official training codes, on small random models.

DynamiCrafter: `lvdm`, and CIL's and EDG's copies of it after the least repair; SVD: CIL's losses.
All draws are scripted, dropout is off. See tests/models/reference_weights.py for the weights.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from motionmerge.models.dynamicrafter import (
    DynamiCrafterUNet,
    DynamicRescaleDDIMScheduler,
    convert_unet_state_dict,
    unconvert_unet_state_dict,
    unet_config_from_official,
)
from motionmerge.models.dynamicrafter.conversion import OfficialCheckpoint
from motionmerge.models.dynamicrafter.lazy_tensors import LazyTensor
from motionmerge.training.clip_batches import ClipBatch, ConditionDraws, ConditionNoise
from motionmerge.training.clip_objective import ClipObjective
from motionmerge.training.denoisers.condition import DenoiserCondition
from motionmerge.training.denoisers.dynamicrafter import DynamiCrafterDenoiser
from motionmerge.training.objectives.edm import ContinuousSigmas
from motionmerge.training.objectives.noised import denoising_losses
from motionmerge.training.objectives.time_noise import TimeNoise
from motionmerge.training.objectives.vp import VariancePreserving
from motionmerge.training.samples import dropped

from ...models.reference_weights import fill

DATA = Path(__file__).parents[2] / "data" / "training"
SCALE = 0.18215


@cache
def meta(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))


@cache
def stored(name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(DATA / f"{name}.safetensors")
    return tensors | {twin: tensors[one] for twin, one in meta(name).get("same", {}).items()}


class Case(NamedTuple):
    objective: ClipObjective
    prepared: tuple[Any, ...]
    condition: DenoiserCondition
    seen: torch.Tensor


def text_stand_in(caption: str, *, seed: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{caption}".encode()))
    return torch.empty(77, width).normal_(generator=generator)


def case_of(name: str) -> Case:
    """Make a case's batch from its video, captions and draws, by the code under test."""
    case, data = meta("dynamicrafter")["cases"][name], stored("dynamicrafter")
    config, file = case["config"], case["file"]

    def own(leaf: str) -> torch.Tensor:
        return data[f"{name}/{leaf}"]

    batch = len(own("timesteps"))
    mean, std = own("moments").chunk(2, 1)
    latents = SCALE * (mean + std * own("draw/posterior"))
    latents = latents.unflatten(0, (batch, -1)).transpose(1, 2)
    frame = torch.full((batch,), case["random_condition_frame"])
    without_text, without_image = dropped(own("draw/dropout"), share=config["uncond_prob"])
    video = data[f"{file}/video"]
    image = video[torch.arange(batch), :, frame] * ~without_image[:, None, None, None]
    pooled = F.adaptive_avg_pool2d(image, 4).flatten(2).transpose(1, 2)
    weights = meta("dynamicrafter")["shapes"][case["weights"]]
    captions = [
        "" if gone else caption
        for gone, caption in zip(without_text, case["captions"], strict=True)
    ]
    text = [
        text_stand_in(
            caption,
            seed=case["seeds"]["text_stand_in"],
            width=weights["unet_config"]["context_dim"],
        )
        for caption in captions
    ]
    # The official loader hands fps on divided by the stride.
    rate = {"fs": case["frame_stride"], "fps": case["fps"]}[config["fps_condition_type"]]
    objective = ClipObjective(
        no_draw,
        VariancePreserving(scheduler_of(config)),
        layout="first and last" if config.get("interp_mode") else "every frame",
        condition_noise=condition_noise_of(config),
    )
    drawn = ClipBatch(
        latents=latents,
        noise=own("draw/noise"),
        times=own("timesteps"),
        condition_frame=frame,
        prompt_embeds=torch.stack(text),
        image_embeds=pooled @ data[f"{file}/image_stand_in/W"] + data[f"{file}/image_stand_in/P"],
        frame_rate=torch.tensor(rate).long(),
        condition=condition_draws_of(name) if config.get("beta_m") else None,
    )
    prepared = objective.prepare((drawn,))
    noised, condition = prepared[0]
    return Case(objective, prepared, condition, torch.cat([noised.sample, condition.latents], 1))


def no_draw(indices: Sequence[int]) -> None:
    raise AssertionError("The draws are those of the official code.")


def condition_noise_of(config: dict[str, Any]) -> ConditionNoise | None:
    if not config.get("beta_m"):
        return None
    kind = "noised" if config.get("clip_type") == 1 else "replaced"
    return ConditionNoise(strength=config["beta_m"], power=config["a"], tokens=kind)


def condition_draws_of(name: str) -> ConditionDraws:
    case, data = meta("dynamicrafter")["cases"][name], stored("dynamicrafter")
    # Tokens are noised first, where they are.
    *of_tokens, of_latents = (
        data[f"{name}/draw/beta_s_normal.{i}"]
        for i in range(1 + (case["config"].get("clip_type") == 1))
    )
    coin = case["token_replacement_draw"]
    return ConditionDraws(
        normal=of_latents,
        noise=data[f"{name}/draw/concat_noise"],
        token_normal=of_tokens[0] if of_tokens else torch.zeros_like(of_latents),
        token_noise=data.get(f"{name}/draw/token_noise", torch.zeros(1, 1, 1)),
        on_tokens=torch.full_like(of_latents, float((coin or 0) < ConditionNoise().token_share)),
    )


def scheduler_of(config: dict[str, Any]) -> DynamicRescaleDDIMScheduler:
    predictions = {"v": "v_prediction", "eps": "epsilon"}
    return DynamicRescaleDDIMScheduler(
        prediction_type=predictions[config["parameterization"]],
        rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
        base_scale=config.get("base_scale"),
    )


@cache
def denoiser_of(weights: str, *, is_identity: bool = False) -> DynamiCrafterDenoiser:
    group = meta("dynamicrafter")["shapes"][weights]
    seeds = meta("dynamicrafter")["cases"]["adapter"]["seeds"]
    tensors = fill(group["shapes"]["unet"], seed=seeds["unet"])
    unet = DynamiCrafterUNet(**unet_config_from_official({**group["unet_config"], "dropout": 0.0}))
    if "adapter" in group["shapes"]:
        unet.add_temporal_adapter(num_frames=group["unet_config"]["temporal_length"])
        tensors |= fill(group["shapes"]["adapter"], seed=seeds["adapter"])
        for key, value in tensors.items():
            if is_identity and "cc_projection" in key:
                value.zero_()
                if value.ndim > 1:
                    value.fill_diagonal_(1.0)
    unet.load_state_dict(convert_unet_state_dict(tensors))
    shapes, sizes = group["shapes"]["image_projector"], group["image_projector_config"]
    projector = OfficialCheckpoint(
        {
            f"image_proj_model.{key}": LazyTensor.of(value)
            for key, value in fill(shapes, seed=seeds["image_projector"]).items()
        },
        overrides={"image_projector": {k: sizes[k] for k in ("dim_head", "heads")}},
    )
    built = projector.components["image_projector"].load(projector.configs["image_projector"])
    return DynamiCrafterDenoiser(unet, built).train()


def loss_of(case: Case, denoiser: nn.Module) -> torch.Tensor:
    return case.objective.loss(denoiser, *case.prepared)


def official_norms(denoiser: DynamiCrafterDenoiser) -> dict[str, float]:
    """Norms of the U-Net's gradients under official names."""
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in denoiser.unet.named_parameters()
    }
    named = unconvert_unet_state_dict(gradients)
    return {name: float(value.norm()) for name, value in named.items()}


EVERY_CASE = list(meta("dynamicrafter")["cases"])


@pytest.mark.parametrize("name", EVERY_CASE)
def test_the_denoiser_sees_what_the_official_code_shows_it(name: str) -> None:
    expected = stored("dynamicrafter")[f"{name}/unet_input"]
    torch.testing.assert_close(case_of(name).seen, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in EVERY_CASE if "adapter" not in name])
def test_the_tokens_are_those_of_the_official_code(name: str) -> None:
    case, expected = case_of(name).condition, stored("dynamicrafter")[f"{name}/c_crossattn_slice"]
    denoiser = denoiser_of("training_dynamicrafter")
    with torch.no_grad():
        tokens = case.noised_tokens(denoiser.image_projector(case.image_embeds))
    tokens = torch.cat([case.prompt_embeds, tokens], 1)[:, ::17, :16]
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["dynamicrafter_512", "adapter"])
def test_loss_and_gradients_are_those_of_the_official_code(name: str) -> None:
    known = meta("dynamicrafter")["cases"][name]
    weights = "adapter" if name == "adapter" else "training_dynamicrafter"
    denoiser = denoiser_of(weights)
    denoiser.zero_grad()
    loss = loss_of(case_of(name), denoiser)
    assert float(loss.detach()) == pytest.approx(known["loss"], rel=1e-6)
    loss.backward()
    norms = official_norms(denoiser)
    for key, expected in known["grad_norms"].items():
        part, _, rest = key.partition(".")
        if part != "image_projector":
            assert norms[rest] == pytest.approx(expected, rel=1e-3, abs=1e-7), key
    gradients = [p.grad for p in denoiser.parameters() if p.grad is not None]
    total = nn.utils.get_total_norm(gradients)
    assert float(total) == pytest.approx(known["grad_norm_total"], rel=1e-3)


@pytest.mark.parametrize(
    "name",
    ["dynamicrafter_256", "cil_concat_noise_and_token_replaced", "cil_other_settings"],
)
def test_the_loss_is_that_of_the_official_code(name: str) -> None:
    with torch.no_grad():
        loss = loss_of(case_of(name), denoiser_of("training_dynamicrafter"))
    expected = meta("dynamicrafter")["cases"][name]["loss"]
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_an_adapter_that_starts_as_the_identity_reads_nothing_into_its_first_step() -> None:
    known = meta("dynamicrafter")["cases"]["adapter_identity"]
    case, denoiser = case_of("adapter_identity"), denoiser_of("adapter", is_identity=True)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, weight_decay=0.01)
    first = loss_of(case, denoiser)
    first.backward()
    assert not any(p.grad.any() for p in denoiser.unet.temporal_adapter.parameters())
    nn.utils.clip_grad_norm_(denoiser.parameters(), 0.5)
    optimizer.step()
    with torch.no_grad():
        losses = [float(first), float(loss_of(case, denoiser))]
    assert losses == pytest.approx(known["losses_adamw"][:2], rel=1e-6)


@cache
def svd_parts() -> tuple[UNetSpatioTemporalConditionModel, AutoencoderKLTemporalDecoder]:
    known = meta("svd")
    unet = UNetSpatioTemporalConditionModel(**known["unet_config"])
    unet.load_state_dict(fill(known["shapes"]["unet"], seed=known["seeds"]["unet"]))
    vae = AutoencoderKLTemporalDecoder(**known["vae_config"])
    vae.load_state_dict(fill(known["shapes"]["vae"], seed=known["seeds"]["vae"]), strict=False)
    return unet.train(), vae.eval()


def sigma_of(process: ContinuousSigmas, normal: torch.Tensor) -> torch.Tensor:
    return (process.log_sigma_mean + process.log_sigma_std * normal.flatten()).exp()


@pytest.mark.parametrize("name", list(meta("svd")["cases"]))
def test_svd_sees_and_loses_what_it_does_in_the_official_code(name: str) -> None:
    known, data = meta("svd")["cases"][name], stored("svd")
    settings = known["settings"]
    (unet, vae), draws = (
        svd_parts(),
        {
            key.removeprefix(f"{name}/draw/"): value
            for key, value in data.items()
            if key.startswith(f"{name}/draw/")
        },
    )
    process = ContinuousSigmas(sigma_data=settings["sigma_data"])
    sigmas = sigma_of(process, draws["sigma_normal"])
    latents = data[f"{name}/latents"]
    noised = process.noised(latents, draws["noise"], sigmas)

    pixels = data["pixel_values"][:, 0]
    if "condition_pixel_noise" in draws:
        strength = sigma_of(process, draws["condition_sigma_normal"])
        pixels = pixels + strength[:, None, None, None] * draws["condition_pixel_noise"][:, 0]
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    condition = posterior.mean + posterior.std * draws["condition_posterior"][:, 0]
    if "beta_s_normal" in draws:
        noise = TimeNoise(strength=settings["beta_m"], power=settings["a"])
        # The official noise is one number a sample; it is broadcast.
        shares, normal = sigmas / 700, draws["beta_s_normal"]
        strength = noise.scales(shares, normal)
        condition = noise.on(
            condition,
            time_shares=shares,
            normal=normal,
            noise=draws["condition_noise"][:, 0],
        )
    kept = (known["dropout_draw"] or 1) >= known["null_ratio"]
    shown = (condition * kept)[:, None].expand_as(latents)
    seen = torch.cat([noised.sample, shown], 2)
    expected = data[f"{name}/unet_input"]
    # The noise on the condition is up to 15 times as large as the latents.
    torch.testing.assert_close(seen, expected, atol=2e-6 * float(expected.abs().max()), rtol=0)
    torch.testing.assert_close(noised.timesteps, data[f"{name}/c_noise"], atol=1e-6, rtol=1e-6)
    ids = torch.stack(
        [
            torch.full_like(strength, known["fps"]),
            torch.full_like(strength, known["motion_bucket_id"]),
            strength,
        ],
        1,
    )
    torch.testing.assert_close(ids, data[f"{name}/added_time_ids"], atol=1e-6, rtol=1e-6)

    unet.zero_grad()
    predicted = unet(
        data[f"{name}/unet_input"],
        noised.timesteps,
        data["image_embeds"] * kept,
        added_time_ids=ids,
        return_dict=False,
    )[0]
    loss = denoising_losses(predicted, noised).mean()
    assert float(loss.detach()) == pytest.approx(known["loss"], rel=1e-6)
    if "grad_norms" in known:
        loss.backward()
        for key, parameter in unet.named_parameters():
            expected = known["grad_norms"][key]
            assert float(parameter.grad.norm()) == pytest.approx(expected, rel=1e-3, abs=1e-7), key
