"""A stand-in for the text encoder, which no tiny file can be: random embeddings of the text."""

import zlib

import nodes
import torch


class TextStandIn:
    """What Load CLIP returns, for CLIP Text Encode."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        return [[torch.randn(1, 5, 4096, generator=generator), {}]]


def load_clip(self, clip_name, type, device="default"):
    return (TextStandIn(),)


def use_it():
    """Let Load CLIP return it, whatever file is asked for."""
    nodes.CLIPLoader.load_clip = load_clip
