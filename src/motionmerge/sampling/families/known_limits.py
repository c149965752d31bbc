"""What each family's pipeline can make: sizes, lengths and rates.

They follow from the configurations of the pipeline's parts, so that they are known before any
weights are loaded. Numbers are those of the pipelines of diffusers 0.42.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from motionmerge.errors import ConfigError
from motionmerge.models.pocket.world import FRAME_RATE, NUM_FRAMES, SIZE
from motionmerge.models.video_pipeline import Config
from motionmerge.sampling.families.limits import Configs, Limits
from motionmerge.sampling.pipelines.inputs import MAX_FRAMES

# One function a family; a part that a folder lacks has the values of its class.


def _part(configs: Configs, *names: str) -> Config:
    """Return the configuration of the first of these parts that there is."""
    return next((configs[name] for name in names if configs.get(name)), {})


def _halvings(config: Config, default: int) -> int:
    """Return the factor by which a network of so many stages shrinks an axis."""
    stages: Sequence[int] = config.get("block_out_channels", (0,) * default)
    factor: int = 2 ** (len(stages) - 1)
    return factor


def _unet_multiple(configs: Configs) -> int:
    return _halvings(_part(configs, "vae"), 4) * _halvings(_part(configs, "unet"), 4)


def _patch(configs: Configs, default: int) -> int:
    """Return the size of a transformer's patch on an axis, in latents."""
    patch = _part(configs, "transformer", "transformer_2").get("patch_size", default)
    return patch if isinstance(patch, int) else patch[-1]


def _vae(configs: Configs) -> tuple[int, int]:
    """Return by what a VAE shrinks a side and the frames, as it says itself."""
    vae = _part(configs, "vae")
    spatial = vae.get("spatial_compression_ratio") or vae.get("scale_factor_spatial", 8)
    return spatial, vae.get("temporal_compression_ratio") or vae.get("scale_factor_temporal", 4)


def _wan_vae(configs: Configs) -> tuple[int, int]:
    """Return the same of a VAE of Wan, as pipelines count that know no other."""
    down = _part(configs, "vae").get("temperal_downsample", (False, True, True))
    return 2 ** len(down), 2 ** sum(down)


def _of_patches(
    configs: Configs,
    vae: tuple[int, int],
    *,
    height: int,
    width: int,
    num_frames: int,
    frame_rate: float,
    least_multiple: int = 16,
    **more: Any,
) -> Limits:
    """Return limits of a transformer: its sides are whole patches, its frames whole latents."""
    spatial, temporal = vae
    return Limits(
        height=height,
        width=width,
        size_multiple=math.lcm(least_multiple, spatial * _patch(configs, 2)),
        num_frames=num_frames,
        frame_rate=frame_rate,
        **{"frame_multiple": temporal, **more},
    )


def svd(configs: Configs) -> Limits:
    """Return the limits of SVD."""
    frames = _part(configs, "unet").get("num_frames", 25)
    multiple = math.lcm(8, _unet_multiple(configs))
    return Limits(
        height=576,
        width=1024,
        size_multiple=multiple,
        num_frames=frames,
        frame_rate=7,
        min_frames=2,
    )  # guidance rises over the frames


def i2vgen_xl(configs: Configs) -> Limits:
    """Return the limits of I2VGen-XL."""
    return Limits(
        height=704,
        width=1280,
        size_multiple=math.lcm(8, _unet_multiple(configs)),
        num_frames=16,
        frame_rate=16,
        min_frames=2,
    )


