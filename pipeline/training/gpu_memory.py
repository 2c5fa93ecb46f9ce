"""Check before training that each model can fit the GPU.

The count is a lower bound: weights, gradients, the optimizer's state and the tensors that PyTorch
saves for the backward pass. Libraries, the allocator and the images come on top, so a model that
passes may still not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import ray
import torch
from ray.exceptions import GetTimeoutError
from torch import Tensor, nn

from components.config import Experiment, Shapes, TrainConfig
from components.network import build_net
from components.training.augment import Batch, gaussian_noise, targets_of
from components.training.schedule import phase_at_epoch
from components.training.step import PhaseModule
from pipeline.runtime.cluster import ResourceError

PROBE_IMAGES = 2
"""Images of the forward pass whose saved tensors, proportional to the batch, are counted."""
ANSWER_S = 60.0
"""How long to wait for a GPU's answer. A busy GPU is no reason to refuse a run."""


def training_bytes(config: TrainConfig, shapes: Shapes, images_per_worker: int) -> int:
    """Return the least memory, in bytes, that one worker's training step of a model takes.

    It is counted on the CPU, on two images, in training's last phase, which has the most parts.
    """
    net = build_net(config, shapes).train()
    parameters = list(net.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    # weights, gradients, state
    copies = 4 if config.optimizer == "adam" else 3 if config.momentum else 2
    copies += 1 if config.ema_decay else 0
    phase = phase_at_epoch(config.epochs - 1, config)
    saved = _saved_for_backward(PhaseModule(net, phase, config), parameters, config, shapes)
    return copies * weights + saved * images_per_worker // PROBE_IMAGES


def _saved_for_backward(
    module: PhaseModule, parameters: list[nn.Parameter], config: TrainConfig, shapes: Shapes
) -> int:
    """Return the bytes of tensors, other than parameters, saved for the backward pass."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            # Holding it keeps its address from another tensor.
            saved[x.untyped_storage().data_ptr()] = x
        return x

    size = (PROBE_IMAGES, shapes.channels, shapes.image_size, shapes.image_size)
    images, labels = torch.zeros(size), torch.zeros(PROBE_IMAGES, dtype=torch.int64)
    # With crop_flip the levels are computed from the images, as there are no stored levels yet.
    without_levels = dataclasses.replace(config, augment="crop_flip")
    targets = targets_of(images, Batch(images=images, labels=labels), without_levels, shapes.sizes)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"),
    ):
        noise = gaussian_noise(config, 0, 0, torch.device("cpu"))
        module(images, labels, targets, noise, images if module.on_examples else None)
    return sum(x.untyped_storage().nbytes() for x in saved.values())


def check_gpu_memory(
    experiment: Experiment, shapes: Shapes, trained: Callable[[], Collection[str]] = lambda: ()
) -> None:
    """Refuse to train a model that cannot fit one of the run's GPUs.

    Ray must be running. Without GPUs for training, and for external models, nothing is checked.

    Args:
        trained: returns the names of the models that are finished already. It is called at most
            once, and only if a model does not fit.

    Raises:
        ResourceError: a model does not fit; the message names it and the settings to change.
    """
    if not experiment.scaling.gpu or not experiment.trains:
        return
    gpu_bytes = _gpu_bytes()
    if gpu_bytes is not None:
        refuse_what_does_not_fit(experiment, shapes, gpu_bytes, trained)


def refuse_what_does_not_fit(
    experiment: Experiment, shapes: Shapes, gpu_bytes: int, trained: Callable[[], Collection[str]] = lambda: ()
) -> None:
    """Do as :func:`check_gpu_memory`, for a GPU with ``gpu_bytes`` of memory."""
    workers = experiment.scaling.workers
    needed: dict[TrainConfig, int] = {}
    too_large: dict[str, TrainConfig] = {}
    for name, config in experiment.model_configs().items():
        if not config.epochs:
            continue
        config = dataclasses.replace(config.canonical(), seed=0)
        if config not in needed:
            needed[config] = training_bytes(config, shapes, config.batch_size // workers)
        if needed[config] > gpu_bytes:
            too_large[name] = config
    finished = trained() if too_large else ()
    for name, config in too_large.items():
        if name not in finished:
            raise ResourceError(
                f"model {name} does not fit the GPU: a step of {config.batch_size} images on {workers} worker(s) takes "
                f"at least {needed[config] / 2**30:.1f} GiB, the GPU has {gpu_bytes / 2**30:.1f} GiB. "
                "Lower --train.batch-size or --train.width, raise --scaling.workers, or set --train.precision bfloat16"
            )


def _gpu_bytes() -> int | None:
    """Return the memory of the GPU that Ray gives a task, or None if none answers in time."""
    ref = ray.remote(num_gpus=1, num_cpus=0)(_total_memory).remote()  # It must not wait for a CPU.
    try:
        total: int | None = ray.get(ref, timeout=ANSWER_S)
        return total
    except GetTimeoutError:
        ray.cancel(ref)
        return None


def _total_memory() -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
