"""More motion, and motion that obeys the prompt, for image-to-video models, by merging weights.

    motion      = tuned - base
    dynamics    = base  + 0.75 * dare(-0.25 * motion, drop_rate=0.7, seed=0)    # while it is noisy
    consistency = tuned + 0.25 * dare(motion, drop_rate=0.7, seed=1)            # for the details

The public names are loaded on first use, so that `import motionmerge` imports no torch.
Paper: Tian et al., CVPR 2025 (arXiv 2503.00948).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from motionmerge.version import __version__ as __version__

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from motionmerge.errors import CheckpointError as CheckpointError
    from motionmerge.errors import ConfigError as ConfigError
    from motionmerge.errors import DataError as DataError
    from motionmerge.errors import MotionMergeError as MotionMergeError
    from motionmerge.errors import RecipeError as RecipeError
    from motionmerge.errors import ShapeError as ShapeError
    from motionmerge.exports.files import export_comfyui as export_comfyui
    from motionmerge.exports.loras import export_loras as export_loras
    from motionmerge.exports.two_experts import export_two_experts as export_two_experts
    from motionmerge.io.video import contact_sheet as contact_sheet
    from motionmerge.io.video import load_image as load_image
    from motionmerge.io.video import read_video as read_video
    from motionmerge.io.video import write_video as write_video
    from motionmerge.io.weights import open_weights as open_weights
    from motionmerge.merging.algebra.functions import low_rank as low_rank
    from motionmerge.merging.algebra.functions import ties as ties
    from motionmerge.merging.algebra.functions import trim as trim
    from motionmerge.merging.algebra.groups import only as only
    from motionmerge.merging.algebra.nodes import Checkpoint as Checkpoint
    from motionmerge.merging.algebra.sparsify import dare as dare
    from motionmerge.merging.compare import compare as compare
    from motionmerge.merging.in_memory import apply as apply
    from motionmerge.merging.in_memory import realise as realise
    from motionmerge.merging.lora.task_vector import lora as lora
    from motionmerge.merging.merge import merge as merge
    from motionmerge.merging.recipes.functions import register_function as register_function
    from motionmerge.merging.recipes.recipe import Recipe as Recipe
    from motionmerge.models.consisti2v.unet import ConsistI2VUNet as ConsistI2VUNet
    from motionmerge.models.dynamicrafter.scheduler import (
        DynamicRescaleDDIMScheduler as DynamicRescaleDDIMScheduler,
    )
    from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet as DynamiCrafterUNet
    from motionmerge.models.pocket.world import load_photo as load_photo
    from motionmerge.sampling.pipelines.consisti2v import ConsistI2VPipeline as ConsistI2VPipeline
    from motionmerge.sampling.pipelines.dynamicrafter import (
        DynamiCrafterPipeline as DynamiCrafterPipeline,
    )
    from motionmerge.sampling.pipelines.pocket import load_pocket as load_pocket
    from motionmerge.sampling.pipelines.start_latents import AnalyticInit as AnalyticInit
    from motionmerge.sampling.pipelines.start_latents import FrameInit as FrameInit
    from motionmerge.sampling.pipelines.start_latents import StartLatents as StartLatents
    from motionmerge.sampling.pipelines.start_latents import read_statistics as read_statistics
    from motionmerge.sampling.pipelines.videocrafter import (
        VideoCrafterPipeline as VideoCrafterPipeline,
    )
    from motionmerge.sampling.request.folder import find_pipeline as find_pipeline
    from motionmerge.sampling.request.loading import default_device as default_device
    from motionmerge.sampling.request.loading import load_pipeline as load_pipeline
    from motionmerge.sampling.request.loading import place as place
    from motionmerge.sampling.videos.make_video import make_video as make_video
    from motionmerge.sampling.videos.settings import VideoSettings as VideoSettings
    from motionmerge.schedule import ExpertSchedule as ExpertSchedule
    from motionmerge.switching.expert_bank import experts as experts

_NAMES = {
    "errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "MotionMergeError",
        "RecipeError",
        "ShapeError",
    ),
    "exports.files": ("export_comfyui",),
    "exports.loras": ("export_loras",),
    "exports.two_experts": ("export_two_experts",),
    "io.video": (
        "contact_sheet",
        "load_image",
        "read_video",
        "write_video",
    ),
    "io.weights": ("open_weights",),
    "merging.algebra.functions": (
        "low_rank",
        "ties",
        "trim",
    ),
    "merging.algebra.groups": ("only",),
    "merging.algebra.nodes": ("Checkpoint",),
    "merging.algebra.sparsify": ("dare",),
    "merging.compare": ("compare",),
    "merging.in_memory": (
        "apply",
        "realise",
    ),
    "merging.lora.task_vector": ("lora",),
    "merging.merge": ("merge",),
    "merging.recipes.functions": ("register_function",),
    "merging.recipes.recipe": ("Recipe",),
    "models.consisti2v.unet": ("ConsistI2VUNet",),
    "models.dynamicrafter.scheduler": ("DynamicRescaleDDIMScheduler",),
    "models.dynamicrafter.unet": ("DynamiCrafterUNet",),
    "models.pocket.world": ("load_photo",),
    "sampling.pipelines.consisti2v": ("ConsistI2VPipeline",),
    "sampling.pipelines.dynamicrafter": ("DynamiCrafterPipeline",),
    "sampling.pipelines.pocket": ("load_pocket",),
    "sampling.pipelines.start_latents": (
        "AnalyticInit",
        "FrameInit",
        "StartLatents",
        "read_statistics",
    ),
    "sampling.pipelines.videocrafter": ("VideoCrafterPipeline",),
    "sampling.request.folder": ("find_pipeline",),
    "sampling.request.loading": (
        "default_device",
        "load_pipeline",
        "place",
    ),
    "sampling.videos.make_video": ("make_video",),
    "sampling.videos.settings": ("VideoSettings",),
    "schedule": ("ExpertSchedule",),
    "switching.expert_bank": ("experts",),
}
"""The public names of each module."""

_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    from motionmerge.packages import public_name

    value = public_name("motionmerge", _HOMES, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
