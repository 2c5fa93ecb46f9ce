"""Extension of griffe (the reader of mkdocstrings): roles in docstrings become links."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|attr|mod):`~?([^`]+)`")


class RolesAsLinks(griffe.Extension):
    """Turns the role of a function, class or attribute into a link to its place in the reference."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite the docstrings of a package once all of it is read, so that names can be resolved."""
        self._rewrite(pkg)

    def _rewrite(self, item: griffe.Object) -> None:
        if item.docstring:
            item.docstring.value = ROLE.sub(lambda role: _link(item, role[1]), item.docstring.value)
        for member in item.members.values():
            if not member.is_alias:
                self._rewrite(member)


def _link(item: griffe.Object, name: str) -> str:
    """Return a link to ``name`` as seen from ``item``; code without a link if the reference lacks it."""
    first, _, rest = name.partition(".")
    try:
        target = item.resolve(first)
    except griffe.NameResolutionError:
        target = first  # A full path: components.attacks.spec.AttackSpec.
    path = f"{target}.{rest}" if rest else target
    private = any(part.startswith("_") for part in path.split("."))
    return f"`{name}`" if private or not path.startswith(("components.", "pipeline.")) else f"[`{name}`][{path}]"
