"""Shared text and kept keys change the cost of cross-attention, not its result."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

from motionmerge.models.dynamicrafter.cross_attention import (
    ContextCache,
    CrossContext,
    TextImageAttnProcessor,
)
from motionmerge.models.pocket.components import build_pocket_model

BATCH, FRAMES, PIXELS, DIM, TOKEN_DIM = 2, 3, 5, 16, 8


def attentions():
    """The same parameters behind diffusers' processor and behind ours."""
    torch.manual_seed(0)
    pair = [Attention(DIM, TOKEN_DIM, heads=4, dim_head=4) for _ in range(2)]
    kinds = (IPAdapterAttnProcessor2_0, TextImageAttnProcessor)
    for attention, kind in zip(pair, kinds, strict=True):
        attention.set_processor(kind(DIM, TOKEN_DIM, num_tokens=(2,), scale=0.7))
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


@pytest.mark.parametrize("image_rows", [BATCH, BATCH * FRAMES])
def test_it_equals_diffusers_processor_on_repeated_tokens(image_rows):
    theirs, ours = attentions()
    hidden = torch.randn(BATCH * FRAMES, PIXELS, DIM)
    text, image = torch.randn(BATCH, 4, TOKEN_DIM), torch.randn(image_rows, 2, TOKEN_DIM)
    per_frame = image.repeat_interleave(BATCH * FRAMES // image_rows, 0)
    expected = theirs(hidden, (text.repeat_interleave(FRAMES, 0), [per_frame]))
    torch.testing.assert_close(ours(hidden, CrossContext(text, image)), expected)


def test_a_lora_on_the_keys_is_heard():
    _, ours = attentions()
    hidden, text = torch.randn(BATCH, PIXELS, DIM), torch.randn(BATCH, 4, TOKEN_DIM)
    context = CrossContext(text, torch.randn(BATCH, 2, TOKEN_DIM))
    before = ours(hidden, context)
    ours.to_k.register_forward_hook(lambda module, inputs, keys: keys + 1)
    assert not torch.equal(ours(hidden, context), before)


@torch.no_grad()
def test_a_kept_context_gives_the_same_bits_and_is_not_computed_again():
    model = build_pocket_model(seed=1)
    unet = model.unet
    for transformer in unet.temporal_transformers():  # an adapter that does something
        for parameter in transformer.fusion.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randn(
        BATCH, unet.config.num_text_tokens + 4 * 8, unet.config.cross_attention_dim
    )
    sample = torch.randn(BATCH, unet.config.in_channels, 8, 8, 8)
    cache = ContextCache()
    for timestep in (900, 500):
        plain = unet(sample, timestep, tokens, 8, return_dict=False)[0]
        kept = unet(sample, timestep, tokens, 8, return_dict=False, context_cache=cache)[0]
        assert torch.equal(plain, kept)
    other = unet(sample, 500, tokens + 1, 8, return_dict=False, context_cache=cache)[0]
    assert torch.equal(other, plain)  # tokens are not looked at again
    cache.clear()
    other = unet(sample, 500, tokens + 1, 8, return_dict=False, context_cache=cache)[0]
    assert not torch.equal(other, plain)


@torch.no_grad()
def test_compiled_attention_keeps_keys_and_is_not_compiled_again_for_another_context():
    _, ours = attentions()
    hidden = torch.randn(BATCH * FRAMES, PIXELS, DIM)
    contexts = [
        CrossContext(torch.randn(BATCH, 4, TOKEN_DIM), torch.randn(BATCH, 2, TOKEN_DIM), cache)
        for cache in (ContextCache(), ContextCache(), ContextCache())
    ]
    expected = [ours(hidden, CrossContext(one.text, one.image)) for one in contexts]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for step in range(2):  # keys and values are made, then kept
        assert torch.equal(compiled(hidden, contexts[0]), expected[0]), step
    with torch.compiler.set_stance("fail_on_recompile"):  # another expert, another video
        for context, out in zip(contexts[1:], expected[1:], strict=True):
            for _ in range(2):
                assert torch.equal(compiled(hidden, context), out)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
