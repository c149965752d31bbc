"""The example workflows, in ComfyUI's own page and over HTTP, with tiny files of their names."""

from __future__ import annotations

import json

import comfy.ldm.wan.vae
import comfy.ops
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ..comfyui_pack.load import PACK
from ..tiny.browser import PROGRAM, Browser
from . import tiny
from .server import running

WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
FOLDERS = {
    "UNETLoader": "diffusion_models",
    "MotionMergeKnobLora": "loras",
    "LoraLoaderModelOnly": "loras",
    "CLIPLoader": "text_encoders",
    "CLIPVisionLoader": "clip_vision",
    "VAELoader": "vae",
}
"""Where the file is that a node's first widget names."""

WRONG = """app.graph._nodes.filter(node =>
    node.has_errors || !LiteGraph.registered_node_types[node.type] ||
    (node.inputs || []).some(one => one.link != null && !app.graph.links[one.link])
).map(node => node.type)"""
"""Nodes that the page does not know, or whose links lead nowhere."""


def contents_of(folder):
    """Return what a tiny file for a folder of ComfyUI holds."""
    if folder == "diffusion_models":
        return {name: tensor.clone() for name, tensor in tiny.state_dict("wan").items()}
    if folder == "loras":
        return tiny.lora("wan")
    if folder == "vae":  # of the real size, as ComfyUI expects it; all zeros, so that it is quick
        with torch.device("meta"):
            network = comfy.ldm.wan.vae.WanVAE(
                dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                temperal_downsample=[False, True, True], dropout=0.0,
            )  # fmt: skip
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        return {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    return {"nothing": torch.zeros(1)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    named = {
        (FOLDERS[node["type"]], node["widgets_values"][0])
        for path in WORKFLOWS
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]
        if node["type"] in FOLDERS
    }
    for folder in {folder for folder, _ in named}:
        save_file(contents_of(folder), tmp_path_factory.getbasetemp() / folder)
        (base / "models" / folder).mkdir(parents=True)
    for folder, name in named:
        (base / "models" / folder / name).hardlink_to(tmp_path_factory.getbasetemp() / folder)
    (base / "input").mkdir()
    Image.new("RGB", (64, 64), "teal").save(base / "input" / "example.png")
    with running(base) as started:
        yield started


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("Chromium is not installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.open(server.address, width=1920, height=1080)
    browser.wait_for("window.app?.graph && LiteGraph.registered_node_types.MotionMergeKnobLora")
    yield browser
    browser.close()


def test_the_examples_are_among_the_templates(server):
    listed = server.ask("/api/workflow_templates")
    assert sorted(listed["motionmerge-nodes"]) == [path.stem for path in WORKFLOWS]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_opens_in_the_page_and_runs(path, server, page, tmp_path, capsys):
    text = path.read_text(encoding="utf-8")
    page.run(f"app.loadGraphData({text}).then(() => true)")
    assert page.run("app.graph._nodes.length") == len(json.loads(text)["nodes"])
    assert page.run(WRONG) == []
    page.press("Escape", 27)  # the list of templates, which lies over everything at first
    page.run("app.extensionManager.command.execute('Comfy.Canvas.FitView').then(() => true)")
    page.picture(tmp_path / f"{path.stem}.png")
    prompt = page.run("app.graphToPrompt().then(made => made.output)")
    for node in prompt.values():
        if node["class_type"] == "WanImageToVideo":
            node["inputs"].update(width=32, height=32, length=5)
    done = server.run(prompt)
    assert done["status"]["status_str"] == "success", done["status"]["messages"]
    (schedule,) = (
        done["outputs"][number]["text"][0]
        for number, node in prompt.items()
        if node["class_type"] == "MotionMergeShowSchedule"
    )
    steps = next(n["inputs"]["steps"] for n in prompt.values() if n["class_type"] == "KSampler")
    lines = schedule.splitlines()
    assert len(lines) == steps and "Warning" not in schedule
    with capsys.disabled():
        print(f"\n{path.stem}: {page.run('app.graph._nodes.length')} nodes, {steps} steps; "
              f"picture in {tmp_path}\n{schedule}")  # fmt: skip
