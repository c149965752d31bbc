"""The real ComfyUI has what the pack uses and what the double of CI stands for."""

from __future__ import annotations

import pkgutil

import comfy.model_patcher
import comfy.samplers
import pytest

from ..comfyui_pack import double
from ..comfyui_pack.test_shared import names_of_comfyui
from . import tiny


@pytest.mark.parametrize("name", names_of_comfyui())
def test_comfyui_has_what_the_pack_uses(name):
    assert pkgutil.resolve_name(name) is not None


def test_models_and_guiders_have_what_their_doubles_have():
    model = tiny.model("wan")
    guider = comfy.samplers.CFGGuider(model)
    for mine, real in (
        (double.ModelPatcher(double.Network(0)), model),
        (double.CFGGuider(model), guider),
    ):
        names = {*vars(mine), *vars(type(mine))} - {"loaded", "running", "conds"}
        missing = {name for name in names if not name.startswith("__") and not hasattr(real, name)}
        assert not missing
