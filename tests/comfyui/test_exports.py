"""ComfyUI loads every tensor of what `export` and `merge` write, under the names that it expects.

Models have the sizes of the released ones, two blocks, and no memory (torch's `meta` device):
ComfyUI tells models by sizes.
"""

from __future__ import annotations

import types

import comfy.model_detection
import comfy.sd
import diffusers as d
import pytest
import torch
from safetensors.torch import save_file

from motionmerge.exports.comfyui_limits import limits_of
from motionmerge.exports.loras import export_loras
from motionmerge.exports.names import family_of_parts, naming, nothing, parts_of_model
from motionmerge.merging.merge import merge
from motionmerge.merging.recipes.recipe import Recipe

from ..comfyui_pack.load import load_pack
from ..tiny.denoisers import state_of
from . import tiny

UNLOADED = ("unet missing", "unet unexpected", "left over keys")

TWO = {"num_layers": 2}
WAN = {**TWO, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
WAN_IMAGE = {**WAN, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
COG = {
    **TWO,
    "num_attention_heads": 48,
    "in_channels": 32,
    "use_rotary_positional_embeddings": True,
}
COSMOS = {"in_channels": 17, "num_attention_heads": 16, "attention_head_dim": 128}
KANDINSKY = {
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "visual_cond": True,
    "in_text_dim": 3584,
    "in_text_dim2": 768,
    "num_visual_blocks": 2,
}

MODELS = {
    "wan 2.1 i2v": ("chronoedit", lambda: d.WanTransformer3DModel(**WAN_IMAGE)),
    "wan 2.1 two images": ("wan", lambda: d.WanTransformer3DModel(
        **WAN_IMAGE, pos_embed_seq_len=514)),
    "wan 2.1 t2v": ("wan text", lambda: d.WanTransformer3DModel(**WAN)),
    "wan 2.2 i2v": ("wan text", lambda: d.WanTransformer3DModel(**WAN, in_channels=36)),
    "wan 2.2 5b": ("wan text", lambda: d.WanTransformer3DModel(
        **{**WAN, "num_attention_heads": 24, "ffn_dim": 14336}, in_channels=48, out_channels=48)),
    "vace": ("vace", lambda: d.WanVACETransformer3DModel(
        **WAN, vace_layers=[0, 1], vace_in_channels=96)),
    "animate": ("animate", lambda: d.WanAnimateTransformer3DModel(
        num_layers=5, image_dim=1280, added_kv_proj_dim=5120)),
    "skyreels v2": ("chronoedit", lambda: d.SkyReelsV2Transformer3DModel(**WAN_IMAGE)),
    "chronoedit": ("chronoedit", lambda: d.ChronoEditTransformer3DModel(**WAN_IMAGE)),
    "hunyuan": ("hunyuan-video", lambda: d.HunyuanVideoTransformer3DModel(
        **TWO, num_single_layers=2)),
    "hunyuan 1.5": ("hunyuan-video-1.5", lambda: d.HunyuanVideo15Transformer3DModel(
        **TWO, use_meanflow=True)),
    "ltx 0.9": ("ltx", lambda: d.LTXVideoTransformer3DModel(**TWO)),
    "ltx 13b": ("ltx", lambda: d.LTXVideoTransformer3DModel(
        **TWO, num_attention_heads=32, attention_head_dim=128, cross_attention_dim=4096)),
    "ltx-2": ("ltx-2", lambda: d.LTX2VideoTransformer3DModel(**TWO)),
    "cosmos": ("cosmos", lambda: d.CosmosTransformer3DModel(in_channels=17)),
    "cosmos 2": (None, lambda: d.CosmosTransformer3DModel(
        **TWO, **COSMOS, extra_pos_embed_type=None)),
    "cosmos 2.5": (None, lambda: d.CosmosTransformer3DModel(
        **TWO, **COSMOS, extra_pos_embed_type=None, use_crossattn_projection=True,
        crossattn_proj_in_channels=100352, encoder_hidden_states_channels=1024)),
    "cogvideox": ("cogvideox", lambda: d.CogVideoXTransformer3DModel(
        **COG, use_learned_positional_embeddings=True, ofs_embed_dim=512)),
    "cogvideox 1.5": (None, lambda: d.CogVideoXTransformer3DModel(
        **COG, patch_size_t=2, patch_bias=False, ofs_embed_dim=512, sample_height=300,
        sample_width=300, sample_frames=81)),
    "kandinsky 5 lite": ("kandinsky-5", lambda: d.Kandinsky5Transformer3DModel(
        **KANDINSKY, model_dim=1792, ff_dim=7168, time_dim=512, axes_dims=(16, 24, 24))),
    "kandinsky 5 pro": ("kandinsky-5", lambda: d.Kandinsky5Transformer3DModel(
        **KANDINSKY, model_dim=4096, ff_dim=16384, time_dim=1024, axes_dims=(32, 48, 48))),
}  # fmt: skip
"""The kind of our tiny denoiser that has the same layers, if there is one, and the model."""

COMPUTED = (".kernel",)
"""Endings of buffers that ComfyUI computes itself."""


def named_for_comfyui(shapes):
    """Return tensors without values as `export comfyui` names them, and what it says of them."""
    parts = parts_of_model({name: tuple(shape) for name, shape in shapes.items()})
    (layout,) = (naming("single_file", nothing)(part) for part in parts)
    state = {
        name: torch.empty(tensor.shape, device="meta", dtype=torch.bfloat16)
        for name, tensor in layout.items()
    }
    return state, limits_of(family_of_parts(parts), state, {"config"})


def in_comfyui(state):
    """Return ComfyUI's model of a file, and the names that are absent and left over."""
    config = comfy.model_detection.model_config_from_unet(dict(state), "")
    assert config is not None, "ComfyUI does not recognise the model"
    config.set_inference_dtype(torch.bfloat16, None)
    with torch.device("meta"):
        model = config.get_model(dict(state), "")
    renamed = config.process_unet_state_dict(dict(state))
    missing, unexpected = model.diffusion_model.load_state_dict(renamed, strict=False, assign=True)
    return model, [name for name in missing if not name.endswith(COMPUTED)], unexpected


def is_known(kind):
    """Skip the kinds that ComfyUI did not have in 2025."""
    if not kind.startswith(("wan", "vace", "animate", "hunyuan", "ltx 0.9")):
        return hasattr(comfy.model_base, "CogVideoX")
    return "1.5" not in kind or hasattr(comfy.model_base, "HunyuanVideo15")


@pytest.mark.parametrize("kind", MODELS)
def test_a_file_is_loaded_to_the_last_tensor_or_said_not_to_be(kind, tmp_path):
    if not is_known(kind):
        pytest.skip("this ComfyUI is too old for the model")
    like, build = MODELS[kind]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
    state, limits = named_for_comfyui(shapes)
    model, missing, unexpected = in_comfyui(state)
    is_whole = not missing and not unexpected
    assert is_whole != any("absent" in line or "leaves out" in line for line in limits)
    if like is not None:
        with torch.inference_mode(False):
            every_key_of_a_lora_is_known(model, like, tmp_path)
    # ComfyUI's own names are read, and come back.
    own = {name: tensor.shape for name, tensor in model.diffusion_model.state_dict().items()}
    again, limits = named_for_comfyui({f"model.diffusion_model.{n}": s for n, s in own.items()})
    assert in_comfyui(again)[1:] == ([], [])
    assert not any("absent" in line or "leaves out" in line for line in limits)


def test_a_file_of_minimax_h3_needs_what_folders_do_not_have():
    if not is_known("minimax h3"):
        pytest.skip("this ComfyUI is too old for the model")
    with torch.device("meta"):
        network = d.MiniMaxH3Transformer3DModel(num_layers=2)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    state, limits = named_for_comfyui(shapes)
    assert "`rope.inv_freq`" in limits[0]
    with pytest.raises(KeyError, match=r"rope\.inv_freq"):
        in_comfyui(state)
    whole, limits = named_for_comfyui({name: t.shape for name, t in state.items()} | {
        "rope.inv_freq": (16,)})  # fmt: skip
    assert not limits and in_comfyui(whole)[1:] == ([], [])


def every_key_of_a_lora_is_known(model, like, folder):
    base = state_of(like)
    recipe = Recipe.parse("inputs: {base: a, tuned: b}\nexperts: {more: base + 2 * (tuned - base)}")
    inputs = {"base": base, "tuned": {name: value + 0.1 for name, value in base.items()}}
    export_loras(recipe, folder, rank=2, target="comfyui", inputs=inputs)
    lora = comfy.utils.load_torch_file(str(folder / "more.safetensors"))
    values, unused = load_pack().task_vectors.matched(types.SimpleNamespace(model=model), lora)
    if not hasattr(comfy.model_base, "CogVideoX"):  # what was `scale` until February 2026
        unused = [key for key in unused if not key.endswith(("query_norm.diff", "key_norm.diff"))]
    assert unused == [] and values


@pytest.mark.parametrize("front", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_merge_of_files_of_comfyui_is_one_of_them(family, front, tmp_path, caplog):
    caplog.set_level("INFO")
    states = [tiny.state_dict(family, seed) for seed in (0, 1)]
    for name, state in zip(("base", "tuned"), states, strict=True):
        save_file(
            {front + n: t.clone() for n, t in state.items()}, tmp_path / f"{name}.safetensors"
        )
    recipe = Recipe.parse(
        f"inputs: {{base: {tmp_path}/base.safetensors, tuned: {tmp_path}/tuned.safetensors}}\n"
        "experts: {more: base - 0.5 * (tuned - base)}"
    )
    merge(recipe, tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    model = comfy.sd.load_diffusion_model(str(path))
    assert not [line for line in caplog.messages if any(words in line for words in UNLOADED)]
    held = model.model.diffusion_model.state_dict()
    assert held.keys() == states[0].keys()
    for name, tensor in held.items():
        torch.testing.assert_close(tensor, 1.5 * states[0][name] - 0.5 * states[1][name])
