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
    from motionmerge.errors import MotionMergeError as MotionMergeError
    from motionmerge.merging.algebra.functions import low_rank as low_rank
    from motionmerge.merging.algebra.functions import ties as ties
    from motionmerge.merging.algebra.functions import trim as trim
    from motionmerge.merging.algebra.groups import only as only
    from motionmerge.merging.algebra.nodes import Checkpoint as Checkpoint
    from motionmerge.merging.algebra.sparsify import dare as dare
    from motionmerge.merging.in_memory import apply as apply
    from motionmerge.merging.lora.task_vector import lora as lora
    from motionmerge.merging.merge import merge as merge
    from motionmerge.merging.recipes.functions import register_function as register_function
    from motionmerge.merging.recipes.recipe import Recipe as Recipe
    from motionmerge.models.dynamicrafter.scheduler import (
        DynamicRescaleDDIMScheduler as DynamicRescaleDDIMScheduler,
    )
    from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet as DynamiCrafterUNet
    from motionmerge.sampling.pipelines.dynamicrafter import (
        DynamiCrafterPipeline as DynamiCrafterPipeline,
    )
    from motionmerge.sampling.pipelines.pocket import load_pocket as load_pocket
    from motionmerge.schedule import ExpertSchedule as ExpertSchedule
    from motionmerge.switching.expert_bank import experts as experts

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "motionmerge.merging.algebra.nodes",
    "DynamiCrafterPipeline": "motionmerge.sampling.pipelines.dynamicrafter",
    "DynamiCrafterUNet": "motionmerge.models.dynamicrafter.unet",
    "DynamicRescaleDDIMScheduler": "motionmerge.models.dynamicrafter.scheduler",
    "ExpertSchedule": "motionmerge.schedule",
    "MotionMergeError": "motionmerge.errors",
    "Recipe": "motionmerge.merging.recipes.recipe",
    "apply": "motionmerge.merging.in_memory",
    "dare": "motionmerge.merging.algebra.sparsify",
    "experts": "motionmerge.switching.expert_bank",
    "load_pocket": "motionmerge.sampling.pipelines.pocket",
    "lora": "motionmerge.merging.lora.task_vector",
    "merge": "motionmerge.merging.merge",
    "low_rank": "motionmerge.merging.algebra.functions",
    "only": "motionmerge.merging.algebra.groups",
    "register_function": "motionmerge.merging.recipes.functions",
    "ties": "motionmerge.merging.algebra.functions",
    "trim": "motionmerge.merging.algebra.functions",
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
    "register_function",
    "ties",
    "trim",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'motionmerge' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
