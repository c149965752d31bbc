"""The fields of the studio's page: what a video is made from."""

from __future__ import annotations

from typing import Any

import gradio as gr

from motionmerge.parameter_groups import GROUPS
from motionmerge.sampling.request.request import POCKET
from motionmerge.studio.wishes import KNOWN_WORDS, MOST_PROMPT, SEVERAL, shipped_text

PHOTOS = ("coffee", "astronaut", "chelsea", "rocket", "camera", "brick")
PROMPTS = (
    "the camera pans left",
    "the camera zooms in",
    "the blue ball moves up then right and the camera pans left",
)
IMAGES = ("low_pass(0.4)", "blur(2, 0.05)", "motion_amplitude(1.15)", "time_noise(0.5)")
ATTENTIONS = ("first_frame(-0.6)", "first_frame(-0.3)")
COMPARED = ("pocket", "edg-official", "knob", "motion-only", "calm")


def _as_uploaded(payload: Any) -> str | None:
    """Return the path of a photo as it was uploaded: `load_image` names what is wrong with it."""
    return None if payload is None else payload.path


def left_column() -> tuple[list[Any], dict[str, Any]]:
    """Add what a video is made from; the inputs are in the order of `PageValues`."""
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
    motion = gr.Slider(
        -1.5, 1.5, value=1.0, step=0.05, label="Motion", elem_id="motion",
        info="-1: that of the fine-tuned weights. 0: the base's. Above: beyond.",
    )  # fmt: skip
    with gr.Group():
        boundary = gr.Slider(
            0, 1, value=0.72, step=0.01, label="Boundary",
            info="Noise level at which the expert changes.",
        )  # fmt: skip
        axis = gr.HTML(elem_id="axis")
    noisy = _noisy_fields()
    with gr.Accordion("Model", open=False):
        model = gr.Textbox(
            POCKET,
            label="Model",
            elem_id="model",
            max_length=400,
            info="pocket, a folder of diffusers, or owner/name.",
        )
        base = gr.Textbox(
            "", label="Base", elem_id="base", max_length=400, info="What it was fine-tuned from."
        )
        lora = gr.Textbox(
            "", label="LoRA", elem_id="lora", max_length=400, info="A file, in place of a recipe."
        )
        about = gr.HTML(elem_id="about", padding=False)
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
        group_wrong = gr.HTML(padding=False)
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
    inputs = [
        *(photo, prompt, model, base, lora, recipe, motion),
        *(boundary, drop_rate, steps, guidance, seed, seeds, width, height, frames, paints),
    ]
    parts = {
        "bundled": bundled, "ideas": ideas, "axis": axis, "shipped": shipped, "wrong": wrong,
        "photo": photo, "prompt": prompt, "recipe": recipe, "motion": motion,
        "boundary": boundary, "drop_rate": drop_rate, "model": model, "steps": steps,
        "about": about, "opened": opened, "base": base, "lora": lora, "group": group,
        "group_wrong": group_wrong, **noisy,
    }  # fmt: skip
    return inputs, parts


def _noisy_fields() -> dict[str, Any]:
    """Add the knobs of the schedule's first entry; they are written into the recipe."""
    with gr.Accordion("While it is noisy", open=False, elem_id="noisy"):
        gr.Markdown(
            "Other knobs of the recipe's first entry. What the model cannot is said below the "
            "noise axis."
        )
        guidance = gr.Number(
            0, label="Guidance then", elem_id="noisy_guidance", info="0: as for all steps."
        )
        image = _calls(
            "Image",
            IMAGES,
            name="noisy_image",
            info="Blurred, or grey frames pushed away from the photo.",
        )
        attention = _calls("Attention to the first frame", ATTENTIONS, name="noisy_attention")
        wrong = gr.HTML(padding=False)
    knobs = {"noisy_guidance": guidance, "noisy_image": image, "noisy_attention": attention}
    return {**knobs, "noisy_wrong": wrong}


def _calls(label: str, texts: tuple[str, ...], *, name: str, info: str | None = None) -> Any:
    """Add a field for a knob's text, with some to choose from."""
    choices = [("as it is", ""), *((text, text) for text in texts)]
    return gr.Dropdown(
        choices, value="", label=label, elem_id=name, info=info, allow_custom_value=True
    )
