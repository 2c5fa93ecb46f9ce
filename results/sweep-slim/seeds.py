"""The paper's lambda with every number of shared blocks. With --seeds 3 it shows how much seeds differ."""

from components.search_space import Choice, Space

SPACE = Space(
    parameters={"lam": Choice([0.01]), "shared_blocks": Choice([1, 2, 3, 4])},
    search="grid",
    trials=0,
)
