"""DynamiCrafter as diffusers classes: U-Net, adapter, image projector, towers, scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from motionmerge.packages import public_name

if TYPE_CHECKING:
    from .adapter import TextToTemporalAdapter as TextToTemporalAdapter
    from .checkpoint_folder import convert_checkpoint as convert_checkpoint
    from .checkpoint_folder import inspect_checkpoint as inspect_checkpoint
    from .checkpoint_folder import to_official as to_official
    from .conversion import convert_unet_state_dict as convert_unet_state_dict
    from .conversion import from_original as from_original
    from .conversion import unconvert_unet_state_dict as unconvert_unet_state_dict
    from .image_projector import ImageProjector as ImageProjector
    from .official_config import unet_config_from_official as unet_config_from_official
    from .scheduler import DynamicRescaleDDIMScheduler as DynamicRescaleDDIMScheduler
    from .unet import DynamiCrafterUNet as DynamiCrafterUNet

_HOME = {
    "DynamiCrafterUNet": "unet",
    "TextToTemporalAdapter": "adapter",
    "ImageProjector": "image_projector",
    "DynamicRescaleDDIMScheduler": "scheduler",
    "convert_unet_state_dict": "conversion",
    "unet_config_from_official": "official_config",
    "unconvert_unet_state_dict": "conversion",
    "from_original": "conversion",
    "convert_checkpoint": "checkpoint_folder",
    "inspect_checkpoint": "checkpoint_folder",
    "to_official": "checkpoint_folder",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    return public_name(__name__, _HOME, name)
