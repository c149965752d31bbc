"""The studio's page: what stands where, and what happens when somebody turns or presses it."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from motionmerge.errors import MotionMergeError
from motionmerge.evaluation.runs import UNFORESEEN
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.pocket.world import load_photo
from motionmerge.sampling.request.experts import from_recipe
from motionmerge.sampling.request.request import POCKET, VideoRequest
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.studio import fragments
from motionmerge.studio.fields import COMPARED, PHOTOS, left_column
from motionmerge.studio.making import Maker
from motionmerge.studio.turns import Stopped
from motionmerge.studio.values import THIS_RECIPE, PageValues, whole_number
from motionmerge.studio.wishes import (
    MOST_COMPARED,
    ModelNote,
    RecipeText,
    Wish,
    is_of_pocket,
    is_pocket,
    planned_steps,
    shipped_text,
)
from motionmerge.studio.works import Exported, Work, Works

_TWO = Recipe.of_loras({"dynamics": -1.0, "consistency": 1.0})
"""The experts of a LoRA or a base on the page, for the noise axis alone."""

_PLACES = re.compile(r"(?:/[\w.@+-]+)+/(?=[\w.@+-])")
"""Folders in an error's text; the names of files stay."""


@dataclass
class Studio:
    """What all tabs share, and what each is doing.

    Args:
        maker: Makes one work at a time.
        stops: Set to stop what a tab is making or waits for, by the tab's name.
    """

    maker: Maker
    stops: dict[str, list[threading.Event]] = field(default_factory=dict)

    @property
    def works(self) -> Works:
        """What was made."""
        return self.maker.works

    def run(self, wish: Wish, tab: str) -> Iterator[tuple[str, Work | Exported | None]]:
        """Make a wish in a thread, and yield what the page says meanwhile; at last the work."""
        told: queue.Queue[tuple[str, float] | Work | Exported | BaseException] = queue.Queue()
        stop = threading.Event()
        self.stops.setdefault(tab, []).append(stop)
        make = self.maker.export if wish.kind == "export" else self.maker.make

        def work() -> None:
            try:
                told.put(make(wish, tell=lambda *said: told.put(said), stop=stop))
            except (Stopped, MotionMergeError, *UNFORESEEN) as error:
                told.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                said = told.get()
                if isinstance(said, (Work, Exported)):
                    yield "", said
                    return
                if isinstance(said, BaseException):
                    yield fault(said), None
                    return
                yield fragments.progress(*said), None
        finally:  # also if the tab was closed
            stop.set()
            thread.join()
            self.stops[tab].remove(stop)
            if not self.stops[tab]:
                del self.stops[tab]

    def stop(self, tab: str) -> bool:
        """Stop what a tab is making after its current step; return whether it makes something."""
        for stop in self.stops.get(tab, ()):
            stop.set()
        return tab in self.stops


def fault(error: BaseException) -> str:
    """Return what went wrong, without folders of this machine and without a traceback."""
    if isinstance(error, Stopped):
        return fragments.message("Stopped. Nothing was kept.")
    if isinstance(error, MotionMergeError):
        text = str(error)
    else:
        text = f"Something failed that should not: {type(error).__name__}: {error}"
    return fragments.message(_PLACES.sub("", text), kind="error")


