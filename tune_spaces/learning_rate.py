"""Learning rate and its schedule; what is clearly worse after an epoch is stopped early."""

from components.search import Asha, Choice, LogUniform, Space

SPACE = Space(
    parameters={"lr": LogUniform(1e-3, 1.0), "lr_schedule": Choice(["one_cycle", "step"])},
    search="tpe",
    trials=24,
    asha=Asha(grace_epochs=1, reduction=3),
)
