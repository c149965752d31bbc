"""How the nodes refuse: what came, what was expected, and a line that begins with `Fix:`."""

from __future__ import annotations


class NodeError(ValueError):
    """Something that a node refuses; ComfyUI shows it on the node.

    Args:
        message: What came, and what was expected.
        fix: What to do about it.
    """

    def __init__(self, message: str, *, fix: str) -> None:
        super().__init__(f"{message}\nFix: {fix}")
