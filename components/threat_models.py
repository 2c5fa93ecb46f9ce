"""Names of the threat models, as records and addresses spell them."""

from __future__ import annotations

RANDOM = "random"
CLEAN = "clean"
WHITE_BOX = "white_box"
GREY_BOX = "grey_box"
BLACK_BOX = "black_box"
EVERY_SOURCE = "transfer:*"

ANY = "any"
"""The threat model of a worst case over all that was made, also on other models."""
DIRECT = (WHITE_BOX, BLACK_BOX)
"""Threat models whose examples were made on the very model under test."""
