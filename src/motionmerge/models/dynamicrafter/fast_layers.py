"""Layers of torch and diffusers with the same parameters and numbers, faster or in less memory.

Only without gradients: training takes the layers' own way, and so do autocast and `torch.compile`,
which fuses better than this. Group norms and attention over frames differ on a GPU in halves alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from motionmerge.models.diffusers_state import moves_weights
from motionmerge.models.plain_layers import is_plain_linear

_HALVES = (torch.bfloat16, torch.float16)
_MANY_GROUPS = 256  # from here on a thread block for each of them fills a GPU

_PIECE_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
"""The most that a piece of a feed-forward layer takes where it is widest, unless one row does."""


class FastGroupNorm(nn.GroupNorm):
    """Group norm whose few, long groups are summed by the whole GPU.

    torch gives a group to one thread block, so that over the frames of a video 64 of them work,
    for a fifth of a DynamiCrafter step (27.7 of 136 ms on an H200, bf16). Here sums and squares are
    reductions of the whole GPU in fp32, and the rest is a batch norm with these moments. The
    variance is a difference of two sums, exact enough for halves alone.
    """

    @classmethod
    def like(cls, layer: nn.GroupNorm) -> FastGroupNorm:
        """Make one of a layer's parameters."""
        with torch.device("meta"):
            made = cls(layer.num_groups, layer.num_channels, layer.eps, layer.affine)
        made.weight, made.bias = layer.weight, layer.bias
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise `[batch, channels, ...]`."""
        if len(input) * self.num_groups < _MANY_GROUPS and self.affine and _may_be_fast(input):
            return self.by_reductions(input)
        return super().forward(input)

    def by_reductions(self, video: torch.Tensor) -> torch.Tensor:
        """Normalise by fp32 reductions over all entries of a group."""
        video = video.contiguous()
        batch, channels = video.shape[:2]
        groups = video.view(batch, self.num_groups, -1)
        mean = groups.mean(-1, dtype=torch.float32)
        norm = torch.linalg.vector_norm(groups, dim=-1, dtype=torch.float32)
        square = norm.square_().div_(groups.shape[-1])
        variance = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0)
        mean, variance = (
            moment[..., None].expand(-1, -1, channels // self.num_groups).reshape(-1)
            for moment in (mean, variance)
        )
        weight, bias = (parameter.float().repeat(batch) for parameter in (self.weight, self.bias))
        entries = video.view(1, batch * channels, -1)
        return F.batch_norm(entries, mean, variance, weight, bias, eps=self.eps).view_as(video)


class FastGEGLU(GEGLU):
    """Gated linear unit whose two halves are products of their own, on CPUs and in halves on GPUs.

    Halves of one product lie in rows of the other, where element-wise kernels take six times as
    long (181 us a call instead of about 30, H200), and which a CPU copies before (a tenth of the
    whole layer).
    """

    @classmethod
    def like(cls, layer: GEGLU) -> FastGEGLU:
        """Make one of a layer's parameters."""
        with torch.device("meta"):
            made = cls(layer.proj.in_features, layer.proj.out_features // 2)
        made.proj = layer.proj
        return made

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute `value * gelu(gate)`, `[..., dim]` to `[..., inner dim]`."""
        on_cpu = hidden_states.device.type == "cpu" and _only_infers(hidden_states)
        if (on_cpu or _may_be_fast(hidden_states)) and is_plain_linear(self.proj, hidden_states):
            return self.by_halves(hidden_states)
        return super().forward(hidden_states)

    def by_halves(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute the gated unit by two products."""
        weights = self.proj.weight.chunk(2)
        biases = (None, None) if self.proj.bias is None else self.proj.bias.chunk(2)
        value, gate = (
            F.linear(hidden_states, weight, bias)
            for weight, bias in zip(weights, biases, strict=True)
        )
        return F.gelu(gate).mul_(value)


class FastFeedForward(FeedForward):
    """Feed-forward layer that takes its rows in pieces, as they are eight times as wide inside.

    Of a whole video that is the most that a step of DynamiCrafter holds, and it leaves a CPU's
    cache before it is read again: in pieces, 6,144 rows of 96 take 14 ms instead of 34, and 40,960
    rows of 320 0.78 s instead of 1.08 (two cores of an EPYC, fp32).
    """

    @classmethod
    def like(cls, layer: FeedForward) -> FastFeedForward:
        """Make one of a layer's own layers."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.net = layer.net
        made.training = layer.training
        return made

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Compute `[..., dim]` to `[..., output dim]`."""
        limit = _PIECE_BYTES.get(hidden_states.device.type)
        width = getattr(self.net[0].proj, "out_features", None)
        if limit is None or width is None or not _only_infers(hidden_states) or moves_weights(self):
            return super().forward(hidden_states, *args, **kwargs)
        at_once = max(1, limit // (width * hidden_states.element_size()))
        pieces = hidden_states.flatten(0, -2).split(at_once)
        if len(pieces) == 1:
            return super().forward(hidden_states, *args, **kwargs)
        made = [super(FastFeedForward, self).forward(piece, *args, **kwargs) for piece in pieces]
        return torch.cat(made).unflatten(0, hidden_states.shape[:-1])


def attention_over_frames(values: torch.Tensor) -> AbstractContextManager[None]:
    """Return the context in which to attend over a few frames of many pixels.

    torch prefers cuDNN's kernel, which takes 1.5 times as long as its own (5,120 sequences of 16
    frames, five heads of 64, bf16 on an H200: 415 and 285 us).
    """
    if _may_be_fast(values):
        return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return nullcontext()


def use_fast_layers(model: nn.Module) -> None:
    """Replace norms, gated units and feed-forward layers; parameters and their names stay."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.GroupNorm:
                setattr(parent, name, FastGroupNorm.like(layer))
            elif type(layer) is GEGLU:
                setattr(parent, name, FastGEGLU.like(layer))
            elif type(layer) is FeedForward:
                setattr(parent, name, FastFeedForward.like(layer))


def _may_be_fast(values: torch.Tensor) -> bool:
    return values.is_cuda and values.dtype in _HALVES and _only_infers(values)


def _only_infers(values: torch.Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(values.device.type)
        and not torch.compiler.is_compiling()
    )
