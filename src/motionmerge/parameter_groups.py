"""Model families: which parameters of an image-to-video denoiser are temporal, spatial, an adapter.

Pure data, on the ground floor so that merging, models and sampling share one source. Names as in
the classes of diffusers 0.42, and as the original files have them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

GROUPS: tuple[str, ...] = (
    "temporal",
    "spatial",
    "joint",
    "cross_attention",
    "adapter",
    "image_projector",
    "residual",
    "embeddings",
    "audio",
)
"""Every parameter group, in the order of reports.

`joint` is attention and feed-forward over space and time at once, as in all diffusion transformers;
they have no `temporal` and no `spatial` group. `residual` is the way from input to output outside
attention; `embeddings` are those of time, text and frame rate; `audio` is what makes sound.
"""

OTHER = "other"
"""What reports call the tensors of no group."""


@dataclass(frozen=True)
class Family:
    """A family of denoisers with the same parameter names.

    Attributes:
        name: What we call it.
        denoiser: Its class, in diffusers unless it is ours.
        patterns: Per group, a regular expression for the beginning of a tensor's name behind the
            module's prefix (`unet.`). The first that fits decides, so the groups do not overlap.
    """

    name: str
    denoiser: str
    patterns: tuple[tuple[str, str], ...]


_ROOT = r"(?:(?:unet|transformer|transformer_2|model\.diffusion_model|diffusion_model)\.)?"


@lru_cache
def _joined(patterns: tuple[tuple[str, str], ...]) -> re.Pattern[str]:
    """Join patterns into one, in which an alternative's number stands in its name.

    A report asks for the groups of thousands of names, and 20 families know 100 patterns: one
    search takes a quarter of the time of many.
    """
    alternatives = (f"(?P<_{number}>{pattern})" for number, (_, pattern) in enumerate(patterns))
    return re.compile(f"{_ROOT}(?:{'|'.join(alternatives)})", re.DOTALL)


def _first_group(patterns: tuple[tuple[str, str], ...], name: str) -> str | None:
    found = _joined(patterns).match(name)
    if found is None or found.lastgroup is None:
        return None
    return patterns[int(found.lastgroup[1:])][0]


def _anywhere(*patterns: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Make patterns fit anywhere in a name, not only at its beginning."""
    return tuple((group, f".*(?:{pattern})") for group, pattern in patterns)


_UNET_BLOCK = r"(?:down_blocks|mid_block|up_blocks)\."
_UNET_TEMPORAL = (
    _UNET_BLOCK + r".*\b(temporal_transformer_blocks|time_pos_embed|time_mixer|temporal_res_block"
    r"|temp_convs|temp_attentions|conv3ds|tempo_attns)\."
)
_UNET_ADAPTER = rf"temporal_adapter\.|(?:{_UNET_BLOCK}|transformer_in\.).*\bfusion\."
_LAYER = r"transformer_blocks\.\d+\."
_OUR_STAGE = r"\b(?:down|mid|up)_stages\."
_OFFICIAL_STAGE = r"\b(?:input_blocks|middle_block|output_blocks)\."

