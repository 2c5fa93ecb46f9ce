"""Evaluation of attacks: norms, accuracy, statistics, and tests of the attacks themselves."""
