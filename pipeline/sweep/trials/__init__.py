"""Trials, the models that they ask for, and the workers that train them."""
