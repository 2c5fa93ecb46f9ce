"""Ray Tune: the search, early stopping, and what is read off its events."""
