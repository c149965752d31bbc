"""The text-to-temporal adapter of stage 1: the prompt enters every temporal transformer.

Paper: Tian et al. 2025 (arXiv 2503.00948), stage 1. Learned queries, one a frame, read the prompt
by cross-attention (`TextToTemporalAdapter`); each temporal transformer then mixes the answer into
its input by one linear layer (`TemporalFusion`). Unlike the official initialisation, which is
random, ours is the identity: a model with a fresh adapter computes exactly what it computed
without.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from motionmerge.errors import ShapeError
from motionmerge.models.plain_layers import is_plain_linear


class TextToTemporalAdapter(nn.Module):
    """Read the prompt once for every frame: a q-former of one cross-attention layer.

    context = to_out(softmax(to_q(queries) to_k(text)^T / sqrt(head_dim)) to_v(text))

    Args:
        text_dim: Width of the text tokens.
        context_dim: Width of the queries and of the result.
        num_frames: Number of learned queries. Another number of frames is served by linear
            interpolation of the queries along time.
        num_heads, head_dim: Shape of the attention.
        generator: Draws the weights; a fixed one makes the adapter reproducible.

    Source: official module `qformer` with its parameter `queries`.
    """

    def __init__(
        self,
        text_dim: int,
        *,
        context_dim: int = 1024,
        num_frames: int = 16,
        num_heads: int = 8,
        head_dim: int = 128,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        inner_dim = num_heads * head_dim
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.randn(num_frames, context_dim, generator=generator))
        self.to_q = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(text_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(text_dim, inner_dim, bias=False)
        out = nn.Linear(inner_dim, context_dim)
        self.to_out = nn.ModuleList([out])
        for linear in (self.to_q, self.to_k, self.to_v, out):
            bound = linear.in_features**-0.5
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        nn.init.zeros_(out.bias)

    def forward(self, text: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Turn text tokens `[batch, tokens, text_dim]` into `[batch, frames, context_dim]`.

        Raises:
            ShapeError: the tokens do not have the adapter's text width.
        """
        if text.shape[-1] != self.to_k.in_features:
            raise ShapeError(
                f"The text tokens are {text.shape[-1]} wide, the temporal adapter reads "
                f"{self.to_k.in_features}",
                fix="Pass the tokens of the text encoder the adapter was made for, or compute "
                "`temporal_context` yourself.",
            )
        queries: torch.Tensor = self.queries
        if num_frames != queries.shape[0]:
            queries = F.interpolate(
                queries.T[None], size=num_frames, mode="linear", align_corners=True
            )[0].T
        query = self.to_q(queries).expand(text.shape[0], -1, -1)
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (query, self.to_k(text), self.to_v(text))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))


class TemporalFusion(nn.Module):
    """Mix one context token a frame into the hidden states of a temporal transformer.

    x <- Linear(concat(x, context)),   starting as  Linear = [I | 0], bias 0

    Source: official layer `cc_projection`.
    """

    def __init__(self, dim: int, context_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim + context_dim, dim)
        nn.init.zeros_(self.proj.bias)
        with torch.no_grad():
            self.proj.weight.zero_()[:, :dim].fill_diagonal_(1.0)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Fuse `[batch * height * width, frames, dim]` with `[batch, frames, context_dim]`.

        The context part is computed once a frame, not once a pixel: the layer is linear.
        """
        if not is_plain_linear(self.proj, hidden_states):
            pixels = len(hidden_states) // len(context)
            tokens = context.repeat_interleave(pixels, 0).to(hidden_states.dtype)
            return self.proj(torch.cat([hidden_states, tokens], -1))
        dim = hidden_states.shape[-1]
        weight = self.proj.weight
        per_frame = F.linear(context, weight[:, dim:], self.proj.bias)
        per_pixel = F.linear(hidden_states, weight[:, :dim])
        batch = context.shape[0]
        return (per_pixel.unflatten(0, (batch, -1)) + per_frame[:, None]).flatten(0, 1)
