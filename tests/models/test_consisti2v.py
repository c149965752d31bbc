"""ConsistI2V's U-Net against the official one, and the traps of its layers one by one."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.merging.algebra.groups import selects
from motionmerge.models import ConsistI2VUNet
from motionmerge.models.consisti2v.attention import (
    VideoLayout,
    neighbours_in_first_frame,
    rotated,
)
from motionmerge.models.dynamicrafter.cross_attention import ContextCache
from motionmerge.parameter_groups import CONSISTI2V, _first_group, group_of
from motionmerge.switching.expert_bank import experts

from ..tiny.consisti2v import tiny_consisti2v, tiny_consisti2v_unet
from .reference_weights import official_keys, official_weights, vectors

VECTORS = vectors("consisti2v")
KEYS = official_keys("consisti2v")
LIVE = {name: s for name, s in KEYS["shapes"].items() if not re.search(KEYS["dead"], name)}


@pytest.fixture(scope="module")
def unet() -> ConsistI2VUNet:
    unet = ConsistI2VUNet(**official_keys("consisti2v_unet")["config"])
    unet.load_state_dict(official_weights("consisti2v_unet"))  # what does nothing is left out
    return unet.eval().requires_grad_(False)


def inputs(videos: int = 1, frames: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(videos, 4, frames - 1, 4, 6, generator=generator),
        "timestep": torch.tensor([500, 20, 999][:videos]),
        "encoder_hidden_states": torch.randn(videos, 5, 16, generator=generator),
        "frame_stride": torch.tensor([3, 1, 5][:videos]),
        "first_frame_latents": torch.randn(videos, 4, 1, 4, 6, generator=generator),
    }


def test_the_unet_equals_the_official_one(unet: ConsistI2VUNet) -> None:
    names = ("x", "timesteps", "text", "frame_stride", "first_frame", "out")
    x, time, text, stride, first, expected = (VECTORS[f"unet.{name}"] for name in names)
    made = unet(x, time, text, stride, first).sample
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)
    assert torch.equal(made, unet(torch.cat([first, x], 2), time, text, stride).sample)
    cache = ContextCache()
    for _ in range(2):
        cached = unet(x, time, text, stride, first, return_dict=False, context_cache=cache)[0]
        assert torch.equal(cached, made)
    assert len(cache.kept) == sum(name.endswith("attn2") for name, _ in unet.named_modules())


def test_every_live_tensor_of_the_released_file_has_its_name_and_shape() -> None:
    with torch.device("meta"):
        unet = ConsistI2VUNet(**KEYS["config"])
    assert {name: list(tensor.shape) for name, tensor in unet.state_dict().items()} == LIVE
    assert (len(LIVE), len(KEYS["shapes"])) == (1293, 1397)


def test_a_rotary_embedding_turns_the_first_half_of_the_width_before_heads_are_split() -> None:
    torch.testing.assert_close(rotated(VECTORS["rotary.q"]), VECTORS["rotary.q_out"])
    keys, frames = VECTORS["rotary.k"], VECTORS["rotary.k_out"].shape[1] - 8
    turned = torch.cat([rotated(keys[:, :frames]), keys[:, frames:]], dim=1)
    torch.testing.assert_close(turned, VECTORS["rotary.k_out"])
    width = keys.shape[-1]
    assert torch.equal(turned[..., width // 2 :], keys[..., width // 2 :])


def test_norms_see_one_frame_at_a_time() -> None:
    unet = tiny_consisti2v_unet()
    rows: list[tuple[int, int]] = []
    for name, module in unet.named_modules():
        if re.search(r"(conv3ds\.\d+\.norm1|tempo_attns\.\d+\.norm)$", name):
            module.register_forward_pre_hook(lambda _, args: rows.append(tuple(args[0].shape[:1])))
    with torch.no_grad():
        unet(**inputs(videos=2, frames=4))
    assert set(rows) == {(2 * 4,)}


def test_a_forward_pass_changes_no_weight_and_shares_outside_0_to_1_are_clamped() -> None:
    unet = tiny_consisti2v_unet()
    alphas = [value for name, value in unet.named_parameters() if name.endswith("alpha")]
    made = {}
    for share in (-0.5, 0.0, 1.0, 1.5):
        with torch.no_grad():
            for alpha in alphas:
                alpha.fill_(share)
            before = {name: value.clone() for name, value in unet.state_dict().items()}
            made[share] = unet(**inputs()).sample
        assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert torch.equal(made[-0.5], made[0.0]) and torch.equal(made[1.5], made[1.0])
    assert not torch.equal(made[0.0], made[1.0])


def test_without_temporal_layers_frames_see_each_other_through_frame_0_alone() -> None:
    unet = tiny_consisti2v_unet()
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if name.endswith("alpha"):
                value.fill_(1.0)
        given = inputs(frames=4)
        plain = unet(**given).sample
        other = unet(**{**given, "first_frame_latents": given["first_frame_latents"] + 1}).sample
        given["sample"][:, :, 0] += 1
        moved = unet(**given).sample
    torch.testing.assert_close(moved[:, :, 1:], plain[:, :, 1:])
    assert not torch.allclose(moved[:, :, 0], plain[:, :, 0], atol=1e-3)
    assert all(not torch.allclose(other[:, :, i], plain[:, :, i], atol=1e-4) for i in range(3))


def test_neighbours_are_those_of_frame_0_row_by_row_with_edges_repeated() -> None:
    layout = VideoLayout(frames=2, height=3, width=3)
    first = torch.arange(9.0).reshape(9, 1)
    values = torch.stack([first, 100 + first], dim=1)  # [pixels, frames, channels]
    around = neighbours_in_first_frame(values, layout)[..., 0].tolist()
    assert around[4] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert around[0] == [0, 0, 1, 0, 1, 3, 3, 4]
    assert around[8] == [4, 5, 5, 7, 8, 7, 8, 8]


def test_a_batch_gives_what_its_videos_give_alone_and_numbers_are_tensors() -> None:
    unet, given = tiny_consisti2v_unet(), inputs(videos=3)
    with torch.no_grad():
        together = unet(**given).sample
        for i in range(3):
            alone = {name: value[i : i + 1] for name, value in given.items()}
            torch.testing.assert_close(unet(**alone).sample, together[i : i + 1])
        alone |= {"timestep": 999, "frame_stride": 5}
        torch.testing.assert_close(unet(**alone).sample, together[2:])


@pytest.mark.parametrize("frames", [2, 5, 77])
def test_a_video_can_have_any_number_of_frames(frames: int) -> None:
    with torch.no_grad():
        made = tiny_consisti2v_unet()(**inputs(frames=frames)).sample
    assert made.shape == (1, 4, frames - 1, 4, 6) and made.isfinite().all()


def test_a_denoising_step_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        tiny_consisti2v_unet()(**inputs())
    assert "cross_attention_kwargs" not in caplog.text


def test_gradient_checkpointing_changes_no_gradient() -> None:
    unet, gradients = tiny_consisti2v_unet().train(), []
    for switch in (unet.disable_gradient_checkpointing, unet.enable_gradient_checkpointing):
        switch()
        unet.zero_grad()
        unet(**inputs()).sample.square().mean().backward()
        gradients.append({name: value.grad for name, value in unet.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)
    assert unet.down_blocks[0].gradient_checkpointing


def test_a_lora_reaches_the_temporal_attention() -> None:
    unet = tiny_consisti2v_unet()
    with torch.no_grad():
        plain = unet(**inputs()).sample
    unet.add_adapter(
        LoraConfig(r=2, target_modules=r".*tempo_attns.*\.to_q", init_lora_weights=False)
    )
    with torch.no_grad():
        assert not torch.equal(unet.eval()(**inputs()).sample, plain)


def hub_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Write a U-Net as the hub has it: Stable Diffusion's settings, tensors that do nothing."""
    unet = tiny_consisti2v_unet()
    own = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    of_images = {"act_fn": "silu", "mid_block_type": "UNetMidBlock2DCrossAttn", "dropout": 0.0}
    config = {"_class_name": "VideoLDMUNet3DConditionModel", **own, **of_images}
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: value.contiguous() for name, value in unet.state_dict().items()}
    dead = {
        "down_blocks.0.conv3ds.0.time_emb_proj.weight": torch.zeros(32, 512),
        "down_blocks.0.tempo_attns.0.transformer_blocks.0.attn1.rotary_emb.freqs": torch.ones(8),
        "down_blocks.0.tempo_attns.0.transformer_blocks.0.attn2.rotary_bias."
        "relative_attention_bias.weight": torch.zeros(32, 2),
    }
    save_file({**state, **dead}, folder / "diffusion_pytorch_model.safetensors")
    return state


