"""States of trials and of the models that they ask for."""

from __future__ import annotations

DIVERGED, FAILED, DONE, WAITING, TRAINING = "diverged", "failed", "done", "waiting", "training"


ENDS = ("finished", "stopped", "diverged", "failed")
"""States of a trial that is over, though a failed one is tried again by the next command."""

FINISHED, RUNNING = "finished", "running"
ENDED = ("finished", "stopped", "diverged")
"""States that stay; a trial that failed otherwise is tried again by the next command."""
