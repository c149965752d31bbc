"""What a training run keeps on disk: states to go on from, and a log without double lines.

A state belongs to one run: it carries a fingerprint of the settings, the data, the objective, the
names of what is trained and the weights that the run began with. Another run's state is refused; in
place of one that is damaged, the state before it is used, and a warning says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from motionmerge.errors import CheckpointError, DataError
from motionmerge.io.atomic import atomic_path, disk_errors, write_whole
from motionmerge.io.paths import open_plain_file
from motionmerge.memory import gigabytes

from .run_log import LOG, read_log
from .settings import TrainerSettings

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


def fingerprint_of(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    settings: TrainerSettings,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what makes a run this one; without what may change between two sittings."""
    free = {"save_every", "log_every", "save_minutes", "keep_states", "gradient_checkpointing"}
    if settings.decay == "none":
        free.add("steps")  # more steps go on as the first ones did
    trained = {id(parameter) for parameter in parameters}
    names = [name for name, value in module.named_parameters() if id(value) in trained]
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key not in free},
        "trained": names,
        "base": weights_hash(module),
        **identity,
    }


def states_in(folder: Path) -> list[Path]:
    """Return the states in a run's folder, the newest first."""
    found = (path for path in folder.glob("state-*") if _STATE.fullmatch(path.name))
    return sorted(found, reverse=True)


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
        return states_in(self.folder)

    def load(self) -> dict[str, Any] | None:
        """Read the newest state that is whole; None at the start of a run.

        Raises:
            CheckpointError: There are states and none of them is whole, or another run saved it.
        """
        faults: list[str] = []
        for path in self.states():
            try:
                saved = _read_state(path)
            except (OSError, ValueError) as error:
                faults.append(f"{path} cannot be read: {str(error).partition(chr(10))[0][:200]}")
                continue
            self._check_is_of_this_run(path, saved["fingerprint"])
            if faults:
                warnings.warn(
                    f"{'; '.join(faults)}. The run goes on from {path.name}.", stacklevel=2
                )
            return {**saved, "path": path}
        if faults:
            raise CheckpointError(
                f"{'; '.join(faults)}. There is no state before.",
                fix="Remove it to start again, or choose another run folder.",
            )
        return None

    def _check_is_of_this_run(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        changed = [
            f"{key}: {fingerprint.get(key)!r} then, {self.fingerprint.get(key)!r} now"
            for key in sorted({*fingerprint, *self.fingerprint})
            if fingerprint.get(key) != self.fingerprint.get(key)
        ]
        if changed:
            raise CheckpointError(
                f"{path} was saved with other settings or inputs: {'; '.join(changed)[:600]}.",
                fix="Choose another run folder, or remove this one to start again.",
            )

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a state whole or not at all, and remove the oldest beyond `keep`.

        Raises:
            DataError: The disk is full, or refuses otherwise; the states before are still there.
        """
        self._save(self.folder / f"state-{step:08d}.pt", step, state)
        self._remove_old(step)

    def unfinished(self, step: int) -> Path:
        """Return the folder in which a sharded state is written before it is `finish`ed."""
        return self.folder / f".state-{step:08d}"

    def finish(self, step: int, state: Mapping[str, Any]) -> None:
        """Add to a sharded state what is no part of any process; then it counts.

        Raises:
            DataError: As `save`.
        """
        folder = self.unfinished(step)
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        self._save(folder / _REST, step, {**state, "sizes": sizes})
        whole = self.folder / f"state-{step:08d}"
        shutil.rmtree(whole, ignore_errors=True)
        folder.rename(whole)
        self._remove_old(step)

    def _save(self, path: Path, step: int, state: Mapping[str, Any]) -> None:
        content = {"fingerprint": self.fingerprint, "step": step, **state}
        try:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())  # else it may be renamed before it is there
        except (OSError, RuntimeError) as error:
            free = gigabytes(shutil.disk_usage(self.folder).free)
            # A disk that takes a part alone is a riddle about positions to torch.
            reason = error if isinstance(error, OSError) else f"the disk took a part; {free} free"
            raise DataError(
                f"Cannot write {path}: {reason}",
                fix="Free space and start the same command again: it goes on.",
            ) from error

    def _remove_old(self, newest: int) -> None:
        """Remove all but the newest states; those above `newest` are damaged, and not counted."""
        there = [path for path in self.states() if _step_of(path) <= newest]
        for old in there[self.keep :]:
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)

    def log(self, line: Mapping[str, Any], *, name: str = LOG) -> None:
        """Append a line to a log.

        Raises:
            DataError: The disk is full, or refuses otherwise.
        """
        path = self.folder / name
        with disk_errors(DataError, path), path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def trim_log(self, step: int, *, name: str = LOG) -> None:
        """Drop what was logged after `step`, which will be done again, and a torn last line."""
        kept = [line for line in self.lines(name=name) if line["step"] <= step] if step else []
        if kept or (self.folder / name).exists():
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_whole(self.folder / name, text)

    def last_loss(self, steps: int) -> float | None:
        """Compute the mean loss over the last tenth of a run; None if the log has none of it."""
        last = [one.get("loss") for one in self.lines() if one["step"] > 0.9 * steps]
        known = [float(loss) for loss in last if isinstance(loss, (int, float))]
        return sum(known) / len(known) if known else None

    def lines(self, *, name: str = LOG) -> Iterator[dict[str, Any]]:
        """Yield the lines of a log; see `read_log`."""
        return read_log(self.folder / name)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("state-"))


def _read_state(path: Path) -> dict[str, Any]:
    """Read a state, all of whose bytes are what they were when it was saved.

    Of a sharded one what is no part of any process is read, and that the parts are as long.

    Raises:
        ValueError: It is damaged, or no state.
        OSError: It cannot be read.
    """
    is_sharded = path.is_dir()
    with open_plain_file(path / _REST if is_sharded else path) as file:
        try:
            with zipfile.ZipFile(file) as archive:  # torch writes checksums, and reads none
                damaged = archive.testzip()
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch names a torn file in many ways
            raise ValueError(str(error)) from error
    if damaged is not None:
        raise ValueError(f"its checksum of {damaged} is another")
    if not isinstance(saved, dict) or not isinstance(saved.get("fingerprint"), dict):
        raise ValueError("it has no fingerprint of a run")
    if saved.get("step") != _step_of(path):
        raise ValueError(f"it is of step {saved.get('step')}")
    for name, size in saved.get("sizes", {}).items() if is_sharded else ():
        part = path / Path(name).name
        if part.stat().st_size != size:
            raise ValueError(f"{part.name} has {part.stat().st_size} bytes, and had {size}")
    return saved
