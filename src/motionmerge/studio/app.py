"""The studio's page: what stands where, and what its buttons do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from motionmerge.errors import MotionMergeError
from motionmerge.studio import fragments
from motionmerge.studio.fields import COMPARED, left_column
from motionmerge.studio.following import QUICK, keep_in_step
from motionmerge.studio.tabs import Studio, Told
from motionmerge.studio.values import MOST_COMPARED, THIS_RECIPE, PageValues
from motionmerge.studio.works import Exported

_VALUES = tuple(PageValues.__dataclass_fields__)


def build_page(studio: Studio) -> gr.Blocks:
    """Lay the page out, and connect what happens."""
    with gr.Blocks(
        title="motionmerge studio", analytics_enabled=False, delete_cache=(3600, 86_400)
    ) as page:
        gr.Markdown("# motionmerge studio\nA photo, a prompt, and a knob for motion.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                fields = left_column()
            with gr.Column(scale=3, min_width=320):
                buttons, past = _tabs()
                stop = gr.Button("Stop", variant="stop", elem_id="stop", visible="hidden")
                said = gr.HTML(elem_id="said")
                result = gr.HTML(elem_id="result")
        for kind, (button, more) in buttons.items():
            button.click(
                _maker_of(studio, kind),
                inputs=[*(fields[name] for name in _VALUES), *more],
                outputs=[said, result, past, stop],
                concurrency_limit=None,  # the maker has a line of its own, which can be left
                show_progress="hidden",
                api_visibility="private",
            )
        stop.click(_stopper(studio), None, [said], **QUICK)
        page.load(lambda: fragments.history(studio.works.history()), None, [past], **QUICK)
        page.unload(_leaver(studio))
        keep_in_step(page, fields)
    return page


def _tabs() -> tuple[dict[str, tuple[gr.Button, Sequence[Any]]], gr.HTML]:
    """Add the tabs; return each button with the fields of its own tab, and the history."""
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
    buttons: dict[str, tuple[gr.Button, Sequence[Any]]] = {
        "motion": (generate, ()),
        "compare": (compare, (chosen,)),
        "sweep": (sweep, (low, high, count)),
        "export": (export, ()),
    }
    return buttons, past


def _maker_of(studio: Studio, kind: str) -> Any:
    """Return what a button does: yield progress, then the videos."""

    def make(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        tab, (left, more) = _tab(request), (values[: len(_VALUES)], values[len(_VALUES) :])
        try:
            wish = PageValues(**dict(zip(_VALUES, left, strict=True))).of_kind(kind, more)
        except MotionMergeError as error:
            yield fragments.fault(error), gr.skip(), gr.skip(), gr.skip()
            return
        yield fragments.progress("Starting", 0.0), gr.skip(), gr.skip(), gr.update(visible=True)
        for told in studio.run(wish, tab):
            is_last = not isinstance(told, tuple) and studio.num_making(tab) == 1
            yield *_shown(told, studio), gr.update(visible="hidden") if is_last else gr.skip()

    return make


def _shown(told: Told, studio: Studio) -> tuple[Any, Any, Any]:
    """Return what the page shows of it: a message, videos, the history."""
    if isinstance(told, tuple):
        return fragments.progress(*told), gr.skip(), gr.skip()
    if isinstance(told, BaseException):
        return fragments.fault(told), gr.skip(), gr.skip()
    if isinstance(told, Exported):
        return "", fragments.exported(told), gr.skip()
    videos = fragments.shown_work(told, studio.works)
    return "", videos, fragments.history(studio.works.history())


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
