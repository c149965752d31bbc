"""Headless Chromium, driven without a driver: the protocol of its developer tools over a pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """Chromium, driven over its pipe (`--remote-debugging-pipe`)."""

    def __init__(self, profile):
        from_us, ours = os.pipe()
        theirs, to_us = os.pipe()
        high = [os.dup2(from_us, 93), os.dup2(to_us, 94)]
        command = f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}'
        flags = [*("--headless=new", "--no-sandbox", "--disable-gpu"), "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, PROGRAM, *flags, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=high,
            stderr=subprocess.DEVNULL,
        )
        for one in (from_us, to_us, *high):
            os.close(one)
        self.sender, self.receiver = os.fdopen(ours, "wb"), os.fdopen(theirs, "rb")
        self.events, self.number, self.session = [], 0, {}
        self.new_tab()

    def new_tab(self):
        """Open a tab and go to it; `go_to` goes back."""
        self.session = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def go_to(self, session):
        """Bring a tab, by what `session` was, to the front: others draw nothing."""
        self.session = session
        self.call("Page.bringToFront")

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        self.sender.write(json.dumps(message).encode() + b"\0")
        self.sender.flush()
        while True:
            answer = json.loads(b"".join(iter(lambda: self.receiver.read(1), b"\0")))
            if answer.get("id") == self.number:
                return answer["result"]
            self.events.append(answer)

    def run(self, script):
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, (script, answer)
        return answer["result"].get("value")

    def wait_for(self, script, *, seconds=60):
        end = time.monotonic() + seconds
        while not self.run(f"!!({script})"):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def open(self, url, *, width=1280, height=900, dark=False):
        """Show a page at a size, light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState == 'complete'")

    def press(self, key, code, text=""):
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                text=text,
                windowsVirtualKeyCode=code,
            )

    def give_files(self, query, *paths):
        """Choose files in a field for files, as a person does in the dialogue."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        field = self.call("DOM.querySelector", nodeId=root, selector=query)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=field, files=[str(path) for path in paths])

    def save_into(self, folder):
        """Save what is downloaded into a folder, under the names that the page gives."""
        session, self.session = self.session, {}
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self.session = session

    def picture(self, path, *, whole=True):
        """Write a screenshot as PNG, for people who look at a page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def faults(self):
        """Return what the page complained of: exceptions, errors and lines of its console."""
        methods = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
        return [one for one in self.events if one["method"] in methods]

    def asked(self):
        """Return the addresses that the page asked for."""
        return [
            one["params"]["request"]["url"]
            for one in self.events
            if one["method"] == "Network.requestWillBeSent"
        ]

    def close(self):
        """End it."""
        self.process.kill()
        self.process.wait()
        self.sender.close()
        self.receiver.close()