def cogvideox(configs: Configs) -> Limits:
    """Return the limits of CogVideoX, whose VAE decodes latents in pairs."""
    model, vae = _part(configs, "transformer"), _part(configs, "vae")
    scale = _halvings(vae, 4)
    # Its VAE decodes latents in pairs, the first of which takes an odd one along. Where all are
    # paired, as the 2 of 5 frames, nobody knows that the first stands for one frame: it makes 8.
    temporal = 2 * int(vae.get("temporal_compression_ratio", 4))
    if model.get("patch_size_t") is not None:  # CogVideoX 1.5
        return Limits(
            height=768,
            width=1360,
            size_multiple=scale * _patch(configs, 2),
            num_frames=81,
            frame_rate=16,
            frame_multiple=temporal,
        )
    return Limits(
        height=model.get("sample_height", 60) * scale,
        width=model.get("sample_width", 90) * scale,
        size_multiple=scale * _patch(configs, 2),
        num_frames=model.get("sample_frames", 49),
        frame_rate=8,
        frame_multiple=temporal,
        is_fixed_size=bool(model.get("use_learned_positional_embeddings")),
    )


def _of_last_image(configs: Configs) -> dict[str, Any]:
    """Check whether the videos of a Wan can end with an image.

    One that looks at images with CLIP tells two of them apart by the positions of their tokens: it
    needs two if it has these, and cannot take a second otherwise.
    """
    model = _part(configs, "transformer", "transformer_2")
    looks = model.get("image_dim") is not None
    is_of_two = looks and model.get("pos_embed_seq_len") is not None
    is_fixed = bool(configs.get("", {}).get("expand_timesteps"))  # Wan 2.2-5B reads no other frame
    return {
        "takes_last_image": is_of_two or not (looks or is_fixed),
        "needs_last_image": is_of_two,
    }


def wan(configs: Configs) -> Limits:
    """Return the limits of Wan 2.1 and 2.2."""
    own, vae, more = configs.get("", {}), _vae(configs), _of_last_image(configs)
    more["has_second_guidance"] = own.get("boundary_ratio") is not None
    if own.get("expand_timesteps"):  # Wan 2.2-5B
        size = {"height": 704, "width": 1280, "num_frames": 121, "frame_rate": 24}
    else:
        size = {"height": 480, "width": 832, "num_frames": 81, "frame_rate": 16}
    return _of_patches(configs, vae, **size, **more)


def skyreels_v2(configs: Configs) -> Limits:
    """Return the limits of SkyReels-V2."""
    more = _of_last_image(configs)
    return _of_patches(
        configs, _wan_vae(configs), height=544, width=960, num_frames=97, frame_rate=24, **more
    )


def video_compression(configs: Configs) -> tuple[int, int]:
    """Return how many frames and how many pixels of a side one latent of an LTX stands for."""
    vae = _part(configs, "vae")
    halvings = sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
    temporal = vae.get("temporal_compression_ratio") or vae.get("patch_size_t", 1) * 2**halvings
    spatial = vae.get("spatial_compression_ratio") or vae.get("patch_size", 4) * 2**halvings
    return int(temporal), int(spatial)


def ltx(configs: Configs) -> Limits:
    """Return the limits of LTX."""
    return Limits(
        height=512,
        width=704,
        size_multiple=32,
        num_frames=161,
        frame_rate=25,
        frame_multiple=video_compression(configs)[0],
    )


def ltx_2(configs: Configs) -> Limits:
    """Return the limits of LTX-2."""
    return Limits(
        height=512,
        width=768,
        size_multiple=32,
        num_frames=121,
        frame_rate=24,
        frame_multiple=video_compression(configs)[0],
    )


def ltx_2_5(configs: Configs) -> Limits:
    """Allow what its decoder can look at: each side and the frames fill its windows."""
    own, decoder = ltx_2(configs), _part(configs, "diffusion_decoder")
    first = decoder.get("decoder_stage_kernels", ((3, 7, 7),))[0]
    last = decoder.get("decoder_stage5_kernel", (11, 11, 11))
    temporal = own.frame_multiple
    latents = 1 + math.ceil((last[0] - 1) / temporal)  # the first stage gets frames added
    return replace(
        own,
        min_side=max(first[1:]) * decoder.get("spatial_compression_ratio", 32),
        min_frames=(latents - 1) * temporal + 1,
    )


