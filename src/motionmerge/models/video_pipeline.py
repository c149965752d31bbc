"""What we rely on of a diffusers pipeline and its scheduler; their classes are not known before.

Parts that only some families have, such as `audio_vae`, are found among the `components`. The
classes of diffusers have all of these already, and need not know the protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

Config: TypeAlias = Mapping[str, Any]
"""A configuration of diffusers, read from JSON; what its values are, its class says."""


class Scheduler(Protocol):
    """The timesteps of a video."""

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    @property
    def config(self) -> Config: ...
    @classmethod
    def from_config(cls, config: Config, **changes: object) -> Scheduler: ...

    # Each class has arguments of its own.
    def set_timesteps(self, *arguments: Any, **options: Any) -> None: ...


class VideoPipeline(Protocol):
    """A pipeline that makes videos from images, modular or not."""

    scheduler: Scheduler
    progress_bar: Callable[..., object]

    @property
    def config(self) -> Config: ...
    @property
    def components(self) -> Mapping[str, Any]: ...
    @property
    def _execution_device(self) -> torch.device: ...
    def set_progress_bar_config(self, **options: bool | str) -> None: ...
    def register_modules(self, **modules: object) -> None: ...
    def to(self, device: torch.device) -> object: ...

    # Each class has arguments of its own; with "pt" and "latent" its output holds tensors.
    def __call__(self, *arguments: Any, **options: Any) -> Any: ...
