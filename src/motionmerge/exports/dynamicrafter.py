"""Experts of DynamiCrafter under its official names: as LoRAs, and as whole official files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from motionmerge.errors import CheckpointError
from motionmerge.exports.files import Opener
from motionmerge.exports.names import ModelPart, diffusion_model, naming
from motionmerge.io.safetensors_file import TensorSpec
from motionmerge.io.torch_file import torch_file
from motionmerge.io.weights import open_weights
from motionmerge.io.weights_writer import weights_file
from motionmerge.merging.compute.plan import Sink
from motionmerge.merging.inputs.pieces import Piece, Pieced, PieceLayout, whole
from motionmerge.models.dynamicrafter.checkpoint_folder import UNUSED_FILE, official_tensors
from motionmerge.models.dynamicrafter.conversion import COMPONENTS
from motionmerge.tensors import bytes_of

_BY_NAME = {component.name: component for component in COMPONENTS}


def lora_names(part: ModelPart) -> PieceLayout:
    """Return the names of a LoRA: official ones of DynamiCrafter, else those of ComfyUI."""
    if not _is_dynamicrafter(part):
        return naming("comfyui", diffusion_model)(part)
    return {name.removeprefix("model."): tensor for name, tensor in official_names(part).items()}


def official_names(part: ModelPart) -> PieceLayout:
    """Return a module's tensors under their names in an official checkpoint.

    Raises:
        CheckpointError: One of them has none.
    """
    component = _BY_NAME[part.module or "unet"]
    if any(name.startswith("init_attn.") for name in part.shapes):
        return {
            component.long_name(name): whole(full, part.shapes[name])
            for name, full in part.names.items()
        }
    pairs, unknown = component.our_map(part.shapes).pair_ours(part.shapes)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors have no official name, e.g. `{unknown[0]}`.",
            fix="Give weights of DynamiCrafter, unchanged in their structure.",
        )
    layout = {}
    for pair in pairs:
        shapes = [part.shapes[name] for name in pair.ours]
        pieces = tuple(
            Piece(name, 0, math.prod(shape)) for name, shape in zip(pair.ours, shapes, strict=True)
        )
        rows = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()
        shape = (*rows, *[1] * pair.unit_dims)
        layout[component.long_name(pair.official)] = Pieced(shape, pieces)
    return part.of_model(layout)


def official_file(folder: Path) -> Opener:
    """Return what grows an official file whose other parts are those of a converted folder.

    Args:
        folder: As `motionmerge convert` wrote it.
    """

    @contextmanager
    def opened(
        path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
    ) -> Iterator[Sink]:
        with official_tensors(folder) as held:
            _check_components(specs, held, folder)
            everything: dict[str, TensorSpec] = {
                name: specs.get(name, (tensor.dtype, tensor.shape)) for name, tensor in held.items()
            }
            grown = (
                torch_file(path, everything)
                if path.suffix == ".ckpt"
                else weights_file(path, everything, metadata=metadata)
            )
            with grown as writer:
                for name in held.keys() - specs.keys():
                    writer.write_at(name, 0, bytes_of(held[name].read()).data)
                yield writer

    return opened


def _is_dynamicrafter(part: ModelPart) -> bool:
    return part.module == "image_projector" or not part.is_in_diffusers


def _check_components(
    specs: Mapping[str, TensorSpec], held: Mapping[str, object], folder: Path
) -> None:
    """Check that an expert gives all tensors of a component, or none.

    Raises:
        CheckpointError: It gives others than the folder has.
    """
    unused: set[str] = set()
    if (folder / UNUSED_FILE).is_file():
        with open_weights(folder / UNUSED_FILE) as reader:
            unused = set(reader.keys())
    for component in COMPONENTS:
        given, wanted = (
            {name for name in names if component.short_name(name) is not None}
            for names in (specs.keys(), held.keys() - unused)
        )
        if given and given != wanted:
            example = min(given ^ wanted)
            raise CheckpointError(
                f"The recipe does not give the tensors of {folder / component.name}, e.g. "
                f"`{example}`.",
                fix="Give the folder that the recipe's checkpoints belong to.",
            )
