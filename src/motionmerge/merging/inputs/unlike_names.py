"""Why checkpoints have no tensor name in common, in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from motionmerge.errors import CheckpointError
from motionmerge.merging.inputs.pieces import Shapes
from motionmerge.merging.inputs.renamed import readings
from motionmerge.merging.names.original import family_of_names
from motionmerge.merging.names.wrappers import bare_names


def nothing_matched(held: Mapping[str, Shapes], *, loras: Collection[str]) -> CheckpointError:
    """Return the error for checkpoints without a common name.

    Args:
        held: Names and shapes of each checkpoint's tensors, by what it is called; of a LoRA what
            fits nothing.
        loras: Which of them are LoRAs.
    """
    found = {name: readings(shapes)[0].denoisers for name, shapes in held.items()}
    pair = next((name for name, denoisers in found.items() if len(denoisers) > 1), None)
    alone = next((name for name, denoisers in found.items() if not denoisers), None)
    if pair is not None and alone is not None and _family(held[pair]) == _family(held[alone]):
        first, second = found[pair][:2]
        return CheckpointError(
            f"`{alone}` is one denoiser, and `{pair}` has two, {first} and {second}.",
            fix=f"Say which is meant: give `{pair}` the folder of one, e.g. .../{second}.",
        )
    listed = ", ".join(_described(name, shapes) for name, shapes in held.items())
    families = {_family(shapes) for shapes in held.values()}
    fix = "Use checkpoints of one layout (`motionmerge convert` changes DynamiCrafter's)."
    if None not in families:
        fix = "Use checkpoints of one model."
    if loras:
        fix = (
            "Use a LoRA for this model: `motionmerge show LORA --base MODEL` lists which layers of "
            "the model it has."
        )
    return CheckpointError(f"The inputs have no tensor name in common: {listed}.", fix=fix)


def _described(name: str, shapes: Shapes) -> str:
    example = f"e.g. `{next(iter(shapes), '(no tensors)')}`"
    family = _family(shapes)
    if family is None:
        return f"`{name}` has {example}"
    return f"`{name}` has names of {family}, {example}"


def _family(shapes: Shapes) -> str | None:
    """Return the family of one denoiser, or of the first of several."""
    split = bare_names(shapes).values()
    first = next(iter(split), ("", ""))[0]
    return family_of_names(name for module, name in split if module == first)
