"""The frozen encoders: OpenCLIP ViT-H/14 as transformers models, its preprocessing and tokenizer.

DynamiCrafter reads the prompt from the last but one layer of the text tower (then the final layer
norm), and the image from all tokens of the vision tower, before `ln_post`. Official:
`lvdm/modules/encoders/condition.py` (`FrozenOpenCLIPEmbedder`, `FrozenOpenCLIPImageEmbedderV2`).
"""

from __future__ import annotations

import gzip
import html
import json
from collections.abc import Sequence
from pathlib import Path

import ftfy
import torch
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from motionmerge.errors import DataError, ShapeError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_SIZE = 49408

Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]  # word -> number, byte-pair merges

_TOKENIZER_FIX = (
    "give the `tokenizer` folder of a Stable Diffusion or CLIP model (vocab.json and merges.txt), "
    "or bpe_simple_vocab_16e6.txt.gz of the open_clip package."
)


def text_encoder_config(
    *,
    width: int = 1024,
    layers: int = 23,
    heads: int = 16,
    mlp_width: int | None = None,
    vocab_size: int = VOCABULARY_SIZE,
    num_tokens: int = 77,
) -> CLIPTextConfig:
    """Configure a `CLIPTextModel` whose `last_hidden_state` is what the U-Net reads.

    Args:
        width: Width of the tokens.
        layers: Layers to run: one less than OpenCLIP has (23 of 24), as the last one is not used.
        heads: Attention heads.
        mlp_width: Hidden width of the feed-forward layers; by default `4 * width`.
        vocab_size, num_tokens: Shape of the embeddings. The first and the last word of OpenCLIP's
            vocabulary mark padding and the end of the prompt.
    """
    return CLIPTextConfig(
        architectures=["CLIPTextModel"],
        hidden_size=width,
        intermediate_size=mlp_width or 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=num_tokens,
        vocab_size=vocab_size,
        hidden_act="gelu",
        pad_token_id=0,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
    )


def image_encoder_config(
    *,
    width: int = 1280,
    layers: int = 32,
    heads: int = 16,
    mlp_width: int | None = None,
    image_size: int = 224,
    patch_size: int = 14,
) -> CLIPVisionConfig:
    """Configure a `CLIPVisionModel` whose `last_hidden_state` is what the image projector reads.

    Args:
        width: Width of the tokens.
        layers: All layers of the tower.
        heads: Attention heads.
        mlp_width: Hidden width of the feed-forward layers; by default `4 * width`.
        image_size, patch_size: Pixels; there are `(image_size / patch_size)^2 + 1` tokens.
    """
    return CLIPVisionConfig(
        architectures=["CLIPVisionModel"],
        hidden_size=width,
        intermediate_size=mlp_width or 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
        hidden_act="gelu",
    )


def preprocess_clip_image(image: torch.Tensor, *, size: int = 224) -> torch.Tensor:
    """Resize and normalise an image as the official code does before the vision tower.

        y = bicubic(blur(image)),   sigma = max(0, (in / out - 1) / 2) pixels on each axis
        out = ((y + 1) / 2 - mean) / std

    The whole image is squeezed into the square; corners stay corners (`align_corners`).

    Args:
        image: `[batch, 3, height, width]` in [-1, 1].
        size: Pixels on each side of the result.

    Returns:
        `[batch, 3, size, size]`, of about unit variance.

    Raises:
        ShapeError: the image does not have four dimensions or not three channels.

    Source: `kornia.geometry.resize(..., antialias=True)`, version 0.7.3.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ShapeError(
            f"The image has shape {list(image.shape)}, expected [batch, 3, height, width].",
            fix="Stack RGB images into one batch with values in [-1, 1].",
        )
    for axis in (-1, -2):
        image = _blur_for_shrinking(image, axis=axis, factor=image.shape[axis] / size)
    image = F.interpolate(image, size=(size, size), mode="bicubic", align_corners=True)
    mean, std = (image.new_tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return ((image + 1) / 2 - mean) / std


def _blur_for_shrinking(image: torch.Tensor, *, axis: int, factor: float) -> torch.Tensor:
    """Blur along one axis by a Gaussian cut off at about two sigma; reflect at the border."""
    if factor <= 1:
        return image
    sigma = (factor - 1) / 2
    radius = max(int(4 * sigma), 3) // 2  # an even window is widened by one
    offsets = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, 1, -1)
    if axis == -2:
        kernel = kernel.transpose(-1, -2)
        padding = (0, 0, radius, radius)
    else:
        padding = (radius, radius, 0, 0)
    return F.conv2d(F.pad(image, padding, mode="reflect"), kernel, groups=image.shape[1])


def load_tokenizer(path: str | Path) -> CLIPTokenizer:
    """Build the tokenizer of OpenCLIP from files that the user has.

    All CLIP models share one vocabulary. Encode prompts with `tokenize_prompts`, which pads as
    OpenCLIP does.

    Args:
        path: A folder with `tokenizer.json`, or `vocab.json` and `merges.txt` (the tokenizer folder
            of any CLIP or Stable Diffusion model); or the file `bpe_simple_vocab_16e6.txt.gz` that
            comes with the `open_clip` and `clip` packages.

    Raises:
        DataError: nothing of this kind is there, or it cannot be read.
    """
    try:
        vocabulary, merges = _read_vocabulary(Path(path))
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(
            f"The CLIP tokenizer in {path} cannot be read: {error}", fix=_TOKENIZER_FIX
        ) from error
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def tokenize_prompts(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """Encode prompts as OpenCLIP does: text repaired and cut to fit, padded with token 0.

    Token 0 also stands for "!" inside a word, so it cannot be the tokenizer's own padding token.

    Returns:
        Token numbers, int64 `[batch, tokenizer.model_max_length]`.
    """
    cleaned = [html.unescape(html.unescape(ftfy.fix_text(prompt))).strip() for prompt in prompts]
    tokens = tokenizer(cleaned, padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids * tokens.attention_mask


def _read_vocabulary(path: Path) -> Vocabulary:
    if path.is_file() and path.name.endswith(".txt.gz"):
        return _read_byte_pairs(path)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _read_vocab_and_merges(path)
    if (path / "tokenizer.json").is_file():
        return _read_tokenizer_json(path)
    raise DataError(f"{path} holds no CLIP tokenizer.", fix=_TOKENIZER_FIX)


def _read_vocab_and_merges(folder: Path) -> Vocabulary:
    words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    return words, [_pair(line) for line in lines if line and not line.startswith("#version")]


def _read_tokenizer_json(folder: Path) -> Vocabulary:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    return model["vocab"], [_pair(merge) for merge in model["merges"]]


def _read_byte_pairs(path: Path) -> Vocabulary:
    """Read OpenCLIP's file: 256 bytes, the same ending a word, merges, two special tokens."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()[1 : VOCABULARY_SIZE - 2 - 512 + 1]
    merges = [_pair(line) for line in lines]
    symbols = _byte_symbols()
    words = symbols + [f"{symbol}</w>" for symbol in symbols]
    words += [left + right for left, right in merges] + [START_TOKEN, END_TOKEN]
    return {word: index for index, word in enumerate(words)}, merges


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split() if isinstance(merge, str) else merge
    return left, right


def _byte_symbols() -> list[str]:
    """List a printable character for each byte, printable bytes first, as the vocabulary does."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    num_hidden = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(num_hidden)]
