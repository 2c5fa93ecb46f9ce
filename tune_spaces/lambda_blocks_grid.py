"""lambda_blocks as a grid, so that each parameter can be averaged over the other."""

from components.search_space import Choice, Space

SPACE = Space(
    parameters={"lam": Choice([1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0]), "shared_blocks": Choice([1, 2, 3, 4])},
    search="grid",
    trials=0,
)