def test_a_file_of_the_hub_is_read_without_what_does_nothing_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = hub_folder(tmp_path)
    loaded, found = ConsistI2VUNet.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert not caplog.text


def test_experts_of_the_hubs_file_leave_out_what_does_nothing(tmp_path: Path) -> None:
    hub_folder(tmp_path)
    pipeline = tiny_consisti2v()
    with experts(pipeline, {"own": tmp_path / "diffusion_pytorch_model.safetensors"}) as bank:
        assert bank.experts == ("own",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temp_pos_embedding": "sinusoidal"}, "only 'rotary' is supported"),
        ({"act_fn": "gelu"}, "only 'silu' is supported"),
        ({"block_out_chanels": (32,)}, "Did you mean `block_out_channels`"),
        ({"down_block_types": ("DownBlock2D",) * 4}, "Name one block a level"),
        ({"attention_head_dim": (5, 10)}, "2 numbers of heads"),
    ],
)
def test_a_configuration_of_another_network_is_refused(change: dict, words: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=words):
        ConsistI2VUNet.from_config({**dict(KEYS["config"]), **change})


def test_latents_that_do_not_fit_are_refused() -> None:
    unet, given = tiny_consisti2v_unet(), inputs()
    for wrong in (
        {"first_frame_latents": given["first_frame_latents"][..., :4]},
        {"first_frame_latents": None, "sample": given["sample"][:, :, :1]},
        {"first_frame_latents": None, "sample": given["sample"][..., :5]},
    ):
        with pytest.raises(ShapeError, match=r"has shape|have shape") as caught:
            unet(**{**given, **wrong})
        assert caught.value.fix


def test_all_temporal_tensors_of_the_released_file_are_selected() -> None:
    assert sum(map(selects("temporal"), KEYS["shapes"])) == 707
    groups = {name: group_of(f"unet.{name}") for name in KEYS["shapes"]}
    assert {name: _first_group(CONSISTI2V.patterns, name) for name in groups} == groups
    assert set(groups.values()) == {
        "temporal", "spatial", "cross_attention", "residual", "embeddings"
    }  # fmt: skip