def hunyuan_video(configs: Configs) -> Limits:
    """Return the limits of HunyuanVideo."""
    model, vae = _part(configs, "transformer"), _vae(configs)
    # With the image beside the first latent, the pipeline cuts the frames of that latent off.
    dropped = 4 if model.get("image_condition_type") == "latent_concat" else 0
    return _of_patches(
        configs,
        vae,
        height=720,
        width=1280,
        num_frames=129,
        frame_rate=24,
        min_frames=1 + math.ceil(dropped / vae[1]) * vae[1],
        dropped_frames=dropped,
        is_distilled=bool(model.get("guidance_embeds", True)),
    )


def hunyuan_video_15(configs: Configs) -> Limits:
    """Return the limits of HunyuanVideo 1.5."""
    vae = _part(configs, "vae")
    multiple = vae.get("spatial_compression_ratio", 16)
    return Limits(
        height=None,
        width=None,
        size_multiple=multiple,
        num_frames=121,
        frame_rate=24,
        frame_multiple=vae.get("temporal_compression_ratio", 4),
    )


def kandinsky_5(configs: Configs) -> Limits:
    """Return the limits of Kandinsky 5."""
    vae = _vae(configs)
    # The first 4 latent frames get mean and deviation of those that follow, so there must be some.
    own = _of_patches(
        configs,
        vae,
        height=512,
        width=768,
        num_frames=121,
        frame_rate=24,
        min_frames=4 * vae[1] + 1,
    )
    if _part(configs, "transformer").get("attention_type") != "nabla":
        return own
    return replace(own, size_multiple=8 * own.size_multiple)  # it looks at squares of 8 patches


def kandinsky_6(configs: Configs) -> Limits:
    """Return the limits of Kandinsky 6."""
    return _of_patches(
        configs,
        _vae(configs),
        height=512,
        width=768,
        num_frames=121,
        frame_rate=24,
        least_multiple=1,
        is_distilled=_scheduler_class(configs) == "PiflowScheduler",
    )


def _scheduler_class(configs: Configs) -> str | None:
    """Return the class name of the scheduler that the pipeline's own configuration names."""
    entry = configs.get("", {}).get("scheduler")
    return entry[1] if isinstance(entry, (list, tuple)) and len(entry) > 1 else None


def wan_2_2_modular(configs: Configs) -> Limits:
    """Return the limits of the modular Wan 2.2, which takes no last image."""
    return replace(wan(configs), takes_last_image=False, needs_last_image=False)


def skyreels_v2_forcing(configs: Configs) -> Limits:
    """Return the limits of SkyReels-V2 with diffusion forcing."""
    own = skyreels_v2(configs)
    temporal, block = (
        own.frame_multiple,
        _part(configs, "transformer").get("num_frame_per_block", 1),
    )
    longest = (97 - 1) // temporal + 1  # longer ones are made in overlapping pieces
    # In whole blocks, and more than the latent of the photo.
    lengths = tuple((n - 1) * temporal + 1 for n in range(block, longest + 1, block) if n > 1)
    return replace(
        own, frame_multiple=1, lengths=lengths, takes_last_image=True, needs_last_image=False
    )


def anyflow(configs: Configs) -> Limits:
    """Allow the one length that the chunks of the checkpoint add up to.

    Raises:
        ConfigError: Its first chunk is longer than a photo.
    """
    model = _part(configs, "transformer")
    chunks = model.get("chunk_partition", (1, 3, 3, 3, 3, 3, 3, 2))
    if chunks[0] != 1:
        raise ConfigError(
            f"The first chunk of this AnyFlow has {chunks[0]} latent frames, of which a photo is "
            "one; the others would stay black.",
            fix="Use a checkpoint whose `chunk_partition` begins with 1.",
        )
    spatial, temporal = _wan_vae(configs)
    coarse = model.get("compressed_patch_size", (1, 4, 4))[-1]
    frames = (sum(chunks) - 1) * temporal + 1
    return Limits(
        height=480,
        width=832,
        size_multiple=math.lcm(16, spatial * coarse),
        num_frames=frames,
        frame_rate=16,
        lengths=(frames,),
    )


