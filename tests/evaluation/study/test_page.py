"""A rater's page in a browser: play first, answer by hand or keyboard, and nothing is ever lost."""

from __future__ import annotations

import json

import pytest

from motionmerge.evaluation.study.answers import read_answers

from ...tiny.browser import PROGRAM, Browser
from .test_server import lines, serving

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")

TASK = "!document.getElementById('task').hidden"
DONE = "!document.getElementById('done').hidden"
WHERE = "document.getElementById('where').textContent"
LOCKED = "[...document.querySelectorAll('fieldset')].every(one => one.disabled)"
KEPT = "JSON.parse(Object.values(localStorage)[0])"
COUNT = f"{KEPT}.answers.length"
LOADED = "[left, right].every(one => one.readyState == 4 && one.networkState == 1)"
REPEAT_LAST = "do { localStorage.clear(); adopt(newRater()) } while (!tasks.at(-1).repeat); keep()"
"""Draws raters until the videos that are shown twice come last: the browser has those already."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def click(browser, name):
    browser.run(f"document.getElementById('{name}').click()")


def answer(browser, choice):
    """Play both videos to their end, answer all questions, and go on."""
    click(browser, "play")
    browser.wait_for(f"!({LOCKED})")
    browser.run(f"document.querySelectorAll('input[value={choice}]').forEach(one => one.click())")
    browser.wait_for("!document.getElementById('next').disabled")
    browser.run("for (let i = 0; i < 2; i++) document.getElementById('next').click()")  # twice


def connect(browser, is_connected):
    """Cut or restore the page's connection."""
    rates = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.call("Network.emulateNetworkConditions", offline=not is_connected, **rates)


def test_a_rater_answers_on_a_phone_through_reloads_and_lost_connections(browser, study):
    whole, folder = study
    with serving(folder) as server:
        browser.open(server.url, width=360, height=740, dark=True)
        browser.run(REPEAT_LAST)
        browser.call("Page.reload")
        browser.wait_for("document.readyState == 'complete'")
        click(browser, "begin")
        browser.wait_for(TASK)
        assert browser.run(WHERE) == "1 of 5"
        assert browser.run("document.getElementById('prompt').textContent").startswith("“thing")
        assert browser.run("document.documentElement.scrollWidth") == 360, "it scrolls sideways"
        assert browser.run(LOCKED), "nothing may be answered before both videos were played"
        browser.run("document.querySelector('input[value=left]').click()")
        browser.run("document.getElementById('next').click()")
        assert browser.run(WHERE) == "1 of 5" and browser.run(COUNT) == 0
        answer(browser, "left")
        browser.wait_for(f"{WHERE} == '2 of 5' && {KEPT}.answers[0].sent")
        shown = browser.run("document.getElementById('left').getAttribute('src')")
        browser.call("Page.reload")
        browser.wait_for(f"document.readyState == 'complete' && {WHERE} == '2 of 5'")
        again = browser.run("document.getElementById('left').getAttribute('src')")
        assert again == shown, "the order changed"
        # By the keyboard alone: the play button has the focus, then the first choice.
        browser.press("Enter", 13, "\r")
        browser.wait_for(f"!({LOCKED})")
        for _ in range(2):
            browser.press("Tab", 9)
            browser.press(" ", 32, " ")
        browser.press("Tab", 9)
        browser.press("Enter", 13, "\r")
        browser.wait_for(f"{WHERE} == '3 of 5' && {KEPT}.answers[1].sent")
        assert set(lines(folder)[1]["choices"].values()) == {"left"}
        browser.wait_for(LOADED)  # what is shown now came whole, and the next does not come
        connect(browser, False)
        answer(browser, "right")
        browser.wait_for(f"{WHERE} == '4 of 5'")
        browser.wait_for("!document.getElementById('trouble').hidden")  # a video did not come
        assert len(lines(folder)) == 2 and browser.run(COUNT) == 3
        connect(browser, True)
        browser.wait_for(f"{KEPT}.answers[2].sent")
        answer(browser, "tie")
        browser.wait_for(f"{WHERE} == '5 of 5'")
        answer(browser, "cannot")
        browser.wait_for(DONE)
        browser.wait_for("document.getElementById('sent').textContent.startsWith('All answers')")
    found = read_answers([folder / "answers.jsonl"], whole.manifest)
    assert len(lines(folder)) == len(found.answers) == 5
    assert sum(one.repeat for one in found.answers) == 1
    (repeat,) = (one for one in found.answers if one.repeat)
    (first,) = (one for one in found.answers if one.task == repeat.task and not one.repeat)
    assert repeat.swapped != first.swapped and repeat.place > first.place