def build_page(studio: Studio) -> gr.Blocks:
    """Lay the page out, and say what happens."""
    with gr.Blocks(
        title="motionmerge studio", analytics_enabled=False, delete_cache=(3600, 86_400)
    ) as page:
        gr.Markdown("# motionmerge studio\nA photo, a prompt, and a knob for motion.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                inputs, parts = left_column()
            with gr.Column(scale=3, min_width=320):
                _right_column(page, studio, inputs, parts)
    return page


def _right_column(
    page: gr.Blocks, studio: Studio, inputs: list[Any], parts: Mapping[str, Any]
) -> None:
    """Add the tabs, and what their buttons do."""
    with gr.Tabs():
        with gr.Tab("Motion"):
            generate = gr.Button("Generate", variant="primary", elem_id="generate")
        with gr.Tab("Compare"):
            names = [THIS_RECIPE, *COMPARED]
            chosen = gr.CheckboxGroup(
                names, value=["pocket", "calm"], label=f"Up to {MOST_COMPARED} recipes"
            )
            compare = gr.Button("Compare", variant="primary", elem_id="compare")
        with gr.Tab("Sweep"):
            with gr.Row():
                low = gr.Number(-1, label="Motion from", min_width=80)
                high = gr.Number(1, label="to", min_width=80)
                count = gr.Number(5, label="values", precision=0, min_width=80)
            sweep = gr.Button("Sweep", variant="primary", elem_id="sweep")
        with gr.Tab("History"):
            past = gr.HTML(elem_id="history")
        with gr.Tab("ComfyUI"):
            gr.Markdown(
                "Write the recipe or the LoRA on this page as LoRA files that ComfyUI loads, with "
                "what to type there. For Wan, LTX and HunyuanVideo; not for the pocket model."
            )
            export = gr.Button("Write files", variant="primary", elem_id="export")
    stop = gr.Button("Stop", variant="stop", elem_id="stop", visible="hidden")
    said = gr.HTML(elem_id="said")
    result = gr.HTML(elem_id="result")
    buttons: list[tuple[str, gr.Button, list[Any]]] = [
        ("motion", generate, []),
        ("compare", compare, [chosen]),
        ("sweep", sweep, [low, high, count]),
        ("export", export, []),
    ]
    for kind, button, more in buttons:
        button.click(
            _maker_of(studio, kind, len(inputs)),
            inputs=[*inputs, *more],
            outputs=[said, result, past, stop],
            concurrency_limit=None,  # the maker has a line of its own, which can be left
            show_progress="hidden",
            api_visibility="private",
        )
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    stop.click(_stopper(studio), None, [said], **quick)
    page.load(lambda: fragments.history(studio.works.history()), None, [past], **quick)
    page.unload(_leaver(studio))
    _wire_inputs(page, parts, quick)


def _maker_of(studio: Studio, kind: str, num_given: int) -> Any:
    """Return what a button does: yield progress, then the videos."""

    def make(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        tab, shown = _tab(request), gr.update(visible=True)
        try:
            given = PageValues(
                **dict(zip(PageValues.__dataclass_fields__, values[:num_given], strict=True))
            )
            wish = given.of_kind(kind, values[num_given:])
        except MotionMergeError as error:
            yield fault(error), gr.skip(), gr.skip(), gr.skip()
            return
        yield fragments.progress("Starting", 0.0), gr.skip(), gr.skip(), shown
        for text, work in studio.run(wish, tab):
            is_over = work is not None or "<progress" not in text
            is_last = is_over and len(studio.stops[tab]) == 1  # the tab makes nothing else
            hidden = gr.update(visible="hidden") if is_last else gr.skip()
            if work is None:
                yield text, gr.skip(), gr.skip(), hidden
            elif isinstance(work, Exported):
                yield text, fragments.exported(work), gr.skip(), hidden
            else:
                past = fragments.history(studio.works.history())
                yield text, fragments.shown_work(work, studio.works), past, hidden

    return make


def _tab(request: gr.Request) -> str:
    return str(request.session_hash)


def _stopper(studio: Studio) -> Any:
    def stop(request: gr.Request) -> Any:
        is_making = studio.stop(_tab(request))
        return fragments.progress("Stopping after this step", 0.0) if is_making else gr.skip()

    return stop


def _leaver(studio: Studio) -> Any:
    def leave(request: gr.Request) -> None:
        studio.stop(_tab(request))

    return leave


def _wire_inputs(page: gr.Blocks, parts: Mapping[str, Any], quick: dict[str, Any]) -> None:
    """Keep knobs, recipe and noise axis in step with each other, both ways."""
    knobs = [parts["recipe"], parts["motion"], parts["drop_rate"]]
    parts["bundled"].input(_bundled, parts["bundled"], parts["photo"], **quick)
    # Lists that write into other fields: Tab is an `input` too, Enter is a `change` alone, and the
    # same one chosen again is a `select` alone.
    for event in (parts["ideas"].change, parts["ideas"].select):
        event(lambda text: text or gr.skip(), parts["ideas"], parts["prompt"], **quick)
    turned = [parts["motion"].release, parts["drop_rate"].release, parts["motion"].input]
    for event in turned:
        event(
            _turned, knobs, [parts["recipe"], parts["wrong"]], **quick, trigger_mode="always_last"
        )
    noisy = [parts[name] for name in ("noisy_guidance", "noisy_image", "noisy_attention")]
    for part in noisy:
        part.input(
            _noisy,
            [parts["recipe"], *noisy],
            [parts["recipe"], parts["noisy_wrong"]],
            **quick,
            trigger_mode="always_last",
        )
    parts["group"].input(
        _grouped,
        [parts["recipe"], parts["group"]],
        [parts["recipe"], parts["group_wrong"]],
        **quick,
        trigger_mode="always_last",
    )
    read = [parts[name] for name in ("motion", "drop_rate", "boundary")]
    read += [*noisy, parts["group"]]
    read += [parts[name] for name in ("wrong", "noisy_wrong", "group_wrong")]
    parts["recipe"].input(_written, parts["recipe"], read, **quick, trigger_mode="always_last")
    recipe = [parts["recipe"], *read]
    parts["opened"].upload(_opened, parts["opened"], recipe, **quick)
    for event in (parts["model"].blur, parts["model"].submit):
        event(
            _emptied, [parts["model"], parts["recipe"]], [parts["recipe"], parts["wrong"]], **quick
        )
        event(_about, parts["model"], [parts["about"], parts["prompt"]], **quick)
    for event in (parts["shipped"].change, parts["shipped"].select):
        event(
            lambda name: (shipped_text(name), *_written(shipped_text(name))),
            parts["shipped"],
            recipe,
            **quick,
        )
    drawn = [parts[name] for name in ("model", "base", "lora", "recipe", "boundary", "steps")]
    for event in (
        parts["boundary"].change,
        parts["recipe"].change,
        parts["steps"].change,
        *(parts[name].blur for name in ("model", "base", "lora")),
        *(parts[name].submit for name in ("model", "base", "lora")),
        page.load,
    ):
        event(_axis, drawn, parts["axis"], **quick, trigger_mode="always_last")


def _bundled(name: str | None) -> Any:
    return load_photo(name) if name in PHOTOS else gr.skip()


def _opened(content: bytes) -> tuple[Any, ...]:
    """Show the recipe of a file, also a wrong one; the knobs are turned to what it says."""
    read = RecipeText.read_file(content)
    if not read.text:
        said = fragments.message(read.fault, kind="error")
        return *[gr.skip()] * 8, said, gr.skip(), gr.skip()
    return read.text, *_written(read.text)


def _about(model: str) -> tuple[str, Any]:
    """Explain what a model takes, and what its prompts are."""
    try:
        note = ModelNote.about(model)
    except MotionMergeError as error:
        return fault(error), gr.skip()
    return fragments.message(note.text), gr.update(info=note.prompt)


def _emptied(model: str, text: str) -> tuple[Any, Any]:
    """Empty the recipe where another model is named; restore that of the pocket model."""
    if is_pocket(model) and not text.strip():
        return shipped_text(POCKET), ""
    read = RecipeText.read(text)
    if not is_pocket(model) and read.recipe is not None and is_of_pocket(read.recipe):
        return "", ""
    return gr.skip(), gr.skip()


def _turned(text: str, motion: float, drop_rate: float) -> tuple[Any, str]:
    """Write the knobs into the recipe, where it has such parameters."""
    return _changed(
        text, RecipeText.read(text or "").with_knobs(motion=motion, drop_rate=drop_rate)
    )


def _noisy(text: str, guidance: float | None, image: str, attention: str) -> tuple[Any, str]:
    """Write what holds while it is noisy into the recipe."""
    if not (text or "").strip():
        return _needs_recipe()
    changed = RecipeText.read(text).with_while_noisy(
        guidance=guidance or 0, image=image or "", attention=attention or ""
    )
    return _changed(text, changed)


def _grouped(text: str, group: str | None) -> tuple[Any, str]:
    """Restrict the differences of the recipe to a group."""
    if not (text or "").strip():
        return _needs_recipe()
    return _changed(text, RecipeText.read(text).with_group((group or "").strip()))


def _needs_recipe() -> tuple[Any, str]:
    return gr.skip(), fragments.message("This needs a recipe: choose one.", kind="error")


def _changed(text: str, read: RecipeText) -> tuple[Any, str]:
    if read.fault:
        return gr.skip(), fragments.message(read.fault, kind="error")
    return (gr.skip() if read.text == text else read.text), ""


def _written(text: str) -> tuple[Any, ...]:
    """Turn the knobs to what the recipe says; a wrong one shows its place."""
    read = RecipeText.read(text or "")
    if read.recipe is None:
        is_empty = not (text or "").strip()
        said = "" if is_empty else fragments.message(read.fault, kind="error")
        return *[gr.skip()] * 7, said, gr.skip(), gr.skip()
    schedule = read.recipe.schedule
    above = schedule.entries[0].above if schedule is not None else None
    knobs = (read.knobs.get("motion"), read.knobs.get("drop_rate"))
    values = (*knobs, above, *read.while_noisy, read.group)
    return *(gr.skip() if one is None else one for one in values), "", "", ""


def _axis(model: str, base: str, lora: str, text: str, boundary: float, steps: float | None) -> str:
    """Draw the noise axis for the recipe on the page and the model's own scheduler."""
    has_own = is_pocket(model)
    if not has_own and not Path(model.strip()).is_dir():
        return ""  # a hub's model may have to be downloaded first
    if not has_own and not text.strip() and not (lora.strip() or base.strip()):
        return ""
    read = RecipeText.read(text or (shipped_text(POCKET) if has_own else _TWO.print()))
    if read.recipe is None:
        return ""
    try:
        settings = VideoSettings(num_inference_steps=whole_number(steps, "steps") or None)
        own = boundary if len(read.recipe.experts) == 2 else None
        # The choice alone: whether its weights fit is looked at when a video is made.
        choice = from_recipe(read.recipe, boundary=own)
        opened = VideoRequest(model=model.strip() or POCKET).open_model()
        choice.check_knobs(opened)
        return fragments.axis(planned_steps(opened, choice, settings), boundary=own)
    except MotionMergeError as error:
        return fault(error)
