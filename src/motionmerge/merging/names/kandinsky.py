"""Names of Kandinsky 5, which diffusers took over from the original code.

These rest on a reading: the installed diffusers has no converter.
"""

from __future__ import annotations

from collections.abc import Mapping

from motionmerge.merging.names.rules import Names

_ATTENTION = ("to_query", "to_key", "to_value", "query_norm", "key_norm", "out_layer")
_BLOCKS = {
    "text_transformer_blocks": ("text_modulation", ("self_attention",)),
    "visual_transformer_blocks": ("visual_modulation", ("self_attention", "cross_attention")),
}
_NAMES = (
    *(
        f"{stem}.{{}}.{layer}"
        for stem, (modulation, attentions) in _BLOCKS.items()
        for layer in (
            f"{modulation}.out_layer",
            *(f"{attention}.{part}" for attention in attentions for part in _ATTENTION),
            "feed_forward.in_layer",
            "feed_forward.out_layer",
        )
    ),
    "time_embeddings.in_layer",
    "time_embeddings.out_layer",
    "text_embeddings.in_layer",
    "text_embeddings.norm",
    "pooled_text_embeddings.in_layer",
    "pooled_text_embeddings.norm",
    "visual_embeddings.in_layer",
    "out_layer.modulation.out_layer",
    "out_layer.out_layer",
)

KANDINSKY_5: Mapping[str, str] = {name: name for name in _NAMES}

KANDINSKY_5_STYLE = Names(family="kandinsky-5", style="original Kandinsky 5", table=KANDINSKY_5)
