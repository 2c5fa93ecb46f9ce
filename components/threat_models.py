"""Names of the threat models, as configs, records and addresses spell them."""

from __future__ import annotations

CLEAN = "clean"
"""No attack: the clean images."""
RANDOM = "random"
"""Random noise: no attacker, no model."""
WHITE_BOX = "white_box"
BLACK_BOX = "black_box"
GREY_BOX = "grey_box"
"""The attacker knows the classifier, not the reformer in front of it."""
TRANSFER = "transfer"
EVERY_SOURCE = "transfer:*"
"""Transfer from each model of the experiment in turn."""

ANY = "any"
"""Threat model of a worst case over all examples, transferred ones too."""
DIRECT = (WHITE_BOX, BLACK_BOX)
"""Threat models whose examples are made on the model under test itself."""


def transfer_from(base: str) -> str:
    """Return the threat model of examples made on the model that ``models`` names ``base``."""
    return f"{TRANSFER}:{base}"


def split_threat_model(threat_model: str) -> tuple[str, str]:
    """Split ``transfer:NAME`` into its two parts; the name is empty for any other threat model."""
    kind, _, base = threat_model.partition(":")
    return kind, base
