"""Table 1's ablation as a grid: each decoder with each kind of targets."""

from components.search_space import Choice, Space

SPACE = Space(
    parameters={
        "decoder": Choice(["pyramid", "hourglass", "hourglass_concat", "hourglass_add"]),
        "targets": Choice(["lowpass", "linear", "none"]),
    },
    search="grid",
    trials=0,
)
