"""Templates of HTML pages. This module loads no plots, so that results in notebooks can use it."""

from __future__ import annotations

from pathlib import Path

import jinja2

from pipeline.reporting import labels


def environment(*folders: Path) -> jinja2.Environment:
    """Return the environment of the templates in some folders; what they insert is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=labels.percent, duration=labels.duration, when=labels.when)
    environment.globals.update(
        mark=labels.mark,
        mean_and_sd=labels.mean_and_sd,
        median_norm=labels.median_norm,
        p_value=labels.p_value,
    )
    return environment
