"""The official two-expert procedure restated, less what a row of `sampling.py` saves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from sampling_setup import BOUNDARY, EXPERT_MODULES, FRAMES, GUIDANCE, PROMPT, Inputs, Row

from motionmerge.models.dynamicrafter.cross_attention import CrossContext
from motionmerge.models.dynamicrafter.encoders import preprocess_clip_image, tokenize_prompts
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.sampling.pipelines.guidance import guided_prediction

PARTS = ("unet", "vae", "text_encoder", "image_encoder", "image_projector")


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


class Model:
    """A whole pipeline as the official code holds it: nothing is shared with another."""

    def __init__(self, pipeline: DynamiCrafterPipeline, processor: ExplicitAttention) -> None:
        parts = {name: getattr(pipeline, name) for name in PARTS}
        set_attention(parts["unet"], processor)
        self.pipeline, self.parts, self.unet = pipeline, parts, parts["unet"]

    def another(self) -> Model:
        """Copy all weights."""
        twin = copy.copy(self)
        twin.parts = copy.deepcopy(self.parts)
        twin.unet = twin.parts["unet"]
        return twin

    def put(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy an expert's weights over the model's."""
        for module in EXPERT_MODULES:
            own = dict(self.parts[module].named_parameters())
            prefix = f"{module}."
            for name, tensor in weights.items():
                if name.startswith(prefix):
                    key = name.removeprefix(prefix).replace("processor.", "own_modules.0.")
                    own[key].copy_(tensor)

    def see(self, prompt: str, image: torch.Tensor) -> torch.Tensor:
        """Text and image tokens, `[1, tokens, dim]`."""
        tokens = tokenize_prompts(self.pipeline.tokenizer, [prompt]).to(image.device)
        text = self.parts["text_encoder"](tokens).last_hidden_state
        pixels = preprocess_clip_image(image).to(text.dtype)
        seen = self.parts["image_encoder"](pixels).last_hidden_state
        return torch.cat([text, self.parts["image_projector"](seen)], dim=1)

    def encode_frames(self, pixels: torch.Tensor, num_encodes: int) -> torch.Tensor:
        """Latents of one image for all frames; encoded so many times."""
        vae = self.parts["vae"]
        encoded = [
            vae.encode(pixels.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
            for _ in range(num_encodes)
        ]
        return torch.stack(encoded * (FRAMES // num_encodes), dim=2).float()


class Restated:
    """The official procedure, less the savings of the row."""

    def __init__(
        self, pipeline: DynamiCrafterPipeline, inputs: Inputs, row: Row, folder: Path
    ) -> None:
        from safetensors.torch import load_file

        self.pipeline, self.inputs, self.row = pipeline, inputs, row
        kind = RepeatedTokensAttention if "SDPA" in row.savings else ExplicitAttention
        self.early = Model(pipeline, kind())
        self.late = self.early
        device = str(inputs.noise.device)
        self.waiting = {}
        if "one model" in row.savings:
            for name in ("early", "late"):
                weights = load_file(folder / f"{name}.safetensors")
                self.waiting[name] = {key: value.to(device) for key, value in weights.items()}
            return
        self.late = self.early.another()
        self.early.put(load_file(folder / "early.safetensors"))
        self.late.put(load_file(folder / "late.safetensors"))

    def model(self, name: str) -> Model:
        """The model with an expert's weights."""
        if self.waiting:
            self.early.put(self.waiting[name])
        return self.early if name == "early" else self.late

    def __call__(self, num_steps: int) -> torch.Tensor:
        """Make a video; returns latents."""
        savings, dtype = self.row.savings, self.row.dtype
        pixels = self.inputs.image * 2 - 1
        tokens, image_latents = {}, None
        for name in ("early", "late"):
            model = self.model(name)
            found = [model.see(*one) for one in (("", torch.zeros_like(pixels)), (PROMPT, pixels))]
            tokens[name] = torch.cat(found).to(dtype)
            num_encodes = 1 if "one encode" in savings else FRAMES
            if image_latents is None or "one encode" not in savings:
                image_latents = model.encode_frames(pixels, num_encodes)
        latents = self.inputs.noise
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(num_steps)
        active = ""
        for timestep in scheduler.timesteps:
            abar = scheduler.alphas_cumprod[timestep].double()
            level = float((1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt()))
            due = "early" if level > BOUNDARY else "late"
            if due != active:
                unet = self.model(due).unet
            active, both = due, tokens[due]
            sample = torch.cat([latents, image_latents], dim=1).to(dtype)
            if "batched guidance" in savings:
                found = unet(torch.cat([sample] * 2), timestep, both, 24.0, return_dict=False)[0]
                unconditional, conditional = found.float().chunk(2)
            else:
                unconditional, conditional = (
                    unet(sample, timestep, one[None], 24.0, return_dict=False)[0].float()
                    for one in both
                )
            prediction = guided_prediction(conditional, unconditional, **GUIDANCE)
            latents = scheduler.step(prediction, timestep, latents, eta=0.0, return_dict=False)[0]
        return latents
