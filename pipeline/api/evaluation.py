"""Evaluation of networks that are in memory, with the attacks, the judging and the tests of a run."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from components.attacks.spec import AttackSpec
from components.config import EvaluationConfig, ScalingConfig
from components.errors import ConfigError
from components.fields import TYPE_WORDS, check_name
from components.models.adapter import evaluating
from components.threat_models import BLACK_BOX, EVERY_SOURCE, WHITE_BOX
from pipeline.api import in_memory_run, inputs
from pipeline.api.result import EvaluationResult
from pipeline.data.sources.base import absolute_path
from pipeline.recipes.suites import full_suite
from pipeline.runtime.storage import Storage

MODEL = "model"
"""Name of the network under test."""
DEFAULTS = EvaluationConfig()


def evaluate(
    model: nn.Module,
    images: inputs.Array,
    labels: inputs.Array,
    attacks: str | Sequence[str] = "linf:8/255",
    *,
    against: nn.Module | Mapping[str, nn.Module] | None = None,
    autoencoder: nn.Module | None = None,
    ray: bool | str = False,
    storage: str | os.PathLike[str] | None = None,
    name: str = MODEL,
    chunk_size: int = DEFAULTS.chunk_size,
    seed: int = DEFAULTS.seed,
    reliability_images: int = DEFAULTS.reliability_images,
    threads: int = 1,
    gpus_per_task: float = 1.0,
    progress: bool = True,
) -> EvaluationResult:
    """Attack a network and say how robust it is, and whether the attacks could have found anything.

    Args:
        model: maps images in [0,1] to logits [N,K]. It is evaluated in eval mode, on the device
            that it is on. Afterwards its mode and its gradients are as they were.
        images: float [N,C,W,W] in [0,1], with C = 1 or 3.
        labels: int [N], the true classes from 0 on.
        attacks: ``NORM:EPS`` for the full suite within that budget (``linf:8/255``, ``l2:0.5``), an
            attack spec (``pgd:eps=8/255,steps=40``), or several of both.
        against: another network, or several by name: an undefended control, for example. Each meets
            the same attacks, the examples of each are shown to the others, and the worst cases are
            compared on the same images.
        autoencoder: the auto-encoder of ``model``, for attacks that know it (``adaptive``).
        ray: True runs the chunks as Ray tasks, on the cluster of $RAY_ADDRESS or a local one; a
            string is the address of a cluster. False: this process, without Ray.
        storage: directory or URI that keeps what is computed, so that the same call continues after
            a stop. Ray on several nodes needs one that every node reaches. None: a temporary
            directory, which goes with the result.
        name: the network's name in the result.
        chunk_size, seed, reliability_images: as the fields of ``evaluation`` in a recipe.
        threads: PyTorch threads of this process, or of each Ray task. One gives the numbers of a
            run. Another number may change the last bit of a logit, and so an example.
        gpus_per_task: share of a GPU for a Ray task, if the model is on a GPU.
        progress: show a progress bar.

    Raises:
        ConfigError, DataError: the network, the images, the labels or a setting is impossible. The
            message says what to do.
        ResourceError: one image does not fit the memory, or Ray lacks resources.
    """
    pixels = inputs.checked_images(images)
    classes = inputs.checked_labels(labels, len(pixels))
    networks = _named(name, model, against)
    with contextlib.ExitStack() as stack:
        trained = [key for key, network in networks.items() if network.training]
        for network in (*networks.values(), *([] if autoencoder is None else [autoencoder])):
            stack.enter_context(evaluating(network))
        device = inputs.check_same_device(networks)
        checked = None if autoencoder is None else inputs.checked_autoencoder(autoencoder, device)
        counts: dict[str, int] = {}
        # Before Python 3.12 a comprehension would be one more frame between a warning and its caller.
        for key, network in networks.items():
            counts[key] = inputs.checked_network(key, network, pixels, classes)
        if len(set(counts.values())) > 1:
            raise ConfigError(f"the networks differ in their number of classes: {counts}")
        subjects = in_memory_run.Subjects(
            networks=networks, autoencoder=checked, trained=trained, classes=counts[name], device=device
        )
        scaling = ScalingConfig(
            threads_per_worker=threads,
            gpus_per_attack=gpus_per_task if ray and device.type == "cuda" else 0.0,
        )
        config = EvaluationConfig(
            attacks=specs(attacks, pixels.shape[1]),
            threat_models=(WHITE_BOX, BLACK_BOX, *([EVERY_SOURCE] if against else [])),
            chunk_size=chunk_size,
            seed=seed,
            reliability_images=reliability_images,
        )
        with _directory(storage) as (root, temporary):
            record = in_memory_run.run(subjects, pixels, classes, config, scaling, root, ray, progress)
            return EvaluationResult(record, root, was_training=subjects.trained, temporary=temporary)


def specs(attacks: str | Sequence[str], channels: int) -> tuple[str, ...]:
    """Return the attack specs of budgets (``linf:8/255``) and specs, each attack once.

    Raises:
        ConfigError: there is none, or one is neither a budget nor a spec.
    """
    texts: list[str] = []
    for text in [attacks] if isinstance(attacks, str) else attacks:
        norm, _, eps = text.partition(":")
        texts += _of_budget(text, norm, eps, channels) if norm in ("linf", "l2") else [text]
    if not texts:
        raise ConfigError.of("attacks", attacks, 'a budget such as "linf:8/255", an attack spec, or a list of both')
    return tuple({str(AttackSpec.parse(text)): text for text in texts}.values())


def _of_budget(text: str, norm: str, eps: str, channels: int) -> tuple[str, ...]:
    """Return the full suite within a budget, whose text the error quotes."""
    try:
        AttackSpec.parse(f"noise:eps={eps},norm={norm}")
    except ConfigError as e:
        # Of a text such as 0.1,steps=5 the parser complains about a field, which a budget has not.
        reason = str(e).partition("; it must be ")[2] or TYPE_WORDS[float]
        raise ConfigError.of("attacks", text, f"a budget such as linf:8/255 or l2:0.5, its size {reason}") from None
    return full_suite(eps, norm, channels)


def _named(name: str, model: nn.Module, against: nn.Module | Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    """Return all networks by name, the one under test first."""
    others = {"against": against} if isinstance(against, nn.Module) else dict(against or {})
    if name in others:
        raise ConfigError.of("against", sorted(others), f"other names than {name!r}, that of the network under test")
    networks = {name: model, **others}
    for key, network in networks.items():
        check_name("name", key)
        if not isinstance(network, nn.Module):
            raise ConfigError.of(key, network, "an nn.Module that maps images in [0,1] to logits")
    return networks


@contextlib.contextmanager
def _directory(storage: str | os.PathLike[str] | None) -> Iterator[tuple[Storage, str]]:
    """Give the storage of an evaluation, and the temporary directory to delete with the result."""
    if storage is not None:
        root = Storage(absolute_path(os.fspath(storage), "storage"))
        root.check_writable()
        yield root, ""
        return
    directory = tempfile.mkdtemp(prefix="defendpp-")
    try:
        yield Storage(directory), directory
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