DYNAMICRAFTER = Family(
    "dynamicrafter",
    "DynamiCrafterUNet",
    _anywhere(
        # Frozen towers of an official file whose names would look spatial below.
        (OTHER, r"^(first_stage_model|cond_stage_model|embedder)\."),
        ("image_projector", r"^(image_projector|image_proj_model)\."),
        ("adapter", r"\bfusion\.|\btemporal_adapter\.|\bcc_projection\.|^qformer\.|^queries$"),
        (
            "temporal",
            r"\btemporal_(in|attention|conv)\.|\binit_attn\.|\btemopral_conv\."
            r"|\b(input|output)_blocks\.\d+\.2\.(norm|proj_in|proj_out|transformer_blocks)\b"
            r"|\bmiddle_block\.2\.",
        ),
        ("cross_attention", rf"({_OUR_STAGE}|{_OFFICIAL_STAGE}).*\battn2\."),
        (
            "spatial",
            rf"{_OUR_STAGE}.*\battention\."
            rf"|{_OFFICIAL_STAGE}.*(\btransformer_blocks\.|\.1\.(norm|proj_in|proj_out)\.)"
            r"|\bmiddle_block\.1\.",
        ),
        ("embeddings", r"\b(time|fps)_embed(ding)?\."),
        (
            "residual",
            r"\bresnet\.|\b(down|up)samplers\.|\bconv_(in|out)\.|\bnorm_out\."
            r"|\b(in_layers|out_layers|emb_layers|skip_connection)\.|\bop\.|\bdiffusion_model\.out\."
            r"|\binput_blocks\.0\.0\.|\boutput_blocks\.\d+\.\d\.conv\.",
        ),
    ),
)
"""DynamiCrafter and the pocket model, in our names and in official ones."""

SVD = Family(
    "svd",
    "UNetSpatioTemporalConditionModel",
    (
        ("adapter", _UNET_ADAPTER),
        ("temporal", _UNET_TEMPORAL),
        ("cross_attention", _UNET_BLOCK + r".*\.attn2\."),
        ("spatial", _UNET_BLOCK + r".*\battentions\."),
        ("residual", f"{_UNET_BLOCK}|conv_(in|norm_out|out)\\."),
        ("embeddings", r"(time|add)_embedding\."),
    ),
)

I2VGEN_XL = Family(
    "i2vgen-xl",
    "I2VGenXLUNet",
    (
        ("adapter", _UNET_ADAPTER),
        (
            "temporal",
            rf"(transformer_in|image_latents_temporal_encoder)\.|{_UNET_TEMPORAL}",
        ),
        ("image_projector", r"image_latents_(proj_in|context_embedding)\."),
        ("cross_attention", _UNET_BLOCK + r".*\.attn2\."),
        ("spatial", _UNET_BLOCK + r".*\battentions\."),
        ("residual", f"{_UNET_BLOCK}|conv_(in|norm_out|out)\\."),
        ("embeddings", r"(time|fps|context)_embedding\."),
    ),
)

CONSISTI2V = Family(
    "consisti2v",
    "ConsistI2VUNet",
    (
        ("temporal", _UNET_TEMPORAL),
        ("cross_attention", _UNET_BLOCK + r".*\.attn2\."),
        ("spatial", _UNET_BLOCK + r".*\battentions\."),
        ("residual", f"{_UNET_BLOCK}|conv_(in|norm_out|out)\\."),
        ("embeddings", r"(time|frame_stride)_embedding\."),
    ),
)

COGVIDEOX = Family(
    "cogvideox",
    "CogVideoXTransformer3DModel",
    (
        ("joint", rf"{_LAYER}(norm1|attn1|norm2|ff)\."),
        ("embeddings", r"(patch_embed\.(text_proj|pos_embedding)|(time|ofs)_embedding[._])"),
        ("residual", r"(patch_embed\.proj|norm_final|norm_out|proj_out)\."),
        # The names of the original code and of ComfyUI.
        ("joint", r"(layers\.\d+\.|mixins\.adaln_layer\.)"),
        (
            "joint",
            r"\bblocks\.\d+\.(norm[12]\.(linear|norm)|[qkv]|norm_[qk]|attn_out|ff_(proj|out))\.",
        ),
        (
            "embeddings",
            r"(mixins\.(patch_embed\.text_proj|pos_embed)|(time|ofs)_embed)\.",
        ),
        ("residual", r"(mixins\.(patch_embed\.proj|final_layer)|final_layernorm)\."),
    ),
)

