"""A ComfyUI server on this machine with our nodes, and workflows posted to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..comfyui_pack.load import PACK


class Server:
    """A running server.

    Attributes:
        base: Its folder of models, nodes and outputs.
    """

    def __init__(self, address: str, base: Path) -> None:
        self.address, self.base = address, base

    def ask(self, path: str, body: Any = None) -> Any:
        """Return the JSON that the server answers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}{path}", data=data)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Run a workflow in the form of the API, and return what is in its history."""
        number = self.ask("/prompt", {"prompt": workflow})["prompt_id"]
        for _ in range(600):
            history = self.ask(f"/history/{number}")
            if number in history:
                return history[number]
            time.sleep(0.1)
        raise TimeoutError(number)

    def latents(self, workflow: dict[str, Any], node: str) -> Any:
        """Run a workflow, and return what its SaveLatent wrote."""
        from safetensors.torch import load_file

        done = self.run(workflow)
        assert done["status"]["status_str"] == "success", done["status"]["messages"]
        (saved,) = done["outputs"][node]["latents"]
        return load_file(self.base / "output" / saved["subfolder"] / saved["filename"])[
            "latent_tensor"
        ]


@contextmanager
def running(base: Path) -> Iterator[Server]:
    """Start a server with our nodes, and stop it."""
    nodes = base / "custom_nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    (nodes / "motionmerge-nodes").symlink_to(PACK)
    (nodes / "test_nodes").symlink_to(Path(__file__).parent / "test_nodes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port),
        "--disable-auto-launch", "--disable-api-nodes", "--base-directory", str(base),
    ]  # fmt: skip
    checkout = os.environ["MOTIONMERGE_COMFYUI"]
    with (base / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=checkout, stdout=log, stderr=subprocess.STDOUT)
        try:
            server = Server(f"http://127.0.0.1:{port}", base)
            for _ in range(240):
                try:
                    server.ask("/system_stats")
                    break
                except OSError:
                    assert process.poll() is None, (base / "log.txt").read_text()
                    time.sleep(0.5)
            yield server
        finally:
            process.terminate()
            process.wait(30)
