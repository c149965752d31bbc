"""Folders that lack some tensors are refused: what is made up at random is no model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from motionmerge.errors import CheckpointError
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.merging.inputs.sources import MODULES
from motionmerge.sampling.request.folder import find_pipeline
from motionmerge.sampling.request.loading import _DTYPE, _load_part, empty_modules, load_pipeline

from ..tiny.dynamicrafter import tiny_tokenizer
from ..tiny.folders import family_named, save_dynamicrafter
from ..tiny.pipelines import EVERY_FAMILY, tiny


def remove_tensor(folder: Path, part: str, name: str) -> str:
    """Take the first tensor whose name ends so out of a part's file; give its name."""
    (file,) = (folder / part).glob("*.safetensors")
    with open_weights(file) as reader:
        tensors = {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118
        metadata = reader.metadata
    removed = next(key for key in tensors if key.endswith(name))
    del tensors[removed]
    save_weights(file, tensors, metadata)
    return removed


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("vae", "decoder.conv_out.weight"),
        ("text_encoder", "layer_norm.weight"),
        ("image_encoder", "self_attn.q_proj.weight"),
        ("transformer", "attn1.to_q.weight"),
        ("transformer", "attn1.norm_q.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named(own_wan: Path, part: str, tensor: str) -> None:
    remove_tensor(own_wan, part, tensor)
    with pytest.raises(CheckpointError, match=rf"`{part}`.*lacks 1 of its tensors.*{tensor}"):
        load_pipeline(find_pipeline(own_wan))


@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_unet_that_is_loaded_later_is_looked_at_as_well(tmp_path: Path, is_ahead: bool) -> None:
    save_dynamicrafter(tmp_path)
    remove_tensor(tmp_path, "unet", "conv_in.weight")
    encode = (lambda _: None) if is_ahead else None
    with pytest.raises(CheckpointError, match=r"`unet`.*lacks 1 of its tensors.*conv_in.weight"):
        load_pipeline(find_pipeline(tmp_path), encode=encode)


WHOLE = [
    family.name
    for family in EVERY_FAMILY
    if "modular" not in family.name and family.name not in ("Cosmos 2", "MiniMax-H3")
]
"""Not the modular ones, which have a file of their own, and not Cosmos, whose guardrail is none."""


@pytest.mark.parametrize("name", WHOLE)
def test_every_part_of_all_families_is_loaded_whole(name: str, tmp_path: Path) -> None:
    saved = tiny(family_named(name))
    if "tokenizer" in saved.components and saved.tokenizer is None:  # the text tower is left out
        saved.register_modules(tokenizer=tiny_tokenizer())
    saved.save_pretrained(tmp_path)
    folder = find_pipeline(tmp_path)
    parts = {n: m for n, m in saved.components.items() if isinstance(m, torch.nn.Module)}
    assert parts.keys() == folder.weights.keys()
    empty = empty_modules(folder)
    assert [*empty] == [name for name in MODULES if name in parts]  # names are the first one's
    for part, module in parts.items():
        loaded = _load_part(folder, part, None, {_DTYPE: torch.bfloat16, "use_safetensors": True})
        assert type(loaded) is type(module) and not loaded.training
        expected = module.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        for key, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected[key].to(tensor.dtype))
        assert torch.bfloat16 in {tensor.dtype for tensor in loaded.parameters()}
        if part in empty:
            assert all(tensor.is_meta for tensor in empty[part].parameters())
            shapes = {key: tensor.shape for key, tensor in empty[part].state_dict().items()}
            assert shapes == {key: tensor.shape for key, tensor in expected.items()}


def test_loading_warns_of_nothing(stored_wan: Path, recwarn: pytest.WarningsRecorder) -> None:
    pipeline = load_pipeline(find_pipeline(stored_wan), dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    assert not [one for one in recwarn if "dtype" in str(one.message)]
