"""Pages from templates: every text is escaped, and a name that is not given is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
