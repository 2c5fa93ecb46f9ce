"""Readings of the loss: weight w of the reconstruction, as a mean or a sum over pixels."""

from components.search_space import Choice, LogUniform, Space

SPACE = Space(
    parameters={"reconstruction_weight": LogUniform(1e-3, 100.0), "reconstruction_reduction": Choice(["mean", "sum"])},
    search="tpe",
    trials=24,
)
