"""Integers in place of a LoRA's numbers are codes, whose scales are not known."""

from __future__ import annotations

import pytest
import torch

from motionmerge.errors import CheckpointError

from .test_lora_reading import Q, both_ways, model, pair


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight"])
def test_a_lora_of_integers_is_refused_in_both_ways(dtype: torch.dtype, part: str) -> None:
    file = pair(Q)
    file[f"{Q}.{part}"] = file[f"{Q}.{part}"].to(dtype)
    with pytest.raises(CheckpointError, match=rf"`{Q}\.{part}` .* codes without a scale"):
        both_ways({"denoiser": model()}, file)


def test_an_alpha_may_be_a_whole_number() -> None:
    file = pair(Q) | {f"{Q}.alpha": torch.tensor(2)}
    assert both_ways({"denoiser": model()}, file) == {f"{Q}.weight": 2.0}
