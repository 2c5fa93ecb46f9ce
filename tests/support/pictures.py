"""Checks of drawn pictures."""

from __future__ import annotations

import xml.etree.ElementTree as ET

SVG = "{http://www.w3.org/2000/svg}"


def assert_svg(data: bytes) -> None:
    """Check that an SVG is well-formed, shows something, and needs nothing from outside."""
    root = ET.fromstring(data)
    assert root.tag == f"{SVG}svg"
    assert min(float(root.attrib[side]) for side in ("width", "height")) > 100
    shapes = [e for e in root.iter() if e.tag in (f"{SVG}path", f"{SVG}image")]
    assert len(shapes) > 3
    addresses = [value for e in root.iter() for name, value in e.attrib.items() if name.endswith("href")]
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)


def texts_of(data: bytes) -> list[str]:
    """Return the texts of an SVG."""
    return ["".join(e.itertext()).strip() for e in ET.fromstring(data).iter(f"{SVG}text")]
