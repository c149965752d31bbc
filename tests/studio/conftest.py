"""What the studio's tests share."""

from __future__ import annotations

from ..tiny.fixtures import stored_wan

__all__ = ["stored_wan"]