_WAN_PATTERNS = (
    ("image_projector", r"(condition_embedder\.image_embedder|img_emb)\."),
    ("embeddings", r"(condition_embedder|(text|time)_embedding|time_projection)\."),
    ("cross_attention", r"blocks\.\d+\.(block\.)?(attn2|cross_attn|norm2|norm3)\."),
    ("joint", r"blocks\.\d+\."),
    ("residual", r"((patch_embedding|proj_out|head)\.|scale_shift_table$)"),
)
WAN = Family("wan", "WanTransformer3DModel", _WAN_PATTERNS)
CHRONOEDIT = Family("chronoedit", "ChronoEditTransformer3DModel", _WAN_PATTERNS)
_WAN_LIKE_PATTERNS = (
    *_WAN_PATTERNS,
    ("residual", r"(far_patch_embedding|patch_(short|mid|long)|norm_out)\."),
)
ANYFLOW = Family("anyflow", "AnyFlowFARTransformer3DModel", _WAN_LIKE_PATTERNS)
HELIOS = Family("helios", "HeliosTransformer3DModel", _WAN_LIKE_PATTERNS)
SKYREELS_V2 = Family(
    "skyreels-v2",
    "SkyReelsV2Transformer3DModel",
    (("embeddings", r"fps_(embedding|projection)\."), *_WAN_PATTERNS),
)

_LTX_PATTERNS = (
    ("cross_attention", rf"{_LAYER}attn2\."),
    ("joint", rf"{_LAYER}(attn1\.|ff\.|\w*scale_shift_table$)"),
    (
        "embeddings",
        r"(time_embed|caption_projection|prompt_adaln|(prompt_)?adaln_single)\.",
    ),
    ("residual", r"((proj_in|proj_out|patchify_proj)\.|scale_shift_table$)"),
)
LTX = Family("ltx", "LTXVideoTransformer3DModel", _LTX_PATTERNS)
LTX_2 = Family(
    "ltx-2",
    "LTX2VideoTransformer3DModel",
    (
        ("audio", rf"(audio_|av_cross_attn_|av_ca_|{_LAYER}\w*(audio_|video_to_audio|a2v))"),
        *_LTX_PATTERNS,
    ),
)

_OUR_HUNYUAN_PATTERNS = (
    (
        "cross_attention",
        rf"{_LAYER}(attn\.(add_|to_add_out|norm_added)|ff_context\.|norm1_context\.)",
    ),
    ("joint", rf"({_LAYER}(norm1|attn|ff)\.|single_{_LAYER})"),
    ("image_projector", r"image_embedder\."),
    ("embeddings", r"(context_embedder(_2)?|time_text_embed|time_embed|cond_type_embed)\."),
    ("residual", r"(x_embedder|norm_out|proj_out)\."),
)
_HUNYUAN_PATTERNS = (
    *_OUR_HUNYUAN_PATTERNS,
    # The original code's names: two streams in the double blocks, of the video and of the text.
    ("cross_attention", r"double_blocks\.\d+\.txt_"),
    ("joint", r"(double_blocks\.\d+\.img_|single_blocks\.\d+\.)"),
    ("image_projector", r"vision_in\."),
    (
        "embeddings",
        r"((txt|time|time_r|guidance|vector|byt5)_in\.|cond_type_embedding\.)",
    ),
    ("residual", r"(img_in\.|final_layer\.(linear|adaLN_modulation)\.)"),
)
HUNYUAN_VIDEO = Family("hunyuan-video", "HunyuanVideoTransformer3DModel", _HUNYUAN_PATTERNS)
HUNYUAN_VIDEO_15 = Family(
    "hunyuan-video-1.5", "HunyuanVideo15Transformer3DModel", _HUNYUAN_PATTERNS
)