def test_a_page_that_is_a_file_needs_no_server_and_saves_answers(browser, study, tmp_path):
    whole, folder = study
    browser.open("about:blank")
    browser.events.clear()
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.open((folder / "site" / "index.html").as_uri())
    click(browser, "begin")
    for number in range(5):
        browser.wait_for(f"{WHERE} == '{number + 1} of 5'")
        answer(browser, "left")
    browser.wait_for(DONE)
    click(browser, "export")
    for _ in range(200):
        if saved := list(tmp_path.glob("answers-*.jsonl")):
            break
        browser.run("new Promise(done => setTimeout(done, 50))")
    values = [json.loads(line) for line in saved[0].read_text().splitlines()]
    assert len(read_answers(saved, whole.manifest).answers) == len(values) == 5
    assert not any({"sent", "refused"} & set(one) for one in values)
    assert {url.partition(":")[0] for url in browser.asked()} <= {"file", "blob"}
    assert not browser.faults()


def test_two_tabs_are_one_rater_and_neither_forgets_what_the_other_knows(browser, study):
    _, folder = study
    browser.open((folder / "site" / "index.html").as_uri())
    # Another tab began, on a form and with an order of its own, before this one did.
    browser.run("localStorage.clear(); adopt(newRater()); current = null; show()")
    other = "{rater: 'ab'.repeat(16), form: 0, begun: true, answers: []}"
    browser.run(f"localStorage.setItem(KEY, JSON.stringify({other}))")
    click(browser, "begin")
    assert browser.run("state.rater") == "ab" * 16
    order = "JSON.stringify(tasks.map(one => [one.task.id, one.repeat, one.swapped]))"
    assert browser.run(order) == browser.run(order.replace("tasks.map", "planned().map"))
    # The other tab answers the second pair, and no event comes, as to a page that is asleep.
    browser.run(
        "const theirs = {study: study.id, rater: state.rater, task: tasks[1].task.id,"
        " repeat: false, swapped: tasks[1].swapped, seconds: 9, place: 0,"
        " choices: {motion: 'tie', overall: 'tie'}};"
        "localStorage.setItem(KEY, JSON.stringify({...state, answers: [theirs]}))"
    )
    answer(browser, "left")
    browser.wait_for(f"{WHERE} == '3 of 5'")
    assert browser.run(f"{KEPT}.answers.map(one => one.choices.overall).join()") == "left,tie"


def test_only_a_refusal_of_the_study_itself_ends_sending(browser, study):
    _, folder = study
    with serving(folder) as server:
        browser.open(server.url)
        browser.run("localStorage.clear(); adopt(newRater()); show()")
        browser.run(
            "window.real = fetch; window.fetch = async () => new Response('', {status: 404})"
        )
        click(browser, "begin")
        answer(browser, "left")
        browser.wait_for("!sending")
        browser.run("window.fetch = real; send()")
        browser.wait_for(f"{KEPT}.answers[0].sent")
        browser.run("window.fetch = async () => new Response('', {status: 400})")
        answer(browser, "left")
        browser.wait_for(f"{KEPT}.answers[1].refused")
        assert browser.run("page('sent').textContent").startswith("Answers that were not taken: 1.")
    assert len(lines(folder)) == 1


def test_pairs_come_again_and_checks_do_not_and_never_before_the_first_time(browser, study):
    _, folder = study
    browser.open((folder / "site" / "index.html").as_uri())
    faults = browser.run(
        "study.num_repeats = 2; Array.from({length: 300}, () => { adopt(newRater());"
        " const again = tasks.filter(one => one.repeat);"
        " return again.length == 2 && again.every(one => one.task.first != one.task.second &&"
        " tasks.findIndex(other => other.task == one.task) < tasks.indexOf(one));"
        " }).filter(isRight => !isRight).length"
    )
    assert faults == 0


def test_a_browser_that_keeps_nothing_says_so_and_goes_on(browser, study):
    _, folder = study
    full = "Storage.prototype.setItem = () => { throw new DOMException('full') };"
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=full)
    try:
        browser.open((folder / "site" / "index.html").as_uri())
        browser.run("localStorage.clear(); adopt(newRater()); show()")
        click(browser, "begin")
        for number in range(2):
            browser.wait_for(f"{WHERE} == '{number + 1} of 5'")
            assert "keeps nothing" in browser.run("page('trouble').textContent")
            answer(browser, "tie")
        browser.wait_for("state.answers.length == 2")
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", **script)
