"""What diffusers and accelerate keep in a module privately: hooks, caches, fused projections.

All private names of theirs that we rely on are here, so that a new version has one place to mend.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.hooks.faster_cache import FasterCacheBlockHook
from diffusers.hooks.hooks import StateManager
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention
from torch import nn

from motionmerge.models.plain_layers import is_only_called

_CASTS = {"layerwise_casting", "peft_autocast_disable"}


def is_hooked(module: nn.Module) -> bool:
    """Return whether hooks run in its calls: offloading, caches, casts by layer.

    Hooks that torch itself runs count where they are on parts of it: its own are called by
    whoever calls it.
    """
    return any(hasattr(module, name) for name in ("_hf_hook", "_diffusers_hook")) or any(
        hasattr(child, "_diffusers_hook") or not is_only_called(child)
        for child in module.modules()
        if child is not module
    )


def moves_weights(module: nn.Module) -> bool:
    """Return whether hooks inside it bring weights for every call, or count calls.

    diffusers' prefetching expects each layer once a step. Casts by layer do neither.
    """
    for child in module.modules():
        own = vars(child)
        if "_hf_hook" in own:
            return True
        registry = own.get("_diffusers_hook")
        if registry is not None and not registry.hooks.keys() <= _CASTS:
            return True
    return False


def computing_device(module: nn.Module) -> torch.device:
    """Find where a module computes, which with model offload is not where it is."""
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    tensors: Any = (tensor for group in (module.parameters(), module.buffers()) for tensor in group)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def is_fused(module: nn.Module) -> bool:
    """Return whether attention computes queries, keys and values by one product."""
    fused = [child for child in module.modules() if getattr(child, "fused_projections", False)]
    # The older kind of attention stays marked when it is unfused: its processor tells.
    return any(
        not isinstance(child, Attention) or "Fused" in type(child.processor).__name__
        for child in fused
    )


def group_offload_hooks(module: nn.Module) -> list[Any]:
    """List the hooks by which diffusers offloads parts of a module in groups."""
    registries = (getattr(child, "_diffusers_hook", None) for child in module.modules())
    hooks = (registry.get_hook("group_offloading") for registry in registries if registry)
    return [hook for hook in hooks if hook is not None]


def waits_in_files(module: nn.Module) -> bool:
    """Return whether diffusers offloads parts of a module to files: they hold nothing meanwhile."""
    return any(hook.group.offload_to_disk_path for hook in group_offload_hooks(module))


def reset_caches(module: nn.Module) -> None:
    """Clear diffusers' caches, which hold results of the other expert; keep their context.

    The reset forgets which call (conditional or not) is under way, and MagCache's count of the
    steps, which says how much to expect of the next; these are put back. An empty
    FasterCache of a guidance-distilled model is read all the same, unless it is due to be filled.
    """
    reset: Any = getattr(module, "_reset_stateful_cache", None)
    if reset is None:
        return
    hooks = [
        hook
        for child in module.modules()
        for hook in getattr(getattr(child, "_diffusers_hook", None), "hooks", {}).values()
    ]
    managers = {
        id(value): value
        for hook in hooks
        for value in vars(hook).values()
        if isinstance(value, StateManager)
    }
    before = [
        (manager, _context(manager), _steps_counted(manager)) for manager in managers.values()
    ]
    reset()
    for manager, context, steps in before:
        for name, step in steps.items():
            state = manager._state_cls(*manager._init_args, **manager._init_kwargs)
            state.step_index = step
            manager._state_cache[name] = state
        manager.set_context(context)
    for hook in hooks:
        if isinstance(hook, FasterCacheBlockHook) and hook.is_guidance_distilled:
            hook.state.iteration = hook.block_skip_range


def _context(manager: StateManager) -> Any:
    """Return which call is under way, which an older diffusers keeps under another name."""
    held = vars(manager)
    return held["_context"] if "_context" in held else held["_current_context"]


def _steps_counted(manager: StateManager) -> dict[str, int]:
    """Return the step that each guidance pass is at, of a cache that counts them."""
    steps = {name: getattr(one, "step_index", None) for name, one in manager._state_cache.items()}
    return {name: step for name, step in steps.items() if isinstance(step, int)}


def rotary_embeddings_of_cogvideox(
    transformer: nn.Module, frames: int, height: int, width: int, *, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the rotary embeddings of latents of a size as CogVideoX's pipeline does."""
    from diffusers import CogVideoXImageToVideoPipeline  # slow to import, and seldom needed

    own = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=1)
    method: Any = CogVideoXImageToVideoPipeline._prepare_rotary_positional_embeddings
    cosines, sines = method(own, height, width, frames, device)
    return cosines, sines


def attention_backend(processor: object) -> str:
    """Name the backend that an attention processor uses: its own, or the one for all."""
    backend = getattr(processor, "_attention_backend", None)
    if backend is None:
        backend, _ = _AttentionBackendRegistry.get_active_backend()
    return str(getattr(backend, "value", backend))


def is_context_parallel(processor: object) -> bool:
    """Return whether an attention processor shares its tokens with other devices."""
    return getattr(processor, "_parallel_config", None) is not None


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module or a part of it was compiled."""
    return any(
        getattr(child, "_compiled_call_impl", None) is not None or hasattr(child, "_orig_mod")
        for child in module.modules()
    )


def has_cache(module: nn.Module) -> bool:
    """Return whether one of diffusers' caches is enabled, which expects certain calls."""
    return bool(getattr(module, "is_cache_enabled", False))
