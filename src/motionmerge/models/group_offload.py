"""diffusers' group offload to files, with a new folder for each network.

diffusers names the files after layers, and reads a file that is there already: layers of the same
name in another part of the pipeline, or weights of an earlier run, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from motionmerge.errors import ConfigError


class OffloadedNetwork:
    """A network whose weights are never read from another one's files."""

    def enable_group_offload(
        self, *arguments: Any, offload_to_disk_path: str | Path | None = None, **options: Any
    ) -> None:
        """Enable diffusers' group offload; the options are its own.

        Raises:
            ConfigError: There are such files in the folder already.
        """
        if offload_to_disk_path is not None:
            check_new_files(offload_to_disk_path)
            options["offload_to_disk_path"] = str(offload_to_disk_path)
        base: Any = super()
        base.enable_group_offload(*arguments, **options)


class OffloadedPipeline:
    """A pipeline whose parts have a folder each."""

    components: Mapping[str, Any]

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        *,
        offload_to_disk_path: str | Path | None = None,
        exclude_modules: str | Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Enable diffusers' group offload for all parts; the options are its own.

        Args:
            onload_device: Where they compute.
            offload_to_disk_path: A folder, in which each part gets one of its name.
            exclude_modules: Parts that stay on the device.
            options: See diffusers.

        Raises:
            ConfigError: There are such files in a part's folder already.
        """
        kept = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules)
        if offload_to_disk_path is None:
            base: Any = super()
            base.enable_group_offload(onload_device, exclude_modules=kept, **options)
            return
        parts = {
            name: part for name, part in self.components.items() if isinstance(part, nn.Module)
        }
        folders = {name: Path(offload_to_disk_path) / name for name in parts if name not in kept}
        for folder in folders.values():
            check_new_files(folder)
        for name, part in parts.items():
            if name in kept:
                part.to(onload_device)
                continue
            enable = getattr(part, "enable_group_offload", partial(apply_group_offloading, part))
            enable(onload_device=onload_device, offload_to_disk_path=str(folders[name]), **options)


def check_new_files(folder: str | Path) -> None:
    """Refuse a folder with files of group offload, which would be read in place of the weights.

    Raises:
        ConfigError: It has some.
    """
    if any(Path(folder).glob("group_*.safetensors")):
        raise ConfigError(
            f"{folder} holds weights of an earlier group offload, which would be used again.",
            fix="Choose an empty folder, or delete its files `group_*.safetensors`.",
        )
