"""The server shows the study alone, takes each answer once, and loses nothing."""

from __future__ import annotations

import http.client
import json
import resource
import socket
import threading
from contextlib import contextmanager

import pytest

from motionmerge.evaluation.study import server as module
from motionmerge.evaluation.study.answers import read_answers
from motionmerge.evaluation.study.server import RateLimit, StudyServer


@contextmanager
def serving(folder, port=0):
    with StudyServer(folder, port=port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path="/answers", body=None, method=None, **headers):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(
        method or ("GET" if body is None else "POST"), path, body=body, headers={**kind, **headers}
    )
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, answer.headers


def lines(folder):
    path = folder / "answers.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_only_the_studys_own_files_are_shown(study):
    _, folder = study
    (folder / "site" / "files" / "other.txt").write_text("secret")
    with serving(folder) as server:
        status, page, headers = ask(server, "/?form=1")
        assert status == 200 and b"study.js" in page
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert b"STUDY_SERVER = true" in ask(server, "/manifest.js")[1]
        video = f"/files/{study[0].manifest.tasks[0].first}"
        whole = ask(server, video)[1]
        _, content, headers = ask(server, video, method="HEAD")
        assert (content, headers["Content-Length"]) == (b"", str(len(whole)))
        (folder / "site" / "manifest.js").write_text("window.STUDY = 'edited by hand'")
        assert b"edited" not in ask(server, "/manifest.js")[1]
        status, part, headers = ask(server, video, Range="bytes=10-19")
        assert (status, part) == (206, whole[10:20])
        assert headers["Content-Range"] == f"bytes 10-19/{len(whole)}"
        for path in (
            *("/study.json", "/../study.json", "/answers.jsonl", "/files/other.txt", "/files/"),
            *("//etc/passwd", "/%2e%2e/study.json", "/files/../../study.json"),
        ):
            status, content, _ = ask(server, path)
            assert status == 404 and b"secret" not in content and b"key" not in content, path
        (folder / "site" / "study.css").unlink()
        assert ask(server, "/study.css")[0] == 500


def test_only_answers_that_the_manifest_knows_are_taken(study, simulated_answers):
    whole, folder = study
    good = next(iter(simulated_answers(whole, {"base": 0, "full": 1}, num_raters=1)))
    script = "<script>alert(1)</script>"
    with serving(folder) as server:
        for wrong in (
            {**good, "study": "0" * 20},
            {**good, "task": "0" * 20},
            {**good, "task": script},
            {**good, "rater": script},
            {**good, "name": "Ada"},
            {**good, "choices": {**good["choices"], "overall": script}},
            {**good, "choices": {**good["choices"], script: "left"}},
            {**good, "choices": {}},
            {**good, "seconds": float("nan")},
            {**good, "place": -1},
            *([], "text", 1, {}),
        ):
            status, content, _ = ask(server, body=wrong)
            assert status == 400 and content == b"Bad Request\n", wrong
        assert ask(server, body=b"[" * 4000)[0] == 400
        assert ask(server, body=b"{" + b" " * 5000)[0] == 413
        assert ask(server, body=good, **{"Content-Type": "text/plain"})[0] == 415
        assert ask(server, "/elsewhere", body=good)[0] == 404
        assert ask(server, method="PUT")[0] == 501
        assert lines(folder) == []
        assert ask(server, body=good)[0] == 201
    assert lines(folder) == [good]


def test_a_double_submit_two_raters_at_once_and_a_restart_lose_and_double_nothing(
    study, simulated_answers, monkeypatch
):
    monkeypatch.setattr(module, "BURST", 1000)
    whole, folder = study
    answers = list(simulated_answers(whole, {"base": 0, "full": 1}, num_raters=4))
    by_rater = {one["rater"]: [a for a in answers if a["rater"] == one["rater"]] for one in answers}

    def send(server, own):
        for one in own:
            for _ in range(2):
                assert ask(server, body=one)[0] in (200, 201)

    with serving(folder) as server:
        threads = [threading.Thread(target=send, args=(server, own)) for own in by_rater.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with serving(folder) as server:
        assert ask(server, body=answers[0])[0] == 200
    found = read_answers([folder / "answers.jsonl"], whole.manifest)
    assert len(lines(folder)) == len(answers) and found.num_same == 0
    order = [(one["rater"], one["place"]) for one in lines(folder)]
    assert sorted(order) == sorted((one["rater"], one["place"]) for one in answers)


def test_a_full_disk_is_said_and_the_answer_taken_later(study, simulated_answers):
    whole, folder = study
    first, second, *_ = simulated_answers(whole, {"base": 0, "full": 1}, num_raters=1)
    with serving(folder) as server:
        assert ask(server, body=first)[0] == 201
        size = (folder / "answers.jsonl").stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))  # a disk that ends in a line
        try:
            assert ask(server, body=second)[0] == 507
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert ask(server, body=second)[0] == 201
    assert lines(folder) == [first, second]


def test_rates_raters_and_connections_are_bounded(study, simulated_answers, monkeypatch):
    whole, folder = study
    now = [0.0]
    limit = RateLimit(clock=lambda: now[0])
    assert sum(limit.allows("a") for _ in range(100)) == module.BURST
    assert limit.allows("b")
    now[0] = 1.0
    assert sum(limit.allows("a") for _ in range(100)) == module.ANSWERS_PER_SECOND
    one, other = (
        next(iter(simulated_answers(whole, {"base": 0, "full": 1}, num_raters=1, seed=seed)))
        for seed in (1, 2)
    )
    monkeypatch.setattr(module, "MAX_RATERS", 1)
    monkeypatch.setattr(module, "BURST", 2)
    with serving(folder) as server:
        assert [ask(server, body=body)[0] for body in (one, other)] == [201, 429]
        assert ask(server, body=one)[0] == 429
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    with serving(folder) as server:
        idle = [socket.create_connection(server.server_address) for _ in range(2)]
        with pytest.raises((http.client.HTTPException, OSError)):
            for _ in range(3):  # the idle ones may still wait to be accepted
                ask(server, "/")
        for connection in idle:
            connection.close()


def test_a_visitor_who_sends_a_byte_now_and_then_is_sent_away(study, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_TO_ASK", 0.3)
    with serving(study[1]) as server, socket.create_connection(server.server_address) as slow:
        slow.settimeout(0.05)
        slow.sendall(b"POST /answers HTTP/1.1\r\nContent-Length: 4000\r\n\r\n"[:30])
        for _ in range(200):
            try:
                slow.sendall(b"X")
                if slow.recv(100) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            pytest.fail("it still listens after 10 seconds")


def test_what_follows_a_request_with_a_body_is_not_taken_for_a_second_one(study):
    hidden = b"GET /study.js HTTP/1.1\r\n\r\n"
    request = b"GET / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(hidden)
    with serving(study[1]) as server, socket.create_connection(server.server_address) as visitor:
        visitor.sendall(request + hidden)
        answer = b"".join(iter(lambda: visitor.recv(1 << 16), b""))
    assert answer.count(b"HTTP/1.1 200") == 1
