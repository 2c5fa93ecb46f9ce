"""States of trials and of the models that they ask for."""

from __future__ import annotations

DIVERGED, FAILED, DONE, WAITING, TRAINING = "diverged", "failed", "done", "waiting", "training"
