"""A sweep: Ray Tune over training, its choice, and its report."""
