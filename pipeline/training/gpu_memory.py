"""Whether a GPU can hold what training a model takes at the least; asked before anything is computed.

The count is a floor, not a forecast: weights, gradients, the optimizer's state and what PyTorch keeps for the backward pass. What
its libraries, its allocator and the images themselves take comes on top, so a model that passes here may still not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ray
import torch
from ray.exceptions import GetTimeoutError
from torch import Tensor, nn

from components.config import Experiment, TrainConfig
from components.config.data import Shapes
from components.network import build_net
from components.training.augment import Batch, gaussian_noise, targets_of
from components.training.schedule import phase_at_epoch
from components.training.step import PhaseModule
from pipeline.runtime.cluster import ResourceError

PROBE_IMAGES = 2
"""What is kept for the backward pass grows with the batch; so many images show by how much."""
ANSWER_S = 60.0
"""How long to wait until a GPU says how large it is; a GPU that is busy is no reason to refuse a run."""


def training_bytes(config: TrainConfig, shapes: Shapes, images_per_worker: int) -> int:
    """The least memory, in bytes, that one worker's step of a model takes; counted on the CPU, on two images.

    Of the phase that a model's training ends with, which is the one with the most parts.
    """
    net = build_net(config, shapes).train()
    parameters = list(net.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    copies = 4 if config.optimizer == "adam" else 3 if config.momentum else 2  # weights, gradients, state
    phase = phase_at_epoch(config.epochs - 1, config)
    kept = _kept_for_backward(PhaseModule(net, phase, config), parameters, config, shapes)
    return copies * weights + kept * images_per_worker // PROBE_IMAGES


def _kept_for_backward(module: PhaseModule, parameters: list[nn.Parameter], config: TrainConfig, shapes: Shapes) -> int:
    own = {p.untyped_storage().data_ptr() for p in parameters}
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x  # held, so that its address is not given to another
        return x

    size = (PROBE_IMAGES, shapes.channels, shapes.image_size, shapes.image_size)
    images, labels = torch.zeros(size), torch.zeros(PROBE_IMAGES, dtype=torch.int64)
    without_levels = dataclasses.replace(config, augment="crop_flip")  # computed here: there are no stored ones yet
    targets = targets_of(images, Batch(images=images, labels=labels), without_levels, shapes.sizes)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"),
    ):
        noise = gaussian_noise(config, 0, 0, torch.device("cpu"))
        module(images, labels, targets, noise, images if module.phase == "adversarial" else None)
    return sum(x.untyped_storage().nbytes() for x in found.values())


def check_gpu_memory(
    experiment: Experiment, shapes: Shapes, is_trained: Callable[[str], bool] = lambda name: False
) -> None:
    """Refuse a run that would train a model which cannot fit one of its GPUs. Needs a running Ray; does nothing for training on
    CPUs, nor for models that are given.

    Args:
        is_trained: whether the model of that name is finished already; asked only of one that does not fit.

    Raises:
        ResourceError: naming the model, what it takes, what the GPU has and which settings to change.
    """
    if not experiment.scaling.gpu or not experiment.trains:
        return
    has = _gpu_bytes()
    if has is not None:
        refuse_what_does_not_fit(experiment, shapes, has, is_trained)


def refuse_what_does_not_fit(
    experiment: Experiment, shapes: Shapes, gpu_bytes: int, is_trained: Callable[[str], bool] = lambda name: False
) -> None:
    """As :func:`check_gpu_memory`, for a GPU of so many bytes."""
    takes: dict[TrainConfig, int] = {}
    for name, given in experiment.model_configs().items():
        if not given.epochs:
            continue
        config = dataclasses.replace(given.canonical(), seed=0)
        if config not in takes:
            takes[config] = training_bytes(config, shapes, config.batch_size // experiment.scaling.workers)
        if takes[config] > gpu_bytes and not is_trained(name):
            raise ResourceError(
                f"model {name} does not fit the GPU: a step of {config.batch_size} images on {experiment.scaling.workers} worker(s) "
                f"takes at least {takes[config] / 2**30:.1f} GiB, the GPU has {gpu_bytes / 2**30:.1f} GiB. Lower train.batch_size or "
                "train.width, raise scaling.workers, or set train.precision=bfloat16"
            )


def _gpu_bytes() -> int | None:
    """Memory of the GPU on which Ray places a task; None where none answers in time."""
    # no CPU: this must not wait for one
    ref = ray.remote(num_gpus=1, num_cpus=0)(_total_memory).remote()
    try:
        found: int | None = ray.get(ref, timeout=ANSWER_S)
        return found
    except GetTimeoutError:
        ray.cancel(ref)
        return None


def _total_memory() -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
