"""Weight of the lower levels (lambda of eq. 3) by number of shared encoder blocks.

The paper's values are 0.01 and 4.
"""

from components.search_space import IntRange, LogUniform, Space

SPACE = Space(
    parameters={"lam": LogUniform(1e-4, 10.0), "shared_blocks": IntRange(1, 4)},
    search="random",
    trials=24,
)
