"""How much the lower levels weigh (lambda of eq. 3) by how many encoder blocks are shared: the paper takes 0.01 and 4."""

from components.search_space import IntRange, LogUniform, Space

SPACE = Space(
    parameters={"lam": LogUniform(1e-4, 10.0), "shared_blocks": IntRange(1, 4)},
    search="random",
    trials=24,
)
