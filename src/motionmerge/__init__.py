"""More motion, and motion that obeys the prompt, for image-to-video models, by merging weights.

    motion      = tuned - base
    dynamics    = base  + 0.75 * dare(-0.25 * motion, drop_rate=0.7, seed=0)    # while it is noisy
    consistency = tuned + 0.25 * dare(motion, drop_rate=0.7, seed=1)            # for the details

The public names are loaded on first use, so that `import motionmerge` imports no torch.
Paper: Tian et al., CVPR 2025 (arXiv 2503.00948).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from motionmerge import merge as merge
    from motionmerge.errors import MotionMergeError as MotionMergeError
    from motionmerge.merge.algebra import Checkpoint as Checkpoint
    from motionmerge.merge.functions import low_rank as low_rank
    from motionmerge.merge.functions import ties as ties
    from motionmerge.merge.functions import trim as trim
    from motionmerge.merge.groups import only as only
    from motionmerge.merge.in_memory import apply as apply
    from motionmerge.merge.lora import lora as lora
    from motionmerge.merge.recipe import Recipe as Recipe
    from motionmerge.merge.sparsify import dare as dare
    from motionmerge.models.dynamicrafter.scheduler import (
        DynamicRescaleDDIMScheduler as DynamicRescaleDDIMScheduler,
    )
    from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet as DynamiCrafterUNet
    from motionmerge.sampling.dynamicrafter_pipeline import (
        DynamiCrafterPipeline as DynamiCrafterPipeline,
    )
    from motionmerge.sampling.expert_bank import experts as experts
    from motionmerge.sampling.pocket_pipeline import load_pocket as load_pocket
    from motionmerge.schedule import ExpertSchedule as ExpertSchedule

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "motionmerge.merge.algebra",
    "DynamiCrafterPipeline": "motionmerge.sampling.dynamicrafter_pipeline",
    "DynamiCrafterUNet": "motionmerge.models.dynamicrafter.unet",
    "DynamicRescaleDDIMScheduler": "motionmerge.models.dynamicrafter.scheduler",
    "ExpertSchedule": "motionmerge.schedule",
    "MotionMergeError": "motionmerge.errors",
    "Recipe": "motionmerge.merge.recipe",
    "apply": "motionmerge.merge.in_memory",
    "dare": "motionmerge.merge.sparsify",
    "experts": "motionmerge.sampling.expert_bank",
    "load_pocket": "motionmerge.sampling.pocket_pipeline",
    "lora": "motionmerge.merge.lora",
    "low_rank": "motionmerge.merge.functions",
    "only": "motionmerge.merge.groups",
    "ties": "motionmerge.merge.functions",
    "trim": "motionmerge.merge.functions",
}

__all__ = [
    "Checkpoint",
    "DynamiCrafterPipeline",
    "DynamiCrafterUNet",
    "DynamicRescaleDDIMScheduler",
    "ExpertSchedule",
    "MotionMergeError",
    "Recipe",
    "__version__",
    "apply",
    "dare",
    "experts",
    "load_pocket",
    "lora",
    "low_rank",
    "merge",
    "only",
    "ties",
    "trim",
]


def __getattr__(name: str) -> Any:
    if name == "merge":  # both a package and a function: the package can be called
        return import_module("motionmerge.merge")
    if name not in _HOMES:
        raise AttributeError(f"module 'motionmerge' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
