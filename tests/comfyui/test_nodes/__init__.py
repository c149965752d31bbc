"""Nodes for workflows of the tests, and encoders that are small enough for them."""

import torch

from . import stand_ins

stand_ins.use_them()


class RandomConditioning:
    """Random embeddings of a seed, as a text encoder would make them."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "width": ("INT", {"default": 4096})}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, seed, width):
        generator = torch.Generator().manual_seed(seed)
        return ([[torch.randn(1, 5, width, generator=generator), {}]],)


class RaisesInMidRun:
    """A model that raises at its sixth call, and not in the next run."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, model):
        model, calls = model.clone(), []

        def call(executor, *args):
            calls.append(1)
            if len(calls) == 6:
                raise RuntimeError("the sixth call")
            return executor(*args)

        model.add_wrapper_with_key("predict_noise", "test", call)
        return (model,)


NODE_CLASS_MAPPINGS = {
    "TestRandomConditioning": RandomConditioning,
    "TestRaisesInMidRun": RaisesInMidRun,
}
