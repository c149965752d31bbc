"""A tiny ConsistI2V with random weights, built in memory from the real classes."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler

from motionmerge.models.consisti2v.unet import ConsistI2VUNet
from motionmerge.sampling.pipelines.consisti2v import ConsistI2VPipeline

from .dynamicrafter import WIDTH, tiny_pipeline


def tiny_consisti2v_unet() -> ConsistI2VUNet:
    unet = ConsistI2VUNet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 2),
        norm_num_groups=4,
        n_frames=3,
        n_temp_heads=2,
    )
    with torch.no_grad():  # with alpha at 1 the temporal layers would do nothing
        for name, parameter in unet.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.4)
    return unet.eval()


def consisti2v_scheduler() -> DDIMScheduler:
    """The scheduler of the hub's folder."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        steps_offset=1,
        clip_sample=False,
    )


def tiny_consisti2v() -> ConsistI2VPipeline:
    parts = tiny_pipeline().components
    own = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = tiny_consisti2v_unet()
    pipeline = ConsistI2VPipeline(
        unet=unet, scheduler=consisti2v_scheduler(), **own, height=16, width=16
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
