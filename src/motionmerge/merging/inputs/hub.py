"""Inputs on the Hugging Face hub, `hub:owner/name`: of a pipeline only what a merge reads.

Without a connection, or with `HF_HUB_OFFLINE=1`, what the cache holds is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from motionmerge.errors import CheckpointError
from motionmerge.merging.inputs.sources import MODULES

_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<inner>[\w./ -]+))?(@(?P<revision>[\w./-]+))?")
_VARIANTS = ("*.fp16*", "*.bf16*", "*.non_ema*")


def hub_weights(name: str) -> Path:
    """Return the path of weights on the hub, downloaded into its cache unless they are there.

    Args:
        name: `owner/name`, which is a pipeline or one model; `owner/name/folder` or
            `owner/name/file.safetensors` in it; each with `@revision` behind it, if wanted.

    Raises:
        CheckpointError: It is no such name, or it is neither in the cache nor to be had.
    """
    found = _NAME.fullmatch(name)
    inner = PurePosixPath((found and found["inner"]) or ".")
    if found is None or ".." in inner.parts:
        raise CheckpointError(
            f"`hub:{name}` is no name on the hub.",
            fix="Write `hub:owner/name`, `hub:owner/name/folder` or "
            "`hub:owner/name/file.safetensors`, and `@revision` behind it if you want one.",
        )
    import huggingface_hub

    repo, revision = found["repo"], found["revision"]
    try:
        if inner.suffix in _FILES:
            return Path(huggingface_hub.hf_hub_download(repo, str(inner), revision=revision))
        folder = _snapshot(repo, inner, revision=revision, without=_VARIANTS)
        if not any((folder / inner).rglob("*.safetensors")):  # it has variants alone
            folder = _snapshot(repo, inner, revision=revision, without=())
    except (OSError, ValueError) as error:
        reason = (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
        raise CheckpointError(
            f"`hub:{name}` is not in the cache and could not be had from the hub: {reason}",
            fix="Check the name and the connection, log in with `hf auth login` if it is gated, or "
            "give the path of a downloaded copy.",
        ) from error
    return folder / inner


def _snapshot(
    repo: str, inner: PurePosixPath, *, revision: str | None, without: Sequence[str]
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[str(inner / pattern) for pattern in _patterns()],
            ignore_patterns=list(without),
        )
    )


def _patterns() -> list[str]:
    """Name the files that a merge reads: a model's weights, or those of a pipeline's denoisers."""
    stems = ("diffusion_pytorch_model*", "model*", "adapter_model*", "pytorch_lora_weights*")
    inside = [f"{module}/*{ending}" for module in MODULES for ending in (".safetensors", ".json")]
    return ["*.json", *(f"{stem}.safetensors" for stem in stems), *inside]