FRAMEPACK = Family(
    "framepack",
    "HunyuanVideoFramepackTransformer3DModel",
    (
        *_HUNYUAN_PATTERNS,
        ("image_projector", r"image_projection\."),
        ("residual", r"clean_x_embedder\."),
    ),
)
MOTIF = Family(
    "motif",
    "MotifVideoTransformer3DModel",
    (
        *_HUNYUAN_PATTERNS,
        ("cross_attention", rf"(single_)?{_LAYER}cross_attn"),
    ),
)
SANA_VIDEO = Family(
    "sana-video",
    "SanaVideoTransformer3DModel",
    (
        *_LTX_PATTERNS,
        ("embeddings", r"caption_norm\."),
        ("residual", r"patch_embedding\."),
    ),
)
COSMOS_2 = Family(
    "cosmos-2",
    "CosmosTransformer3DModel",
    (
        ("cross_attention", rf"{_LAYER}attn2\."),
        ("joint", rf"{_LAYER}(norm1|attn1|norm2|norm3|ff)\."),
        ("embeddings", r"(time_embed|learnable_pos_embed|crossattn_proj)\."),
        ("residual", r"(patch_embed\.proj|norm_out|proj_out)\."),
        # The original code's names, of Cosmos 2 and 1.0.
        ("cross_attention", r"blocks\.block\d+\.blocks\.1\.block\.attn\."),
        ("joint", r"blocks\.block\d+\."),
        ("embeddings", r"(extra_pos_embedder|t_embedder|t_embedding_norm|affline_norm)\."),
        ("residual", r"final_layer\.adaln_modulation\."),
    ),
)
MINIMAX_H3 = Family(
    "minimax-h3",
    "MiniMaxH3Transformer3DModel",
    (
        ("audio", r"(audio_|final_layer\.audio_out\.)"),
        ("joint", rf"{_LAYER}(norm1|attn|norm2|ff|adaln_proj)\."),
        (
            "embeddings",
            r"(context_embedder|time_embedder|token_refiner|condition_proj)\.",
        ),
        (
            "residual",
            r"(proj_in|norm_out|proj_out|video_patch_proj"
            r"|final_layer\.(norm|adaln_proj|video_out))\.",
        ),
    ),
)

KANDINSKY_6 = Family(
    "kandinsky-6",
    "Kandinsky6Transformer3DModel",
    (
        ("audio", r"(audio_|visual_transformer_blocks\.\d+\.(audio_|av_))"),
        ("cross_attention", r"visual_transformer_blocks\.\d+\.video_dec_block\.cross"),
        ("joint", r"visual_transformer_blocks\.\d+\.(video_dec_block|va_)"),
        (
            "embeddings",
            r"(video_((pooled_)?text|time)_|visual_token_type_embeddings)",
        ),
        ("residual", r"(visual_embeddings|out_layer)\."),
    ),
)

KANDINSKY_5 = Family(
    "kandinsky-5",
    "Kandinsky5Transformer3DModel",
    (
        ("cross_attention", r"visual_transformer_blocks\.\d+\.cross_attention\."),
        ("joint", r"visual_transformer_blocks\."),
        ("embeddings", r"((time|text|pooled_text)_embeddings|text_transformer_blocks)\."),
        ("residual", r"(visual_embeddings|out_layer)\."),
    ),
)

FAMILIES: tuple[Family, ...] = (
    SVD,
    I2VGEN_XL,
    CONSISTI2V,
    LTX_2,
    LTX,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    COGVIDEOX,
    SKYREELS_V2,
    WAN,
    KANDINSKY_6,
    KANDINSKY_5,
    ANYFLOW,
    HELIOS,
    CHRONOEDIT,
    FRAMEPACK,
    MOTIF,
    SANA_VIDEO,
    COSMOS_2,
    MINIMAX_H3,
    DYNAMICRAFTER,
)
"""In the order in which `group_of` asks them: the more particular names first."""


_EVERY_PATTERN = tuple(dict.fromkeys(pattern for family in FAMILIES for pattern in family.patterns))


@lru_cache(maxsize=1 << 16)
def group_of(name: str) -> str:
    """Name the group of a tensor in the first family that knows it, else `other`.

    Args:
        name: A tensor's name in its denoiser, with or without the module's prefix (`unet.`).
    """
    return _first_group(_EVERY_PATTERN, name) or OTHER
