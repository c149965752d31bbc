"""A LoRA in the original names of any family lands as the layouts of whole models say it has to."""

from __future__ import annotations

import pytest
import torch

from motionmerge.errors import ShapeError
from motionmerge.io.weights import open_weights
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.inputs.resolvers import resolve
from motionmerge.merging.lora.task_vector import lora
from motionmerge.merging.names.layout import to_theirs
from motionmerge.models.dynamicrafter.conversion import COMPONENTS
from motionmerge.switching.lora_layers import read_lora

from ..tiny.denoisers import DENOISERS
from .test_original_names import EACH, STYLES_BY_NAME, made, shapes_of

SPELLINGS = {
    "dotted": ("diffusion_model.{}", "lora_A{}.weight", "lora_B{}.weight", "."),
    "flat": ("lora_unet_{}", "lora_down.weight", "lora_up.weight", "_"),
}
Products = dict[str, torch.Tensor]

NO_LAYERS = ("fps_embedding", "cond_type_embedding", "motion_encoder.")
"""Embeddings and layers of Wan Animate's own, which PEFT cannot adapt."""


def original_lora(original: Products, spelling: str, *, infix: str) -> tuple[Products, Products]:
    """Give a LoRA of every matrix of a model in original names, and what each has to gain."""
    generator = torch.Generator().manual_seed(0)
    front, down, up, dot = SPELLINGS[spelling]
    file, products = {}, {}
    for name, tensor in original.items():
        left_out = any(part in name for part in NO_LAYERS)
        if name.endswith(".weight") and tensor.ndim >= 2 and not left_out:
            path = front.format(name.removesuffix(".weight").replace(".", dot))
            first = torch.randn(2, *tensor.shape[1:], generator=generator)
            second = torch.randn(tensor.shape[0], 2, generator=generator)
            file[f"{path}.{down.format(infix)}"] = first
            ones = [1] * (tensor.ndim - 2)
            file[f"{path}.{up.format(infix)}"] = second.reshape(*second.shape, *ones)
            products[name] = (second @ first.flatten(1)).reshape(tensor.shape)
    return file, products


def signed(kind: str, file: Products, *, zeros: Products) -> Products:
    """Give what the layers of a signed LoRA add to each tensor."""
    with torch.device("meta"):
        model = DENOISERS[kind]()
    found = dict(zeros)
    for name, layer in (
        read_lora(file, {"denoiser": model}, name="style").layers["denoiser"].items()
    ):
        weight = f"{name}.weight"
        product = layer.up.flatten(1) @ layer.down.flatten(1) * (layer.alpha / layer.rank)
        found[weight] = product.reshape(zeros[weight].shape)
    return found


BY_HEAD = "dealt by head"  # DiffSynth-Studio, which writes dots
CASES = [
    (*each, spelling)
    for each in EACH
    for spelling in SPELLINGS
    if BY_HEAD not in each[0] or spelling == "dotted"
]


@pytest.mark.parametrize(("style", "kind", "spelling"), CASES)
def test_every_matrix_of_every_family_gets_its_rows(style: str, kind: str, spelling: str) -> None:
    with torch.device("meta"):
        shapes = shapes_of(DENOISERS[kind]().state_dict())
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    layout = to_theirs(shapes, STYLES_BY_NAME[style]).layout
    file, products = original_lora(
        made(layout, zeros), spelling, infix=".default" if BY_HEAD in style else ""
    )
    assert len(products) > 5
    dense = (Checkpoint.from_tensors(zeros, name="base") + lora(file, 1.0)).tensors()
    for added in (dense, signed(kind, file, zeros=zeros)):
        landed = made(layout, added)
        for name, product in products.items():
            torch.testing.assert_close(landed[name], product, atol=1e-5, rtol=1e-4)
        unchanged = landed.keys() - products.keys()
        assert not any(landed[name].any() for name in unchanged)


