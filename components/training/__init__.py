"""One optimisation step of each phase, in PyTorch alone."""
