"""Optimisation steps of each phase of training, in PyTorch alone."""
