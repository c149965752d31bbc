"""Fields of the page that follow each other: knobs, the recipe's text, the noise axis, notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from motionmerge.errors import MotionMergeError
from motionmerge.io.paths import is_folder, path_of
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.pocket.world import load_photo
from motionmerge.sampling.request.experts import from_recipe
from motionmerge.sampling.request.request import POCKET, VideoRequest
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.studio import fragments
from motionmerge.studio.fields import PHOTOS
from motionmerge.studio.recipe_text import RecipeText, shipped_text
from motionmerge.studio.values import whole_number
from motionmerge.studio.wishes import (
    ModelNote,
    is_of_pocket,
    missing_boundary,
    model_of,
    planned_steps,
)

QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that are answered at once."""

_LATEST = {**QUICK, "trigger_mode": "always_last"}
"""Of events that come faster than they are answered: the last one counts."""

_NOISY = ("noisy_guidance", "noisy_image", "noisy_attention")
_KNOBS = ("motion", "drop_rate", "boundary", *_NOISY, "group")
_FAULTS = ("wrong", "boundary_wrong", "noisy_wrong", "group_wrong")

_TWO = Recipe.of_loras({"dynamics": -1.0, "consistency": 1.0})
"""Stands for a LoRA or a base on the page, for the noise axis alone."""


def keep_in_step(page: gr.Blocks, fields: Mapping[str, Any]) -> None:
    """Connect the fields of the left column, both ways where both can be changed."""
    _connect_lists(fields)
    _connect_knobs(fields)
    _connect_recipe(fields)
    _connect_model(fields)
    drawn = [fields[name] for name in ("model", "base", "lora", "recipe", "boundary", "steps")]
    changes = [fields[name].change for name in ("recipe", "boundary", "steps")]
    changes += [*_left(fields, "model", "base", "lora"), page.load]
    gr.on(changes, draw_axis, drawn, fields["axis"], **_LATEST)


def _left(fields: Mapping[str, Any], *names: str) -> list[Any]:
    """Return the events of fields that are complete: somebody left them, or pressed Enter."""
    return [event for name in names for event in (fields[name].blur, fields[name].submit)]


def _connect_lists(fields: Mapping[str, Any]) -> None:
    """Connect the lists that write into other fields."""
    fields["bundled"].input(bundled_photo, fields["bundled"], fields["photo"], **QUICK)
    # Tab is an `input` too, Enter is a `change` alone, and the same one chosen again is a `select`
    # alone.
    ideas, shipped = fields["ideas"], fields["shipped"]
    chosen = [ideas.change, ideas.select]
    gr.on(chosen, lambda text: text or gr.skip(), ideas, fields["prompt"], **QUICK)
    chosen = [shipped.change, shipped.select]
    gr.on(chosen, open_shipped, shipped, _recipe_and_knobs(fields), **QUICK)


def _connect_knobs(fields: Mapping[str, Any]) -> None:
    """Connect the fields that write into the recipe, each with where its fault is shown."""
    for names, write, wrong in (
        (("motion", "drop_rate"), write_parameters, "wrong"),
        (("boundary",), write_boundary, "boundary_wrong"),
        (_NOISY, write_while_noisy, "noisy_wrong"),
        (("group",), write_group, "group_wrong"),
    ):
        own = [fields[name] for name in names]
        turned = [one.input for one in own]
        turned += [one.release for one in own if isinstance(one, gr.Slider)]
        given, changed = [fields["recipe"], *own], [fields["recipe"], fields[wrong]]
        gr.on(turned, write, given, changed, **_LATEST)


def _connect_recipe(fields: Mapping[str, Any]) -> None:
    """Connect the recipe's text and its files with the knobs."""
    recipe, *read = _recipe_and_knobs(fields)
    recipe.input(read_recipe, recipe, read, **_LATEST)
    fields["opened"].upload(open_file, fields["opened"], [recipe, *read], **QUICK)


def _recipe_and_knobs(fields: Mapping[str, Any]) -> list[Any]:
    return [fields[name] for name in ("recipe", *_KNOBS, *_FAULTS)]


def _connect_model(fields: Mapping[str, Any]) -> None:
    """Connect the model with what is said of it, and with the recipe."""
    model, recipe = fields["model"], fields["recipe"]
    named = _left(fields, "model")
    gr.on(named, recipe_for_model, [model, recipe], [recipe, fields["wrong"]], **_LATEST)
    gr.on(named, about_model, model, [fields["about"], fields["prompt"]], **_LATEST)


def bundled_photo(name: str | None) -> Any:
    """Return a photo of the list."""
    return load_photo(name) if name in PHOTOS else gr.skip()


def open_shipped(name: str) -> tuple[Any, ...]:
    """Return the text of a shipped recipe, and the knobs as it has them."""
    text = shipped_text(name)
    return text, *read_recipe(text)


