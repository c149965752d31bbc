"""Tiny pipelines with random weights, written as folders that can be loaded like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .dynamicrafter import tiny_pipeline
from .pipelines import EVERY_FAMILY, Family, tiny


def family_named(name: str) -> Family:
    return next(family for family in EVERY_FAMILY if family.name == name)


def save_tiny(name: str, folder: Path) -> Any:
    """Write the tiny pipeline of a family; give the pipeline."""
    pipeline = tiny(family_named(name))
    pipeline.save_pretrained(folder)
    return pipeline


def save_dynamicrafter(folder: Path, seed: int = 0) -> Any:
    """Write the tiny DynamiCrafter; give the pipeline."""
    pipeline = tiny_pipeline(seed)
    pipeline.save_pretrained(folder)
    return pipeline


def save_lora(path: Path, module: torch.nn.Module, layer: str, seed: int = 0) -> None:
    """Write a LoRA of rank 2 for one linear layer of a denoiser."""
    rows, columns = module.get_submodule(layer).weight.shape
    generator = torch.Generator().manual_seed(seed)
    save_file(
        {
            f"transformer.{layer}.lora_A.weight": torch.randn(2, columns, generator=generator),
            f"transformer.{layer}.lora_B.weight": torch.randn(rows, 2, generator=generator),
        },
        path,
    )
