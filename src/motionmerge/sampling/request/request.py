"""A request for videos: its model and its weights, and checks that its arguments fit together.

The command line fills in a `VideoRequest`, and this file decides what it means.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.paths import exists, path_of
from motionmerge.merging.inputs.coverage import Missing
from motionmerge.merging.inputs.resolvers import resolve, split_name
from motionmerge.merging.inputs.sources import module_folders, names_in
from motionmerge.merging.lora.detection import is_lora, lora_matrices
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.request.experts import (
    ExpertChoice,
    WeightedLora,
    from_base,
    from_loras,
    from_recipe,
    from_weights,
)
from motionmerge.sampling.request.folder import find_pipeline, weight_files
from motionmerge.sampling.request.loading import check_device, default_device, dtype_named
from motionmerge.sampling.request.model import FolderModel, ModelChoice, ShippedModel
from motionmerge.switching.rehearsal import lacking_tensors

POCKET = "pocket"
"""The name of the model that ships with the package, and of the recipe that it has by default."""


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """The model and the weights that make videos, as a user writes them.

    Attributes:
        model: A diffusers folder, a hub id such as `owner/name`, or `pocket`.
        variant: Which of the model's weight files to take, e.g. `fp16`.
        legacy: Whether the model's .bin files are read as well.
        dtype: fp32, fp16 or bf16; by default bf16 on a GPU and fp32 on a CPU.
        device: The torch device to compute on; by default a GPU if there is one.
        recipe: A recipe, its file, or the name of a shipped one.
        parameters: Other values of the recipe's parameters.
        inputs: Paths or names that replace the recipe's inputs.
        loras: LoRAs in place of a recipe; `motion` sets the weight of each that has none.
        base: What the model was fine-tuned from, for `motion`.
        motion: How much motion to add: the recipe's parameter `motion`.
        weights: One set of weights in place of experts: a file, or a shipped variant of pocket.
        boundary: Noise level at which the second of two experts takes over.
        missing: See `ExpertChoice`.
    """

    model: str = POCKET
    variant: str | None = None
    legacy: bool = False
    dtype: str | None = None
    device: str | None = None
    recipe: Recipe | str | Path | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    loras: Sequence[WeightedLora | str | Path] = ()
    base: str | Path | None = None
    motion: float | None = None
    weights: str | Path | None = None
    boundary: float | None = None
    missing: Missing = "error"

    def check(self) -> None:
        """Refuse arguments that exclude each other, without reading a file.

        Raises:
            ConfigError: Names the arguments.
        """
        is_pocket = self.model == POCKET
        for name in ("dtype", "device", "variant", "base"):
            if is_pocket and getattr(self, name) is not None:
                raise ConfigError(f"`{name}=` is not for the pocket model.", fix="Leave it out.")
        if self.motion is not None and not math.isfinite(self.motion):
            raise ConfigError(
                f"`motion=` is {self.motion}, which is no number.", fix="Write e.g. 0.5."
            )
        if self.weights is not None:
            self._check_weights_alone(self.weights)
        if self.loras and (self.recipe is not None or self.base is not None):
            raise ConfigError(
                "`loras=` goes alone or with `motion=`.", fix="Write the LoRA into a recipe."
            )
        if self.base is not None and self.recipe is not None:
            raise ConfigError(
                "`base=` is not for recipes, which name their inputs.",
                fix="Pass `inputs={'base': FILE}`.",
            )
        if self.base is not None and self.motion is None:
            raise ConfigError(
                "`base=` is for `motion=`.", fix="Say how much: `motion=`, e.g. 0.25."
            )
        if self.motion is not None and "motion" in self.parameters:
            raise ConfigError("The parameter `motion` is given twice.", fix="Give it once.")
        if self.parameters and self.recipe is None and (self.loras or not is_pocket):
            raise ConfigError(
                "`parameters=` changes a recipe's parameters, and there is no recipe.",
                fix="Name it with `recipe=`, or use `motion=`.",
            )
        if self.inputs and self.recipe is None:
            raise ConfigError("`inputs=` replaces a recipe's input.", fix="Name the `recipe=`.")

    def _check_weights_alone(self, weights: str | Path) -> None:
        for name in ("recipe", "motion", "parameters", "loras"):
            if getattr(self, name) not in (None, {}, (), []):
                raise ConfigError(
                    f"`weights=` is one set of weights, and `{name}=` is for recipes.",
                    fix=f"Leave `weights=` or `{name}=` out.",
                )
        if self.boundary is not None:
            raise ConfigError("`boundary=` needs experts, not `weights=`.", fix="Leave it out.")

    def open_model(self, *, cluster_device: str | None = None) -> ModelChoice:
        """Find the model; nothing is loaded yet.

        Args:
            cluster_device: The device of a cluster's machines, used if `device` is None;
                None if the model runs on this machine.

        Raises:
            ConfigError: As `check`, or there is no such device or dtype.
            CheckpointError: There is no such model.
        """
        self.check()
        if self.model == POCKET:
            weights = str(self.weights or "base")
            return ShippedModel(str(resolve(weights)) if split_name(weights) else weights)
        device = self.device or cluster_device
        try:
            where = default_device() if device is None else torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"There is no device `{device}`.", fix="Use cpu or cuda.") from error
        if cluster_device is None:
            check_device(where)
        return FolderModel(
            folder=find_pipeline(self.model, variant=self.variant, legacy=self.legacy),
            dtype=None if self.dtype is None else dtype_named(self.dtype),
            device=where,
            variant=self.variant,
            legacy=self.legacy,
        )

    def open_experts(self, model: ModelChoice) -> ExpertChoice:
        """Find the weights that denoise, and check that they fit a model; none is loaded yet.

        Args:
            model: What `open_model` returned.

        Raises:
            MotionMergeError: As `check` and `ExpertChoice.check`.
        """
        self.check()
        choice = replace(self._choice(model), missing=self.missing)
        if self.recipe is None:
            _check_kinds(choice)
        choice.check_knobs(model)
        own = choice
        if isinstance(model, ShippedModel) and self.weights is not None:
            own = from_weights(model.weights_file)
            _check_kinds(own)
        modules = {} if own.recipe is None else model.empty_modules()
        if own is not choice:
            own.check(modules)
        choice.check({} if choice.recipe is None else modules)
        if self.weights is not None and own.bound is not None:
            self._check_whole(lacking_tensors(own.bound, modules), modules)
        return choice

    def _check_whole(
        self, lacking: Mapping[str, Sequence[str]], modules: Mapping[str, nn.Module]
    ) -> None:
        """Refuse weights that have only some tensors of a module, or warn of them."""
        for name, absent in lacking.items():
            if not absent:
                continue
            total = len(modules[name].state_dict())
            message = (
                f"{self.weights} has {total - len(absent)} of the {total} tensors of `{name}`; "
                f"e.g. `{absent[0]}` is not in it"
            )
            if self.missing == "error":
                raise CheckpointError(
                    f"{message}.",
                    fix="Give the whole weights, or pass `missing='keep'`, which leaves the "
                    "model's own tensors there.",
                )
            warnings.warn(f"{message}: the model's own stays there.", stacklevel=2)

    def _choice(self, model: ModelChoice) -> ExpertChoice:
        boundary = self.boundary
        knob = {} if self.motion is None else {"motion": self.motion}
        parameters = {**self.parameters, **knob}
        if self.recipe is not None:
            return from_recipe(
                self.recipe, inputs=self.inputs, parameters=parameters, boundary=boundary
            )
        if self.loras:
            return from_loras(self.weighted_loras(), boundary=boundary)
        if model.path is None and self.weights is None:
            return from_recipe(POCKET, parameters=parameters, boundary=boundary)
        if model.path is not None and self.motion is not None:
            return from_base(
                self._found_base(model.path), model.path, motion=self.motion, boundary=boundary
            )
        if model.path is not None and self.weights is not None:
            return from_weights(self.weights)
        return ExpertChoice(boundary=boundary)

    def weighted_loras(self) -> list[WeightedLora]:
        """Return the LoRAs with weights: by default 1, or with `motion` -motion, then 1.

        Raises:
            ConfigError: There is a `motion` and no LoRA for it to turn, or a LoRA is given twice.
        """
        are_weighted = [isinstance(one, WeightedLora) for one in self.loras]
        if self.motion is not None and are_weighted and all(are_weighted):
            raise ConfigError(
                "`motion=` turns LoRAs without a weight of their own, and every one has one.",
                fix="Leave `motion=` out, or give a LoRA without a weight, which is then -motion "
                "while noisy and 1 for the details.",
            )
        noisy = 1.0 if self.motion is None else 0.0 - self.motion
        found: dict[str, WeightedLora] = {}
        for one in self.loras:
            lora = one if isinstance(one, WeightedLora) else WeightedLora(one, noisy, 1.0)
            file = str(lora.file)
            key = file if file.startswith("hub:") else str(path_of(file).absolute())
            if key in found:
                raise ConfigError(
                    f"The LoRA {file} is given twice.",
                    fix="Give it once, with the weight that you want.",
                )
            found[key] = lora
        return list(found.values())

    def _found_base(self, model: Path) -> str | Path:
        """Return the path of the weights that the model was fine-tuned from."""
        if self.base is None:
            raise ConfigError(
                "`motion=` extrapolates away from the weights that the model was fine-tuned from, "
                "and they are not known.",
                fix="Add `base=`, a folder or a file, or a LoRA with `loras=`.",
            )
        self._refuse_two_sets(model)
        is_input = exists(path_of(self.base)) or split_name(str(self.base)) is not None
        return self.base if is_input else find_pipeline(self.base).path

    def _refuse_two_sets(self, model: Path) -> None:
        """Refuse a variant beside plain weights, because a recipe would read the plain ones."""
        for folder in module_folders(model) if self.variant else ():
            plain = weight_files(folder)
            if plain and plain != weight_files(folder, variant=self.variant):
                raise ConfigError(
                    f"{folder} has plain weights beside the variant {self.variant}, and `motion=` "
                    "with `base=` would extrapolate those.",
                    fix=f"Leave `variant=` out, or copy the model without {plain[0].name}.",
                )


def _check_kinds(choice: ExpertChoice) -> None:
    """Refuse a LoRA that was given as whole weights, and the reverse."""
    for name, origin in choice.origins.items():
        if isinstance(origin, Path):
            _check_kind(origin, expects_lora=name.startswith("lora_"))


def _check_kind(path: Path, *, expects_lora: bool) -> None:
    names = names_in(path)
    looks_like_one = is_lora(names)
    if expects_lora and not looks_like_one:
        example = f"; it has e.g. `{names[0]}`" if names else ""
        raise CheckpointError(
            f"{path} is not a LoRA: none of its tensors is a LoRA matrix or a difference{example}.",
            fix="Pass whole weights as `weights=`, or as `base=` with `motion=`.",
        )
    if looks_like_one and not expects_lora:
        example = (lora_matrices(names) or names)[0]
        raise CheckpointError(
            f"{path} is a LoRA, not the weights of a model: it has e.g. `{example}`.",
            fix="Pass it in `loras=`.",
        )
