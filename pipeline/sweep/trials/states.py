"""States of trials and of the models that they request."""

from __future__ import annotations

from typing import Final, Literal

TrialState = Literal["pending", "running", "finished", "stopped", "diverged", "failed"]
ModelState = Literal["waiting", "training", "done", "diverged", "failed"]

PENDING: Final = "pending"
RUNNING: Final = "running"
FINISHED: Final = "finished"
"""The trial was trained to its end."""
STOPPED: Final = "stopped"
"""Early stopping ended the trial."""

WAITING: Final = "waiting"
TRAINING: Final = "training"
DONE: Final = "done"
"""The model is exported and measured."""

DIVERGED: Final = "diverged"
"""The loss was not finite."""
FAILED: Final = "failed"

OVER: Final = (FINISHED, STOPPED, DIVERGED, FAILED)
"""States of a trial that does not run any more. The next command tries a failed trial again."""
SETTLED: Final = (FINISHED, STOPPED, DIVERGED)
"""States of a trial that no command runs again."""
