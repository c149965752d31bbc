"""The fields of the studio's page: what a video is made from."""

from __future__ import annotations

from typing import Any

import gradio as gr

from motionmerge.parameter_groups import GROUPS
from motionmerge.sampling.request.request import POCKET
from motionmerge.studio.recipe_text import SEVERAL, shipped_text
from motionmerge.studio.values import MOST_PROMPT
from motionmerge.studio.wishes import KNOWN_WORDS

PHOTOS = ("coffee", "astronaut", "chelsea", "rocket", "camera", "brick")
PROMPTS = (
    "the camera pans left",
    "the camera zooms in",
    "the blue ball moves up then right and the camera pans left",
)
IMAGES = ("low_pass(0.4)", "blur(2, 0.05)", "motion_amplitude(1.15)", "time_noise(0.5)")
ATTENTIONS = ("first_frame(-0.6)", "first_frame(-0.3)")
COMPARED = ("pocket", "edg-official", "knob", "motion-only", "calm")


def left_column() -> dict[str, Any]:
    """Add the fields, and return them by name: those of `PageValues`, and some beside them."""
    return {
        **_photo_and_prompt(),
        **_motion_and_boundary(),
        **_while_noisy(),
        **_model(),
        **_advanced(),
    }


def _photo_and_prompt() -> dict[str, Any]:
    photo = gr.Image(
        type="filepath",
        image_mode=None,
        format="png",
        sources=["upload", "clipboard"],
        label="Photo",
        elem_id="photo",
        height=230,
    )
    photo.preprocess = _as_uploaded  # type: ignore[method-assign]
    bundled = gr.Radio(list(PHOTOS), label="or one of these", value=None, elem_id="bundled")
    prompt = gr.Textbox(
        label="Prompt",
        elem_id="prompt",
        placeholder=PROMPTS[0],
        lines=2,
        max_length=MOST_PROMPT,
        info=KNOWN_WORDS,
    )
    ideas = gr.Dropdown(list(PROMPTS), label="Ideas for prompts", value=None)
    return {"photo": photo, "bundled": bundled, "prompt": prompt, "ideas": ideas}


def _as_uploaded(payload: Any) -> str | None:
    """Return the path of a photo as it was uploaded: `load_image` names what is wrong with it."""
    return None if payload is None else payload.path


def _motion_and_boundary() -> dict[str, Any]:
    motion = gr.Slider(
        -1.5, 1.5, value=1.0, step=0.05, label="Motion", elem_id="motion",
        info="-1: that of the fine-tuned weights. 0: the base's. Above: beyond.",
    )  # fmt: skip
    with gr.Group():
        boundary = gr.Slider(
            0, 1, value=0.72, step=0.01, label="Boundary", elem_id="boundary",
            info="Noise level at which the expert changes.",
        )  # fmt: skip
        axis = gr.HTML(elem_id="axis")
    wrong = gr.HTML(padding=False)
    return {"motion": motion, "boundary": boundary, "axis": axis, "boundary_wrong": wrong}


def _while_noisy() -> dict[str, Any]:
    """Add the knobs of the schedule's first entry; they are written into the recipe."""
    with gr.Accordion("While it is noisy", open=False, elem_id="noisy"):
        gr.Markdown(
            "Other knobs of the recipe's first entry. What the model cannot is said below the "
            "noise axis."
        )
        guidance = gr.Number(
            0, label="Guidance then", elem_id="noisy_guidance", info="0: as for all steps."
        )
        image = _knob_text(
            "Image",
            IMAGES,
            name="noisy_image",
            info="Blurred, or grey frames pushed away from the photo.",
        )
        attention = _knob_text("Attention to the first frame", ATTENTIONS, name="noisy_attention")
        wrong = gr.HTML(padding=False)
    knobs = {"noisy_guidance": guidance, "noisy_image": image, "noisy_attention": attention}
    return {**knobs, "noisy_wrong": wrong}


def _knob_text(label: str, texts: tuple[str, ...], *, name: str, info: str | None = None) -> Any:
    """Add a field for a knob's text, with some to choose from."""
    choices = [("as it is", ""), *((text, text) for text in texts)]
    return gr.Dropdown(
        choices, value="", label=label, elem_id=name, info=info, allow_custom_value=True
    )


def _model() -> dict[str, Any]:
    with gr.Accordion("Model", open=False):
        model = _path("Model", "pocket, a folder of diffusers, or owner/name.", value=POCKET)
        base = _path("Base", "What it was fine-tuned from.")
        lora = _path("LoRA", "A file, in place of a recipe.")
        about = gr.HTML(elem_id="about", padding=False)
    return {"model": model, "base": base, "lora": lora, "about": about}


def _path(label: str, info: str, *, value: str = "") -> Any:
    return gr.Textbox(value, label=label, elem_id=label.lower(), max_length=400, info=info)


def _advanced() -> dict[str, Any]:
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        drop_rate = gr.Slider(0, 0.95, value=0.4, step=0.05, label="Drop rate (DARE)")
        group = gr.Dropdown(
            [("all of them", ""), *GROUPS, ("as the recipe says, several", SEVERAL)],
            value="",
            label="Only these parameters",
            elem_id="group",
            info="Of every difference in the recipe: a group, or a pattern such as `re:attn1`.",
            allow_custom_value=True,
        )
        wrong = gr.HTML(padding=False)
        of_recipe = {"drop_rate": drop_rate, "group": group, "group_wrong": wrong}
        return {**of_recipe, **_numbers(), **_recipe()}


def _numbers() -> dict[str, Any]:
    """Add what is asked of the videos beside their weights."""
    gr.Markdown("Steps and guidance: 0 is the model's own.")
    with gr.Row():
        steps = gr.Number(0, label="Steps", elem_id="steps", precision=0, min_width=110)
        guidance = gr.Number(0, label="Guidance", min_width=110)
    gr.Markdown("Several seeds: a video of each, from the first on.")
    with gr.Row():
        seed = gr.Number(0, label="Seed", elem_id="seed", precision=0, min_width=110)
        seeds = gr.Number(1, label="How many", elem_id="seeds", precision=0, min_width=110)
    gr.Markdown("Size: 0 is the model's own. Less takes less time and memory.")
    with gr.Row():
        width = gr.Number(0, label="Width", elem_id="width", precision=0, min_width=80)
        height = gr.Number(0, label="Height", elem_id="height", precision=0, min_width=80)
        frames = gr.Number(0, label="Frames", elem_id="frames", precision=0, min_width=80)
    paints = gr.Checkbox(True, label="Paint the balls and boxes that the prompt names (pocket)")
    return {
        "steps": steps, "guidance": guidance, "seed": seed, "num_seeds": seeds,
        "width": width, "height": height, "frames": frames, "paints": paints,
    }  # fmt: skip


def _recipe() -> dict[str, Any]:
    """Add the recipe as text, and where it can be taken from."""
    opened = gr.UploadButton("Open a recipe file", type="binary", elem_id="opened", size="sm")
    shipped = gr.Dropdown(list(COMPARED), label="Start from a shipped recipe", value=POCKET)
    recipe = gr.Code(
        shipped_text(POCKET),
        language="yaml",
        label="Recipe",
        max_lines=24,
        elem_id="recipe",
        wrap_lines=True,
    )
    wrong = gr.HTML(padding=False)
    return {"opened": opened, "shipped": shipped, "recipe": recipe, "wrong": wrong}
