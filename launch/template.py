"""Fills the templates of launch/templates/: scripts that a shell reads, so every value is quoted."""

import shlex
from typing import Any

import jinja2


def environment() -> jinja2.Environment:
    """The templates' environment; a name that a template uses and nobody gives is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=jinja2.select_autoescape(["html.j2"]),
    )
    made.filters["quote"] = shlex.quote
    return made


def fill(template: str, **values: Any) -> str:
    """The text of launch/templates/<template>, filled with `values`."""
    return environment().get_template(template).render(**values)
