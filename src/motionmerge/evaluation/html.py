"""Pages from templates: every text is escaped, and a name that is not given is an error."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from motionmerge.version import __version__

_TEMPLATES = Path(__file__).parent / "report" / "templates"
STYLE = _TEMPLATES / "page.css"
"""The style sheet of every page."""


def page_text(template: str, *, title: str, **content: Any) -> str:
    """Fill one of the templates; the page needs no other file, and no script but ours may run."""
    script = (_TEMPLATES / "players.js").read_text(encoding="utf-8")
    return filled(
        _TEMPLATES / template,
        title=title,
        style=STYLE.read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        **content,
    )


def filled(template: Path, **content: Any) -> str:
    """Fill a template of jinja."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**content)
