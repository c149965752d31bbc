"""Names of Cosmos 1.0 and of Cosmos 2 and 2.5.

Source: diffusers 0.42, `convert_cosmos_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from collections.abc import Mapping

from motionmerge.merging.names.rules import Names

_FIRST = "blocks.block{}.blocks"
_OURS = "transformer_blocks.{}"

COSMOS: Mapping[str, str] = {
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "affline_norm": "time_embed.norm",
    **{
        f"{_FIRST}.{part}.block.attn.{theirs}": f"{_OURS}.attn{part + 1}.{ours}"
        for part in (0, 1)
        for theirs, ours in {
            "to_q.0": "to_q",
            "to_q.1": "norm_q",
            "to_k.0": "to_k",
            "to_k.1": "norm_k",
            "to_v.0": "to_v",
            "to_out.0": "to_out.0",
        }.items()
    },
    f"{_FIRST}.2.block.layer1": f"{_OURS}.ff.net.0.proj",
    f"{_FIRST}.2.block.layer2": f"{_OURS}.ff.net.2",
    **{
        f"{_FIRST}.{part}.adaLN_modulation.{layer}": f"{_OURS}.norm{part + 1}.linear_{layer}"
        for part in (0, 1, 2)
        for layer in (1, 2)
    },
    "x_embedder.proj.1": "patch_embed.proj",
    **{
        f"extra_pos_embedder.pos_emb_{axis}": f"learnable_pos_embed.pos_emb_{axis}"
        for axis in "thw"
    },
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.adaLN_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}

_MODULATED = {"self_attn": "norm1", "cross_attn": "norm2", "mlp": "norm3"}

COSMOS_2: Mapping[str, str] = {
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    **{
        f"blocks.{{}}.{attention}.{theirs}": f"{_OURS}.{our_attention}.{ours}"
        for attention, our_attention in {"self_attn": "attn1", "cross_attn": "attn2"}.items()
        for theirs, ours in {
            "q_proj": "to_q",
            "k_proj": "to_k",
            "v_proj": "to_v",
            "output_proj": "to_out.0",
            "q_norm": "norm_q",
            "k_norm": "norm_k",
        }.items()
    },
    **{
        f"blocks.{{}}.cross_attn.{layer}": f"{_OURS}.attn2.{layer}"
        for layer in ("q_img", "k_img", "v_img", "q_img_norm", "k_img_norm")
    },
    "blocks.{}.mlp.layer1": f"{_OURS}.ff.net.0.proj",
    "blocks.{}.mlp.layer2": f"{_OURS}.ff.net.2",
    **{
        f"blocks.{{}}.adaln_modulation_{part}.{layer}": f"{_OURS}.{ours}.linear_{layer}"
        for part, ours in _MODULATED.items()
        for layer in (1, 2)
    },
    "x_embedder.proj.1": "patch_embed.proj",
    "crossattn_proj.0": "crossattn_proj.0",
    "img_context_proj.0": "img_context_proj.0",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}

COSMOS_STYLE = Names(
    family="cosmos",
    style="original Cosmos 1.0",
    table=COSMOS,
    computed=(r"^logvar\.", r"^pos_embedder\."),
)
COSMOS_2_STYLE = Names(
    family="cosmos",
    style="original Cosmos 2",
    table=COSMOS_2,
    computed=(r"^accum_", r"^pos_embedder\.", r"_extra_state$"),
)
