"""Pages of reports: one frame and one style sheet for runs and sweeps."""
