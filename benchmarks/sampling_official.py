"""The official two-expert procedure restated, less what a row of `sampling.py` saves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from sampling_setup import BOUNDARY, FRAMES, GUIDANCE, Inputs, Row, Size

from motionmerge.models.dynamicrafter.cross_attention import CrossContext
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.dynamicrafter_pipeline import DynamiCrafterPipeline
from motionmerge.sampling.guidance import guided_prediction


class ExplicitAttention:
    """Attention by two matrix products, tokens repeated for every frame, as the official code."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: CrossContext | None = None,
        attention_mask: None = None,
    ) -> torch.Tensor:
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            out = self.attend(attn, query, attn.to_k(hidden_states), attn.to_v(hidden_states))
            return attn.to_out[1](attn.to_out[0](out))
        ip = attn.own_processor
        text, image = encoder_hidden_states.text, encoder_hidden_states.image
        text = text.repeat_interleave(len(hidden_states) // len(text), 0)
        out = self.attend(attn, query, attn.to_k(text), attn.to_v(text))
        out = out + self.attend(attn, query, ip.to_k_ip[0](image), ip.to_v_ip[0](image))
        return attn.to_out[1](attn.to_out[0](out))

    @staticmethod
    def attend(attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        weights = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("bhij,bhjd->bhid", weights.softmax(-1), v)
        return out.transpose(1, 2).flatten(2)


class RepeatedTokensAttention(ExplicitAttention):
    """The same with torch's fused kernel."""

    @staticmethod
    def attend(attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


def set_attention(unet: DynamiCrafterUNet, processor: ExplicitAttention) -> None:
    """Use a processor everywhere; the image branch's parameters stay with their module."""
    from diffusers.models.attention_processor import Attention

    for module in unet.modules():
        if isinstance(module, Attention):
            object.__setattr__(module, "own_processor", module.processor)
            kept = module._modules.pop("processor", None)
            if kept is not None:
                module.own_modules = torch.nn.ModuleList([kept])
            module.processor = processor


class Restated:
    """The official procedure, less the savings of the row."""

    def __init__(
        self, pipeline: DynamiCrafterPipeline, inputs: Inputs, row: Row, size: Size, folder: Path
    ) -> None:
        from safetensors.torch import load_file

        self.pipeline, self.inputs, self.row, self.size = pipeline, inputs, row, size
        files = {name: folder / f"{name}.safetensors" for name in ("early", "late")}
        self.early = pipeline.unet
        self.early.load_state_dict(load_file(files["early"]))
        self.late = self.early
        self.waiting: dict[str, dict[str, torch.Tensor]] = {}
        if "one model" not in row.savings:
            self.late = copy.deepcopy(self.early)
            self.late.load_state_dict(load_file(files["late"]))
        else:
            self.waiting = {
                name: {key: value.to(inputs.noise.device) for key, value in load_file(file).items()}
                for name, file in files.items()
            }
        kind = RepeatedTokensAttention if "SDPA" in row.savings else ExplicitAttention
        for unet in dict.fromkeys((self.early, self.late)):
            set_attention(unet, kind())

    def put(self, name: str) -> None:
        """With one model, copy an expert's weights over it."""
        own = dict(self.early.named_parameters())
        for key, tensor in self.waiting.get(name, {}).items():
            own[key.replace("processor.", "own_modules.0.")].copy_(tensor)

    def __call__(self, num_steps: int) -> torch.Tensor:
        """Make a video; returns latents."""
        pipeline, savings, dtype = self.pipeline, self.row.savings, self.row.dtype
        pixels = (self.inputs.image * 2 - 1).to(dtype)
        num_encodes = 1 if "one encode" in savings else FRAMES
        encoded = [
            pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
            for _ in range(num_encodes)
        ]
        image_latents = torch.stack(encoded * (FRAMES // num_encodes), dim=2).float()
        both = self.inputs.tokens.to(dtype)
        latents = self.inputs.noise
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(num_steps)
        active = ""
        for timestep in scheduler.timesteps:
            abar = scheduler.alphas_cumprod[timestep].double()
            level = float((1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt()))
            due = "early" if level > BOUNDARY else "late"
            if due != active:
                self.put(due)
            active = due
            unet = self.early if due == "early" else self.late
            sample = torch.cat([latents, image_latents], dim=1).to(dtype)
            if "batched guidance" in savings:
                found = unet(torch.cat([sample] * 2), timestep, both, 24.0, return_dict=False)[0]
                unconditional, conditional = found.float().chunk(2)
            else:
                unconditional, conditional = (
                    unet(sample, timestep, tokens[None], 24.0, return_dict=False)[0].float()
                    for tokens in both
                )
            prediction = guided_prediction(conditional, unconditional, **GUIDANCE)
            latents = scheduler.step(prediction, timestep, latents, eta=0.0, return_dict=False)[0]
        return latents
