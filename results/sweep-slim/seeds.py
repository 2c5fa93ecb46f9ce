"""The paper's lambda with every number of shared blocks: trained from several seeds (--seeds 3), it shows the seeds' noise."""

from components.search_space import Choice, Space

SPACE = Space(
    parameters={"lam": Choice([0.01]), "shared_blocks": Choice([1, 2, 3, 4])},
    search="grid",
    trials=0,
)
