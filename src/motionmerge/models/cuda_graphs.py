"""Calls of a U-Net as CUDA graphs: captured once for each shape, replayed for every other step.

A call of DynamiCrafter starts some three thousand kernels, which takes Python 80 to 120 ms; a big
GPU computes them in about as long. A graph starts them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from motionmerge.models.diffusers_state import is_hooked


class ReplayedCall:
    """A function of tensors that is captured as a CUDA graph once, and then replayed.

    What differs from call to call reaches the graph through its inputs, or through tensors that are
    changed in place. The function must have run on the stream before.

    Args:
        function: What is captured; gives a tensor.
        inputs: What it is captured with.
        stream: Where it is captured.
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        stream: torch.cuda.Stream,
    ) -> None:
        self._inputs = tuple(value.clone() for value in inputs)
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(stream.device)
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the function's results for these inputs, in new memory."""
        for mine, new in zip(self._inputs, inputs, strict=True):
            mine.copy_(new)
        self._graph.replay()
        return self._output.clone()


class CapturedUNet:
    """A U-Net that is called by replaying CUDA graphs.

    A graph reads weights where they were when it was captured. Experts are copied there, so one
    graph serves all of them; `refresh` notices when weights have moved.

    Args:
        unet: A `DynamiCrafterUNet` of which `can_capture` holds.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self._graphs = unet, dict[Any, ReplayedCall]()
        self._stream = torch.cuda.Stream(_device(unet))
        self._places: tuple[int, ...] = ()

    def refresh(self) -> None:
        """Forget all graphs if any parameter or buffer lies elsewhere than before."""
        tensors = chain(self.unet.parameters(), self.unet.buffers())
        places = tuple(tensor.data_ptr() for tensor in tensors)
        if places != self._places:
            self._graphs.clear()
        self._places = places

    @torch.no_grad()
    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        tokens: torch.Tensor,
        frame_rate: float,
    ) -> torch.Tensor:
        """Predict, as the U-Net does with the weights that are in place; its hooks are not called.

        Args:
            sample: `[batch, in_channels, frames, height, width]`.
            timestep: One number.
            tokens: Text and image tokens, `[batch, tokens, dim]`.
            frame_rate: Frames per second.
        """
        rate = torch.full((1,), float(frame_rate), device=sample.device)
        inputs = (sample, timestep.to(sample.device).reshape(1), tokens, rate)
        key = tuple((value.shape, value.dtype) for value in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
        return self._graphs[key](*inputs)

    def _capture(self, inputs: Sequence[torch.Tensor]) -> ReplayedCall:
        """Run once as it is, for what only the first run does, and then into a graph."""
        self._stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
        with torch.cuda.stream(self._stream):
            self._predict(*inputs)
        return ReplayedCall(self._predict, inputs, self._stream)

    def _predict(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        tokens: torch.Tensor,
        frame_rate: torch.Tensor,
    ) -> torch.Tensor:
        forward: Any = self.unet.forward
        return forward(sample, timestep, tokens, frame_rate=frame_rate, return_dict=False)[0]


def can_capture(unet: nn.Module) -> bool:
    """Check whether a replayed call does the same as a call.

    Not without a GPU, and not where Python decides in a call: offloading, diffusers' caches and
    casts by layer, LoRA layers, whose strengths are numbers that a graph would keep.
    """
    return _device(unet).type == "cuda" and not is_hooked(unet) and not hasattr(unet, "peft_config")


def _device(unet: nn.Module) -> torch.device:
    return next(unet.parameters()).device
