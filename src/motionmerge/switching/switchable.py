"""Which modules of a pipeline experts can switch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.merging.inputs.sources import MODULES
from motionmerge.merging.names.wrappers import DENOISERS
from motionmerge.text import fix_unknown_name

BARE_MODULE = "denoiser"


def modules_of(target: object, *, only: str | None = None) -> list[tuple[str, nn.Module]]:
    """List the modules of a pipeline that experts can switch, denoisers first.

    Args:
        target: A pipeline, or one module.
        only: Just this one of the pipeline.

    Raises:
        ConfigError: There is no denoiser, `only` is none, or experts would not reach all denoisers.
    """
    if isinstance(target, nn.Module):
        return [(BARE_MODULE, target)]
    if hasattr(target, "null_component_names"):  # a modular one; its class is slow to import
        _check_loaded(target, only)
    found = [(name, getattr(target, name, None)) for name in MODULES]
    modules = [(name, module) for name, module in found if isinstance(module, nn.Module)]
    if not any(name in DENOISERS for name, _ in modules):
        raise ConfigError(
            f"{type(target).__name__} has no `unet` or `transformer`.",
            fix="Pass a loaded diffusers video pipeline, or the denoiser itself.",
        )
    if only is None:
        return modules
    if only not in DENOISERS and only in dict(modules):
        raise ConfigError(
            f"`{only}` alone cannot be switched: it sees no timestep.",
            fix=f"Leave `module` out and name its tensors `{only}.<name>`.",
        )
    if only not in dict(modules):
        raise ConfigError(
            f"{type(target).__name__} has no module `{only}`.",
            fix=fix_unknown_name(only, dict(modules)),
        )
    return [(only, dict(modules)[only])]


def _check_loaded(pipeline: object, only: str | None) -> None:
    """Refuse a modular pipeline that would denoise with weights which no expert reaches.

    It is made without weights, and loads them later, in any order.

    Raises:
        ConfigError: A denoiser is not loaded yet, or has a name that experts do not know.
    """
    wanted = DENOISERS if only is None else (only,)
    parts: Mapping[str, object] = getattr(pipeline, "components", {})  # modular ones have some
    kind = type(pipeline).__name__
    absent = [name for name in wanted if name in parts and parts[name] is None]
    if absent:
        raise ConfigError(
            f"`{absent[0]}` of {kind} is not loaded yet, so no expert can be put in its place.",
            fix="Call load_components() or update_components(...) of the pipeline before.",
        )
    others = [
        name
        for name, part in parts.items()
        if name.startswith("transformer_") and name not in DENOISERS and part is not None
    ]
    if others and only is None:
        raise ConfigError(
            f"{kind} has `{others[0]}` loaded as well, which experts do not reach.",
            fix="Choose the denoiser to switch, e.g. module='transformer', or make the pipeline "
            "with the one workflow that you use (workflow=...).",
        )
