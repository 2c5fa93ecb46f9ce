"""What several figures share."""

from __future__ import annotations

import numpy as np

from components.attacks.spec import AttackSpec
from components.errors import ConfigError

Picture = tuple[str, str, bytes]
"""Heading, caption, PNG."""


def perturbation_norms(deltas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L2 and Linf norms, float64 [n] each, of perturbations [n,C,H,W]."""
    flat = np.asarray(deltas, dtype=np.float64).reshape(len(deltas), -1)
    return np.sqrt((flat**2).sum(1)), np.abs(flat).max(1)


def parsed_attack(attack: str) -> AttackSpec | None:
    try:
        return AttackSpec.parse(attack)
    except ConfigError:  # "none", or an attack of another version
        return None