def open_file(content: bytes) -> tuple[Any, ...]:
    """Return the recipe of a file, also a wrong one, and the knobs as it has them."""
    read = RecipeText.read_file(content)
    if read.is_empty:
        return gr.skip(), *_unread(read.fault)
    return read.text, *read_recipe(read.text)


def read_recipe(text: str | None) -> tuple[Any, ...]:
    """Return the knobs as the recipe has them, and why where it is wrong."""
    read = RecipeText.read(text)
    if read.recipe is None:
        return _unread("" if read.is_empty else read.fault)
    parameters = read.recipe.parameters
    knobs = (parameters.get("motion"), parameters.get("drop_rate"), read.boundary)
    found = (*knobs, *read.while_noisy, read.group)
    return *(gr.skip() if one is None else one for one in found), *[""] * len(_FAULTS)


def _unread(fault: str) -> tuple[Any, ...]:
    said = fragments.message(fault, kind="error")
    return *[gr.skip()] * len(_KNOBS), said, *[gr.skip()] * (len(_FAULTS) - 1)


def write_parameters(text: str | None, motion: float, drop_rate: float) -> tuple[Any, str]:
    """Write motion and drop rate into the recipe, where it has such parameters."""
    return _written(text, lambda read: read.with_parameters(motion=motion, drop_rate=drop_rate))


def write_boundary(text: str | None, boundary: float) -> tuple[Any, str]:
    """Write into the recipe where the second of two experts takes over."""
    return _written(text, lambda read: read.with_boundary(boundary))


def write_while_noisy(
    text: str | None, guidance: float | None, image: str | None, attention: str | None
) -> tuple[Any, str]:
    """Write what holds while it is noisy into the recipe."""
    return _written(
        text,
        lambda read: read.with_while_noisy(
            guidance=guidance or 0, image=image or "", attention=attention or ""
        ),
        needs_recipe=True,
    )


def write_group(text: str | None, group: str | None) -> tuple[Any, str]:
    """Restrict the differences of the recipe to a group."""
    chosen = (group or "").strip()
    return _written(text, lambda read: read.with_group(chosen), needs_recipe=True)


def _written(
    text: str | None, change: Callable[[RecipeText], RecipeText], *, needs_recipe: bool = False
) -> tuple[Any, str]:
    """Return the changed recipe, and why where that is impossible.

    Args:
        text: The recipe.
        change: Changes it.
        needs_recipe: Whether the change is lost where a LoRA or a base stands in place of a recipe.
    """
    read = RecipeText.read(text)
    if read.is_empty:
        fault = "This needs a recipe: choose one." if needs_recipe else ""
        return gr.skip(), fragments.message(fault, kind="error")
    changed = change(read)
    if changed.fault:
        return gr.skip(), fragments.message(changed.fault, kind="error")
    return (gr.skip() if changed.text == read.text else changed.text), ""


def about_model(model: str) -> tuple[str, Any]:
    """Explain what a model takes, and what its prompts are."""
    try:
        note = ModelNote.about(model)
    except MotionMergeError as error:
        return fragments.fault(error), gr.skip()
    return fragments.message(note.text), gr.update(info=note.prompt)


def recipe_for_model(model: str, text: str | None) -> tuple[Any, Any]:
    """Empty the recipe where another model is named; restore that of the pocket model."""
    read, is_pocket = RecipeText.read(text), model_of(model) == POCKET
    if is_pocket and read.is_empty:
        return shipped_text(POCKET), ""
    if not is_pocket and read.recipe is not None and is_of_pocket(read.recipe):
        return "", ""
    return gr.skip(), gr.skip()


def draw_axis(
    model: str, base: str, lora: str, text: str | None, boundary: float, steps: float | None
) -> str:
    """Draw the noise axis for the recipe on the page and the model's own scheduler."""
    name, read = model_of(model), RecipeText.read(text)
    if name != POCKET and not is_folder(path_of(name)):
        return ""  # a hub's model may have to be downloaded first
    if read.is_empty:
        has_other = bool(lora.strip() or base.strip())
        if name != POCKET and not has_other:
            return ""
        own = _TWO.print() if has_other else shipped_text(POCKET)
        read = RecipeText.read(own).with_boundary(boundary)
    if read.recipe is None:
        return ""
    try:
        settings = VideoSettings(num_inference_steps=whole_number(steps, "steps") or None)
        # The choice alone: whether its weights fit is looked at when a video is made.
        choice = from_recipe(read.recipe, boundary=missing_boundary(read.recipe, boundary))
        opened = VideoRequest(model=name).open_model()
        choice.check_knobs(opened)
        plan = planned_steps(opened, choice, settings)
        cut = choice.boundary if read.boundary is None else read.boundary
        return "" if plan is None else fragments.axis(plan, boundary=cut)
    except MotionMergeError as error:
        return fragments.fault(error)
