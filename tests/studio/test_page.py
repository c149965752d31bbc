"""Somebody who never saw a command line makes a video, changes its motion and finds it again."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("gradio")

from motionmerge.models.pocket.world import load_photo
from motionmerge.studio.server import listening, server_of, studio_app

from ..tiny.browser import PROGRAM, Browser

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")

SET = """((query, text) => {
  const field = document.querySelector(query);
  const kind = field.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
  Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(field, text);
  field.dispatchEvent(new Event("input", {bubbles: true}));
  field.dispatchEvent(new Event("change", {bubbles: true}));
  field.dispatchEvent(new Event("pointerup", {bubbles: true}));
  field.blur();
})"""
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


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
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
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    field = browser.call("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "mine.png")])
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
    click(browser, "#generate")
    browser.wait_for(
        f"{SHOWN} == 2 && document.querySelector('.mm-work').dataset.work != '{first}'"
    )
    assert "motion -0.5" in browser.run("document.querySelector('#result').innerText")
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
