"""The published folder stands alone, and what it shares with the package is a copy.

After a change of `conditions.py`, or of what is used of ComfyUI:
`python tests/comfyui_pack/test_shared.py`.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACK = ROOT / "comfyui"
NAMES = Path(__file__).parent / "names_of_comfyui.txt"
HEADER = "# A copy of src/motionmerge/conditions.py, made by tests/comfyui_pack/test_shared.py.\n"
FILES = sorted(PACK.glob("*.py"))


def shared_text() -> str:
    return HEADER + (ROOT / "src/motionmerge/conditions.py").read_text(encoding="utf-8")


def names_of_comfyui() -> list[str]:
    """What the folder uses of ComfyUI's modules; `tests/comfyui` finds each in the real one."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.add(re.sub(r"^(io|ui)\.", r"comfy_api.latest.\1.", ast.unparse(node)))
            if isinstance(node, ast.ImportFrom) and not node.level:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = {name for name in found if re.match(r"(comfy|comfy_api|folder_paths)\.[\w.]+$", name)}
    return sorted(name for name in found if not any(one.startswith(f"{name}.") for one in found))


def test_what_the_folder_shares_with_the_package_is_a_copy():
    assert (PACK / "conditions.py").read_text(encoding="utf-8") == shared_text()


def test_what_is_used_of_comfyui_is_listed():
    assert NAMES.read_text(encoding="utf-8").split() == names_of_comfyui()


def test_the_folder_needs_nothing_but_comfyui():
    own = {"comfy", "comfy_api", "folder_paths", "torch", *sys.stdlib_module_names}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= own, path
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.partition(".")[0] in own, path


if __name__ == "__main__":
    (PACK / "conditions.py").write_text(shared_text(), encoding="utf-8")
    NAMES.write_text("\n".join(names_of_comfyui()) + "\n", encoding="utf-8")
