"""Search spaces for Ray Tune: declarative Python that a user copies and edits."""
