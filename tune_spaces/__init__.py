"""Search spaces for sweeps: declarative Python that a user copies and edits (docs/sweeps.md)."""
