"""What a training run keeps on disk: states to go on from, and a log without double lines.

A state belongs to one run: it carries a fingerprint of the settings, the data, the objective, the
names of what is trained and the weights that the run began with. Another run's state is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from motionmerge.errors import CheckpointError, DataError
from motionmerge.io.atomic import atomic_path, write_whole

from .run_log import LOG, read_log

_STATE = re.compile(r"state-(\d{8})(\.pt)?")
_REST = "rest.pt"
"""In the folder that is the state of a sharded run: what is no part of any process."""


def weights_hash(module: nn.Module) -> str:
    """Hash all weights and buffers of a module, with their names, types and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(numbers.numpy())
    return digest.hexdigest()


class RunFolder:
    """The states and the log of one run.

    Args:
        folder: Made when missing.
        fingerprint: What the run is; see above. JSON values.
        keep: How many of the newest states stay.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], *, keep: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.keep = folder, keep
        self.fingerprint = json.loads(json.dumps(fingerprint, default=str))

    def states(self) -> list[Path]:
        """Return the states that are there, the newest first."""
        found = (path for path in self.folder.glob("state-*") if _STATE.fullmatch(path.name))
        return sorted(found, reverse=True)

    def load(self) -> dict[str, Any] | None:
        """Read the newest state; None at the start of a run.

        Raises:
            CheckpointError: It cannot be read, or another run saved it.
        """
        newest = next(iter(self.states()), None)
        if newest is None:
            return None
        try:
            file = newest / _REST if newest.is_dir() else newest
            saved = torch.load(file, map_location="cpu", weights_only=True)
            fingerprint = saved["fingerprint"]
        except Exception as error:  # torch names a torn file in many ways
            raise CheckpointError(
                f"{newest} cannot be read: {str(error)[:200]}",
                fix="Remove it: the run goes on from the state before it.",
            ) from error
        changed = [
            f"{key}: {fingerprint.get(key)!r} then, {self.fingerprint.get(key)!r} now"
            for key in sorted({*fingerprint, *self.fingerprint})
            if fingerprint.get(key) != self.fingerprint.get(key)
        ]
        if changed:
            raise CheckpointError(
                f"{newest} was saved with other settings or inputs: {'; '.join(changed)[:600]}.",
                fix="Choose another run folder, or remove this one to start again.",
            )
        return {**saved, "path": newest}

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a state whole or not at all, and remove the oldest beyond `keep`.

        Raises:
            DataError: The disk is full, or refuses otherwise; the states before are still there.
        """
        self._save(self.folder / f"state-{step:08d}.pt", step, state)
        self._remove_old()

    def unfinished(self, step: int) -> Path:
        """Return the folder in which a sharded state is written before it is `finish`ed."""
        return self.folder / f".state-{step:08d}"

    def finish(self, step: int, state: Mapping[str, Any]) -> None:
        """Add to a sharded state what is no part of any process; then it counts.

        Raises:
            DataError: As `save`.
        """
        folder = self.unfinished(step)
        self._save(folder / _REST, step, state)
        whole = self.folder / f"state-{step:08d}"
        shutil.rmtree(whole, ignore_errors=True)
        folder.rename(whole)
        self._remove_old()

    def _save(self, path: Path, step: int, state: Mapping[str, Any]) -> None:
        try:
            with atomic_path(path) as temporary:
                torch.save({"fingerprint": self.fingerprint, "step": step, **state}, temporary)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"Cannot write {path}: {error}",
                fix="Free space and start the same command again: it goes on.",
            ) from error

    def _remove_old(self) -> None:
        for old in self.states()[self.keep :]:
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)

    def log(self, line: Mapping[str, Any], *, name: str = LOG) -> None:
        """Append a line to a log."""
        with (self.folder / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def trim_log(self, step: int, *, name: str = LOG) -> None:
        """Drop what was logged after `step`, which will be done again, and a torn last line."""
        kept = [line for line in self.lines(name=name) if line["step"] <= step] if step else []
        if kept or (self.folder / name).exists():
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_whole(self.folder / name, text)

    def lines(self, *, name: str = LOG) -> Iterator[dict[str, Any]]:
        """Yield the lines of a log; see `read_log`."""
        return read_log(self.folder / name)