def chronoedit(configs: Configs) -> Limits:
    """Return the limits of ChronoEdit."""
    vae = _wan_vae(configs)
    least = vae[1] + 1
    return _of_patches(
        configs, vae, height=480, width=832, num_frames=29, frame_rate=16, min_frames=least
    )


def cosmos_2(configs: Configs) -> Limits:
    """Return the limits of Cosmos 2."""
    return _of_patches(
        configs, _wan_vae(configs), height=704, width=1280, num_frames=93, frame_rate=16
    )


CHUNK = 9
"""Latent frames that Helios and FramePack make at a time."""


def helios(configs: Configs) -> Limits:
    """Return the limits of Helios."""
    vae = _wan_vae(configs)
    temporal = vae[1]
    window = (CHUNK - 1) * temporal + 1
    # Chunks are decoded alone; of their frames it leaves out what is over a multiple, plus one.
    lengths = tuple((n * window - 1) // temporal * temporal + 1 for n in range(1, 65))
    own = _of_patches(
        configs, vae, height=384, width=640, num_frames=lengths[3], frame_rate=24, lengths=lengths
    )
    return replace(own, frame_multiple=1)


def framepack(configs: Configs) -> Limits:
    """Return the limits of framepack."""
    vae, model = _vae(configs), _part(configs, "transformer")
    section = CHUNK * vae[1]
    return _of_patches(
        configs,
        vae,
        height=720,
        width=1280,
        num_frames=4 * section + 1,
        frame_rate=30,
        frame_multiple=section,
        min_frames=section + 1,
        is_distilled=bool(model.get("guidance_embeds", True)),
        takes_last_image=True,
    )


def motif(configs: Configs) -> Limits:
    """Return the limits of motif."""
    vae = _vae(configs)
    least = vae[1] + 1  # 1: no photo
    return _of_patches(
        configs, vae, height=736, width=1280, num_frames=121, frame_rate=24, min_frames=least
    )


def sana_video(configs: Configs) -> Limits:
    """Return the limits of sana video."""
    vae = _vae(configs)
    return _of_patches(
        configs,
        vae,
        height=480,
        width=832,
        num_frames=81,
        frame_rate=16,
        least_multiple=32,
        min_frames=vae[1] + 1,
    )


def minimax_h3(configs: Configs) -> Limits:
    """Return the limits of minimax h3."""
    vae = _part(configs, "vae")
    spatial = math.prod(vae.get("spatial_downsample_factors", (2, 2, 2, 2)))
    clip = vae.get("clip_length", 17)
    rest = math.ceil(clip / math.prod(vae.get("temporal_downsample_factors", (2, 2))))
    shortest, longest = 5 * 24, 15 * 24  # it makes 5 to 15 seconds
    lengths = tuple(n for n in range(shortest, longest + 1) if n % clip == rest)
    return Limits(
        height=768,
        width=1344,
        size_multiple=spatial * _patch(configs, 2),
        num_frames=lengths[0],
        frame_rate=24,
        lengths=lengths,
        is_distilled=True,
        has_guidance=False,
        takes_last_image=True,
    )


def dynamicrafter(configs: Configs) -> Limits:
    """Return the limits of dynamicrafter."""
    own, frames = configs.get("", {}), _part(configs, "image_projector").get("num_frames", 16)
    return Limits(
        height=own.get("height", 320),
        width=own.get("width", 512),
        size_multiple=_unet_multiple(configs),
        num_frames=16 if frames == 1 else frames,
        frame_rate=8,
        min_frames=frames,
        max_frames=MAX_FRAMES if frames == 1 else frames,
        takes_last_image=True,
    )


def videocrafter(configs: Configs) -> Limits:
    """Return the limits of VideoCrafter, which knows no last images."""
    return replace(dynamicrafter(configs), takes_last_image=False)


def pocket(configs: Configs) -> Limits:
    """Return the limits of pocket."""
    return Limits(
        height=256,
        width=256,
        size_multiple=SIZE,
        num_frames=NUM_FRAMES,
        frame_rate=FRAME_RATE,
        min_frames=NUM_FRAMES,
        max_frames=NUM_FRAMES,
        is_square=True,
    )
