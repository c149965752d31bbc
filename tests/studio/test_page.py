"""Somebody who never saw a command line makes a video, changes its motion and finds it again."""

from __future__ import annotations

import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import av
import pytest
from safetensors.torch import load

pytest.importorskip("gradio")

from diffusers import WanTransformer3DModel

from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.pocket.world import load_photo
from motionmerge.studio.recipe_text import shipped_text
from motionmerge.studio.server import listening, server_of, studio_app

from ..tiny.browser import PROGRAM, Browser
from ..tiny.folders import save_lora

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")

SET = """((query, text) => {
  const field = document.querySelector(query);
  const kind = field.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
  Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(field, text);
  field.focus();
  field.dispatchEvent(new Event("input", {bubbles: true}));
  field.dispatchEvent(new Event("change", {bubbles: true}));
  field.dispatchEvent(new Event("pointerup", {bubbles: true}));
  field.blur();
})"""
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
SHOWN = "document.querySelectorAll('#result video').length"
SAID = "document.querySelector('#said').innerText"
DRAWN = "document.querySelector('#axis svg')"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    app = studio_app(tmp_path_factory.mktemp("studio"))
    with listening(0) as listener:
        server = server_of(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def put(browser, query, text):
    browser.run(f"{SET}({query!r}, {text!r})")


def click(browser, query):
    browser.run(f"document.querySelector({query!r}).click()")


def open_page(browser, url, **size):
    browser.open(url, **size)
    browser.wait_for(f"document.querySelector('#generate') && {DRAWN}", seconds=120)
    browser.run("document.querySelector('#advanced button').click()")
    browser.wait_for("document.querySelector('#steps input')")


def test_a_photo_a_prompt_and_the_knob(browser, url, tmp_path):
    open_page(browser, url, width=390, height=844, dark=True)
    assert browser.run("document.documentElement.scrollWidth") == 390, "it scrolls sideways"
    click(browser, "#generate")
    browser.wait_for(f"{SAID}.includes('There is no photo')")
    assert "Fix:" in browser.run(SAID)
    load_photo("coffee").save(tmp_path / "mine.png")
    browser.give_files("#photo input[type=file]", tmp_path / "mine.png")
    browser.wait_for("document.querySelector('#photo img')")
    assert browser.run("document.documentElement.scrollWidth") == 390, "the recipe pushes it wide"
    put(browser, "#prompt textarea", "a cat jumps")
    click(browser, "#generate")
    browser.wait_for(f"{SAID}.includes('cat')")
    put(browser, "#prompt textarea", "the camera pans left")
    put(browser, "#steps input", "2")
    browser.wait_for(f"{DRAWN}.getAttribute('aria-label').includes('of 2')")
    click(browser, "#generate")
    browser.wait_for(f"{SHOWN} == 2", seconds=240)
    videos = "[...document.querySelectorAll('#result video')]"
    browser.wait_for(f"{videos}.every(one => one.currentTime > 0.2)")
    times = browser.run(f"{videos}.map(one => one.currentTime)")
    assert max(times) - min(times) < 0.2, "they play in step"
    first = browser.run("document.querySelector('.mm-work').dataset.work")
    put(browser, "#motion input[type=number]", "-0.5")
    browser.wait_for("document.querySelector('#recipe').innerText.includes('motion: -0.5')")
    click(browser, "#generate")
    browser.wait_for(
        f"{SHOWN} == 2 && document.querySelector('.mm-work').dataset.work != '{first}'",
        seconds=240,
    )
    assert "motion -0.5" in browser.run("document.querySelector('#result').innerText")
    assert browser.run(CONTRAST) == [], "dark, with videos"
    # Another tab has its own page; what was made is there after a reload.
    open_page(browser, url)
    assert browser.run(SHOWN) == 0
    names = browser.run("[...document.querySelectorAll('[role=tab]')].map(one => one.innerText)")
    assert names[:4] == ["Motion", "Compare", "Sweep", "History"]
    browser.run("[...document.querySelectorAll('[role=tab]')][3].click()")
    browser.wait_for("document.querySelectorAll('#history li').length == 2")
    foreign = {url.split("/")[2] for url in browser.asked() if url.startswith("http")}
    assert foreign == {url.split("/")[2]}, "the page asks nobody else"
    kinds = {one["params"].get("type", "error") for one in browser.faults()}
    assert kinds <= {"warning", "log", "info"}, browser.faults()  # gradio's own


def tab_to(browser, query):
    """Press Tab until an element has the focus; every stop on the way shows that it has it."""
    for _ in range(60):
        browser.press("Tab", 9)
        at, outline, found = browser.run(f"""(() => {{
          const at = document.activeElement;
          const {{ outlineStyle }} = getComputedStyle(at.closest(".cm-editor") ?? at);
          return [at.outerHTML.slice(0, 200), outlineStyle, at.matches({query!r})];
        }})()""")
        assert outline != "none" or at.startswith("<body"), at
        if found:
            return
    raise AssertionError(query)


def saved(browser, folder, name, *, start):
    """Start a download, and wait until the file is whole."""
    start()
    path, end = folder / name, time.monotonic() + 60
    while not path.exists() or not path.stat().st_size or any(folder.glob("*.crdownload")):
        assert time.monotonic() < end, [path.name for path in folder.iterdir()]
        browser.run("1")
    return path


def test_by_keyboard_alone_from_a_photo_to_saved_files(browser, url, tmp_path):
    open_page(browser, url)
    browser.save_into(tmp_path)
    enter = partial(browser.press, "Enter", 13, "\r")
    tab_to(browser, "#bundled input")
    browser.press(" ", 32, " ")
    browser.wait_for("document.querySelector('#photo img')")
    tab_to(browser, "#prompt textarea")
    browser.call("Input.insertText", text="the camera")
    tab_to(browser, "[aria-label='Ideas for prompts']")
    browser.wait_for("document.querySelector('[role=listbox]')")
    browser.press("ArrowDown", 40)
    browser.wait_for("document.querySelector('[role=option].active')")
    enter()
    browser.wait_for("document.querySelector('#prompt textarea').value == 'the camera pans left'")
    tab_to(browser, "#motion input[type=range]")
    for _ in range(2):
        browser.press("ArrowLeft", 37)
    browser.wait_for("document.querySelector('#recipe').innerText.includes('motion: 0.9')")
    tab_to(browser, "#boundary input[type=range]")
    browser.press("ArrowLeft", 37)
    browser.wait_for("document.querySelector('#recipe').innerText.includes('above: 0.71')")
    browser.wait_for(f"{DRAWN}.querySelector('.mm-cut').getAttribute('x1') == {0.71 * 360}")
    tab_to(browser, "#steps input")
    browser.call("Input.insertText", text="2")
    tab_to(browser, "#recipe .cm-content")
    tab_to(browser, "#generate")
    browser.wait_for("!document.querySelector('[role=listbox]')")  # no list stays open
    assert browser.run(CONTRAST) == [], "light, with everything open"
    enter()
    browser.wait_for(f"{SHOWN} == 2", seconds=240)
    work = browser.run("document.querySelector('.mm-work').dataset.work")
    for number in (1, 2):
        tab_to(browser, "#result figure a")
        video = saved(browser, tmp_path, f"{work}-{number}.mp4", start=enter)
        with av.open(str(video)) as opened:
            assert sum(1 for _ in opened.decode(video=0)) == 16
    tab_to(browser, "#result [download='recipe.yaml']")
    recipe = Recipe.load(saved(browser, tmp_path, "recipe.yaml", start=enter))
    assert recipe.parameters["motion"] == 0.9 and recipe.schedule.entries[0].above == 0.71
    tab_to(browser, "#result [download='report.html']")
    report = saved(browser, tmp_path, "report.html", start=enter)
    browser.new_tab()
    browser.open(report.as_uri())
    assert browser.run("document.querySelectorAll('video').length") == 2
    browser.wait_for("[...document.querySelectorAll('video')].every(one => one.duration > 1)")
    assert "the camera pans left" in browser.run("document.body.innerText")


def test_a_models_folder_a_lora_and_a_recipe_file(browser, url, stored_wan, tmp_path):
    """Each is opened by somebody who types where it is; what is wrong is said in place."""
    lora, wrong, right = (tmp_path / name for name in ("l.safetensors", "a.yaml", "b.yaml"))
    denoiser = WanTransformer3DModel.from_pretrained(stored_wan / "transformer")
    save_lora(lora, denoiser, "blocks.0.attn1.to_q")
    right.write_text(shipped_text("calm"))
    wrong.write_text("inputs: {base: 'memory:base'}\nexperts:\n  a: base + * 3\n")
    open_page(browser, url)
    browser.save_into(tmp_path)
    browser.run("[...document.querySelectorAll('button.label-wrap')][1].click()")
    browser.wait_for("document.querySelector('#lora textarea')?.checkVisibility()")
    click(browser, "#bundled input")
    about = "document.querySelector('#about').innerText"
    put(browser, "#model textarea", str(tmp_path))
    browser.wait_for(f"{about}.includes('model_index.json') && {about}.includes('Fix:')")
    put(browser, "#model textarea", str(stored_wan))
    browser.wait_for(f"{about}.includes('both must divide by 16')")
    put(browser, "#lora textarea", str(lora))
    browser.wait_for(f"{DRAWN}?.getAttribute('aria-label').includes('dynamics')")
    put(browser, "#prompt textarea", "a cat")
    for name, number in {"steps": 2, "width": 16, "height": 16, "frames": 5}.items():
        put(browser, f"#{name} input", str(number))
    click(browser, "#generate")
    browser.wait_for(f"{SHOWN} == 2", seconds=120)
    browser.run("[...document.querySelectorAll('[role=tab]')][4].click()")
    browser.wait_for("document.querySelector('#export').checkVisibility()")
    click(browser, "#export")
    link = "document.querySelector('[download=\"comfyui.zip\"]')"
    browser.wait_for(link, seconds=120)
    archive = saved(browser, tmp_path, "comfyui.zip", start=lambda: browser.run(f"{link}.click()"))
    with zipfile.ZipFile(archive) as files:
        weights = load(files.read("dynamics.safetensors"))
    assert any("lora" in name for name in weights)
    browser.give_files("#advanced input[type=file]", wrong)
    browser.wait_for("document.querySelector('#advanced').innerText.includes('^')")
    browser.give_files("#advanced input[type=file]", right)
    browser.wait_for("document.querySelector('#recipe').innerText.includes('calm: base')")
    browser.wait_for("document.querySelector('#motion input[type=number]').value == -0.25")
    browser.run("document.querySelector('#group input').focus()")
    browser.call("Input.insertText", text="tempral")
    browser.press("Enter", 13, "\r")
    browser.wait_for("document.querySelector('#advanced').innerText.includes('`temporal`')")


def ask_for_a_long_one(browser, url):
    open_page(browser, url)
    click(browser, "#bundled input")
    browser.wait_for("document.querySelector('#photo img')")
    put(browser, "#prompt textarea", "the camera zooms in")
    put(browser, "#steps input", "400")
    for _ in range(5):  # somebody is impatient
        click(browser, "#generate")


def test_two_tabs_wait_for_each_other_and_stop_alone(browser, url):
    ask_for_a_long_one(browser, url)
    browser.wait_for(f"{SAID}.includes('step')", seconds=120)
    first = browser.session
    browser.new_tab()
    ask_for_a_long_one(browser, url)
    browser.wait_for(f"{SAID}.includes('Waiting: 1 other')")
    click(browser, "#stop")
    browser.wait_for(f"{SAID}.includes('Stopped')")
    browser.go_to(first)
    before = browser.run(SAID)
    browser.wait_for(f"{SAID}.includes('step') && {SAID} != {before!r}")  # it goes on
    click(browser, "#stop")
    browser.wait_for(f"{SAID}.includes('Stopped')")
    assert browser.run(SHOWN) == 0