ORIGINALS = [each for each in EACH if BY_HEAD not in each[0]]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("style", "kind"), ORIGINALS)
def test_a_lora_in_diffusers_names_lands_in_an_original_file(
    style: str, kind: str, spelling: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = shapes_of(DENOISERS[kind]().state_dict())
    layout = to_theirs(shapes, STYLES_BY_NAME[style]).layout
    base = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    _, down, up, dot = SPELLINGS[spelling]
    front = {"dotted": "transformer.", "flat": "lora_unet_"}[spelling]
    file = {}
    for name, shape in shapes.items():
        layer, _, leaf = name.rpartition(".")
        path = front + layer.replace(".", dot)
        if leaf == "weight" and len(shape) == 2 and "fps_embedding" not in name:
            file[f"{path}.{down.format('')}"] = torch.randn(2, shape[1], generator=generator)
            file[f"{path}.{up.format('')}"] = torch.randn(shape[0], 2, generator=generator)
        elif leaf == "bias" and "act_fn" not in name:
            file[f"{path}.diff_b"] = torch.randn(shape, generator=generator)
    wanted = (Checkpoint.from_tensors(base, name="base") + lora(file, 1.0)).tensors()
    original = Checkpoint.from_tensors(made(layout, base), name="base")
    found = (original + lora(file, 1.0)).tensors()
    for name, value in made(layout, wanted).items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_a_layer_of_another_size_than_its_part_of_an_original_one_is_named() -> None:
    with torch.device("meta"):
        shapes = shapes_of(DENOISERS["hunyuan-video"]().state_dict())
    layout = to_theirs(shapes, STYLES_BY_NAME["original HunyuanVideo"]).layout
    base = made(layout, {name: torch.zeros(shape) for name, shape in shapes.items()})
    file = {
        "transformer.norm_out.linear.lora_A.weight": torch.ones(1, 20),
        "transformer.norm_out.linear.lora_B.weight": torch.ones(42, 1),
    }
    words = r"`transformer\.norm_out\.linear` of the LoRA has 42 rows; `norm_out.* has 40"
    with pytest.raises(ShapeError, match=words):
        (Checkpoint.from_tensors(base, name="base") + lora(file, 1.0)).tensors()


def test_the_modulation_of_an_original_cogvideox_is_cut_as_diffusers_cuts_it() -> None:
    """Its script takes shift, scale and gate of the video for both norms, and then of the text."""
    with torch.device("meta"):
        shapes = shapes_of(DENOISERS["cogvideox"]().state_dict())
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    norms = [f"transformer_blocks.1.norm{number}.linear.weight" for number in (1, 2)]
    rows, columns = zeros[norms[0]].shape
    up, down = torch.randn(2 * rows, 2), torch.randn(2, columns)
    path = "diffusion_model.mixins.adaln_layer.adaLN_modulations.1.1"
    file = {f"{path}.lora_B.weight": up, f"{path}.lora_A.weight": down}
    cut = (up @ down).chunk(12)
    expected = dict(zip(norms, (cut[0:3] + cut[6:9], cut[3:6] + cut[9:12]), strict=True))
    dense = (Checkpoint.from_tensors(zeros, name="base") + lora(file, 1.0)).tensors()
    for added in (dense, signed("cogvideox", file, zeros=zeros)):
        for name, parts in expected.items():
            torch.testing.assert_close(added[name], torch.cat(parts), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [".scale", ""])
def test_comfyuis_norms_of_hunyuan_gain_what_their_differences_say(scale: str) -> None:
    """ComfyUI adds `KEY.diff` to any parameter `KEY` that ends in no `.weight`."""
    with torch.device("meta"):
        shapes = shapes_of(DENOISERS["hunyuan-video"]().state_dict())
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    named = {
        "double_blocks.1.img_attn.norm.query_norm": "transformer_blocks.1.attn.norm_q",
        "double_blocks.0.txt_attn.norm.key_norm": "transformer_blocks.0.attn.norm_added_k",
        "single_blocks.0.norm.key_norm": "single_transformer_blocks.0.attn.norm_k",
    }
    file, expected = {}, {}
    for number, (theirs, ours) in enumerate(named.items(), start=1):
        expected[f"{ours}.weight"] = torch.full(shapes[f"{ours}.weight"], float(number))
        file[f"diffusion_model.{theirs}{scale}.diff"] = expected[f"{ours}.weight"]
    found = (Checkpoint.from_tensors(zeros, name="base") + lora(file, 1.0)).tensors()
    for name, value in (zeros | expected).items():
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_dynamicrafters_original_names_are_those_of_whole_checkpoints(spelling: str) -> None:
    with open_weights(resolve("pocket:tuned")) as reader:
        shapes = {name: reader.shape(name) for name in reader.keys()}  # noqa: SIM118
    front, down, up, dot = SPELLINGS[spelling]
    generator = torch.Generator().manual_seed(0)
    file: Products = {}
    expected: Products = {}
    for component in COMPONENTS:
        prefix = f"{component.name}."
        own = {k.removeprefix(prefix): s for k, s in shapes.items() if k.startswith(prefix)}
        for pair in component.our_map(own).pair_ours(own)[0] if own else ():
            rows, *columns = own[pair.ours[0]]
            if not pair.ours[0].endswith(".weight") or not columns:
                continue
            path = component.long_name(pair.official).removeprefix("model.")
            bare = path.removeprefix("diffusion_model.").removesuffix(".weight")
            path = bare if component.name != "unet" else front.format(bare.replace(".", dot))
            first = torch.randn(1, *columns, generator=generator)
            second = torch.randn(rows * len(pair.ours), 1, generator=generator)
            file |= {f"{path}.{down.format('')}": first, f"{path}.{up.format('')}": second}
            parts = (second @ first.flatten(1)).chunk(len(pair.ours))
            names = [f"{prefix}{name}" for name in pair.ours]
            expected |= {n: p.reshape(shapes[n]) for n, p in zip(names, parts, strict=True)}
    assert any(name.startswith("image_projector.") for name in expected)
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    merged = (Checkpoint.from_tensors(zeros, name="base") + lora(file, 1.0)).tensors()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected.get(name, zeros[name]))
