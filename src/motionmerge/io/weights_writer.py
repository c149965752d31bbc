"""Where results grow: one file, a folder of shards with an index, or a whole pipeline folder.

Each appears under its name only when it is whole. File names are those of diffusers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from motionmerge.errors import ConfigError
from motionmerge.io.atomic import atomic_folder, atomic_path
from motionmerge.io.folder_copy import copy_folder
from motionmerge.io.safetensors_file import SafetensorsWriter, TensorSpec
from motionmerge.tensors import num_bytes

STEM = "diffusion_pytorch_model"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")


class WeightsWriter:
    """Open files that together hold every tensor of a result; any thread may write."""

    def __init__(self, homes: Mapping[str, tuple[SafetensorsWriter, str]]) -> None:
        self._homes = homes

    def place(self, name: str) -> tuple[object, int]:
        """Return the file and the byte in it where a tensor begins.

        What is next to it there can be written together with it.
        """
        file, key = self._homes[name]
        return file.place(key)

    def write_at(self, name: str, begin: int, data: memoryview) -> None:
        """Write bytes of a tensor from `begin` on.

        Raises:
            CheckpointError: The disk refuses, e.g. because it is full.
        """
        file, key = self._homes[name]
        file.write_at(key, begin, data)


@contextmanager
def weights_file(
    path: Path, specs: Mapping[str, TensorSpec], *, metadata: Mapping[str, str] | None = None
) -> Iterator[WeightsWriter]:
    """Grow one safetensors file.

    Raises:
        CheckpointError: The disk refuses.
    """
    with atomic_path(path) as temporary, SafetensorsWriter(temporary, specs, metadata) as file:
        yield WeightsWriter({name: (file, name) for name in specs})


@contextmanager
def weights_folder(
    path: Path,
    specs: Mapping[str, TensorSpec],
    *,
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
) -> Iterator[WeightsWriter]:
    """Grow a folder of shards with an index, as diffusers reads it.

    Raises:
        CheckpointError: The disk refuses.
    """
    with atomic_folder(path) as folder, ExitStack() as stack:
        yield WeightsWriter(_open_shards(folder, specs, max_shard_bytes, metadata, stack))


@contextmanager
def pipeline_folder(
    path: Path,
    specs: Mapping[str, TensorSpec],
    *,
    template: Path,
    max_shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    metadata_of: Mapping[str, Mapping[str, str]] | None = None,
    files: Mapping[str, str] | None = None,
    folders: Mapping[str, Path] | None = None,
) -> Iterator[WeightsWriter]:
    """Grow a copy of a diffusers pipeline folder in which some modules have other weights.

    Other weights are hard-linked where the disk can link; everything else is copied.

    Args:
        path: The folder.
        specs: Dtype and shape of the tensors; `unet.key` is `key` of the module `unet`.
        template: The pipeline folder that gives all else.
        max_shard_bytes: Split a module's weights into shards of at most so many bytes.
        metadata: Text to keep in the headers.
        metadata_of: Further text by module.
        files: Texts of files that are new or other than those of `template`, by relative path.
        folders: Folders that are copied into it, by name.

    Raises:
        CheckpointError: The disk refuses.
    """
    modules: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        module, _, key = name.partition(".")
        modules.setdefault(module, {})[key] = spec
    with atomic_folder(path) as folder, ExitStack() as stack:
        copy_folder(template, folder, leave_out=lambda path: is_weights_of(path, modules))
        for name, source in (folders or {}).items():
            copy_folder(source, folder / name)
        homes = {}
        for module, parts in modules.items():
            (folder / module).mkdir(exist_ok=True)
            texts = {**(metadata or {}), **(metadata_of or {}).get(module, {})}
            opened = _open_shards(folder / module, parts, max_shard_bytes, texts, stack)
            homes.update({f"{module}.{key}": home for key, home in opened.items()})
        for name, text in (files or {}).items():
            (folder / name).unlink(missing_ok=True)  # it may be a link to that of the template
            (folder / name).write_text(text, encoding="utf-8")
        yield WeightsWriter(homes)


def is_weights_of(path: Path, modules: Collection[str]) -> bool:
    """Check whether a file of a pipeline folder holds weights of some modules, or their index."""
    return (
        len(path.parts) == 2
        and path.parts[0] in modules
        and (path.suffix in _WEIGHT_SUFFIXES or ".index." in path.name)
    )


def plan_shards(
    specs: Mapping[str, TensorSpec], max_shard_bytes: int | None
) -> list[dict[str, TensorSpec]]:
    """Deal tensors, in order, into shards that stay below a size where single tensors allow it."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        size = num_bytes(*spec)
        if max_shard_bytes is not None and shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += size
    return shards


def free_bytes(path: Path) -> int:
    """Return the free space of the disk that a path lies on, or would lie on."""
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def parse_size(size: int | str) -> int:
    """Read a number of bytes from `"5GB"`, `"500MB"`, `"2GiB"` or a plain number.

    Raises:
        ConfigError: It is none of these, or not positive.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(I?)B?", str(size).strip().upper())
    if found is None or (found[3] and not found[2]) or float(found[1]) == 0:
        raise ConfigError(f"`{size}` is not a size.", fix="Write e.g. `5GB` or `500MB`.")
    unit = 1024 if found[3] else 1000
    return max(1, int(float(found[1]) * unit ** " KMGT".index(found[2] or " ")))


def _open_shards(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    max_shard_bytes: int | None,
    metadata: Mapping[str, str] | None,
    stack: ExitStack,
) -> dict[str, tuple[SafetensorsWriter, str]]:
    shards = plan_shards(specs, max_shard_bytes)
    homes, weight_map = {}, {}
    for number, shard in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = stack.enter_context(
            SafetensorsWriter(folder / f"{STEM}{part}.safetensors", shard, metadata)
        )
        for name in shard:
            homes[name] = (file, name)
            weight_map[name] = file.path.name
    if len(shards) > 1:
        total = sum(num_bytes(*spec) for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{STEM}.safetensors.index.json").write_text(text, encoding="utf-8")
    return homes
