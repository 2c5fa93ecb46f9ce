"""Files of a classifier for other programs, each loaded again and compared before it is kept."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as safetensors_load
from torch import Tensor, nn

from components.errors import ConfigError, DataError, first_line
from pipeline.interchange.classifier import StoredClassifier
from pipeline.runtime.quiet import log_levels
from pipeline.training import weights_file

CHECKED_IMAGES = 16
"""Random images, and as many real ones, on which the logits are compared."""
TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit if that is above 1. Another program adds
float32 numbers in another order."""
IMAGES, LOGITS, BATCH = "images", "logits", "batch"
"""Names of the input, of the output and of their first dimension."""
_EXPORTERS = dict.fromkeys(("torch", "onnxscript", "onnx_ir"), logging.ERROR)
"""Levels at which the exporters make no remarks on versions and operators."""
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """A format of files: how to write one, and how to load it as a function."""

    write: Callable[[StoredClassifier], bytes]
    load: Callable[[bytes, StoredClassifier], Network]


@dataclass(frozen=True)
class Comparison:
    """Largest difference between the logits of a file and those of the network."""

    random: float
    real: float | None
    """None: there were no real images."""
    images: int
    """Number of real images."""
    allowed: float


def convert(classifier: StoredClassifier, name: str) -> tuple[bytes, Comparison]:
    """Return the file of a classifier in a format, and how its logits compare.

    Args:
        name: one of FORMATS.

    Raises:
        ConfigError: a package for this format is not installed.
        DataError: the network cannot be written in this format, or the file has other logits.
    """
    form = FORMATS[name]
    try:
        with log_levels(_EXPORTERS), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            data = form.write(classifier)
            loaded = form.load(data, classifier)
    except ImportError as e:
        raise ConfigError(
            f"--format {name} needs packages of its own ({first_line(e)}): pip install 'defendpp[export]'"
        ) from e
    except Exception as e:  # Exporters have errors of many types, and the network may be a user's own.
        raise DataError(
            f"{classifier.name} cannot be written as {name} ({type(e).__name__}: {first_line(e)}). A network whose "
            "operations depend on the values of its images, and not on their shapes alone, has no such file"
        ) from e
    return data, _compared(classifier, loaded, name)


def _compared(classifier: StoredClassifier, loaded: Network, name: str) -> Comparison:
    """Compare the logits in batches of one and of several images. Raises DataError."""
    size = (CHECKED_IMAGES, *_image_shape(classifier))
    random = torch.rand(size, generator=torch.Generator().manual_seed(0))
    differences: list[float | None] = []
    largest = 1.0
    for images in (random, classifier.images):
        if not len(images):
            differences.append(None)
            continue
        batches = [batch for batch in (images[:1], images[1:]) if len(batch)]
        with torch.no_grad():
            logits = torch.cat([classifier.network(batch) for batch in batches])
            again = torch.cat([loaded(batch) for batch in batches])
        # Unlike Python's max, torch's is NaN if one of the values is.
        differences.append(float((logits - again).abs().max()))
        largest = max(largest, float(logits.abs().max()))
    on_random, on_real = differences
    assert on_random is not None
    comparison = Comparison(on_random, on_real, len(classifier.images), TOLERANCE * largest)
    worst = float(torch.tensor([on_random, on_real or 0.0]).max())
    if not worst <= comparison.allowed:
        raise DataError(
            f"the {name} file of {classifier.name} gives other logits (largest difference {worst:.2g}, allowed "
            f"{comparison.allowed:.2g}), so it was not kept. A network that draws random numbers, or changes its state "
            "from one image to the next, cannot be exported"
        )
    return comparison


def _image_shape(classifier: StoredClassifier) -> tuple[int, int, int]:
    shapes = classifier.shapes
    return shapes.channels, shapes.image_size, shapes.image_size


def _example(classifier: StoredClassifier) -> Tensor:
    """Return the images of the traced pass. The number of images stays free if it is above 1."""
    return torch.zeros(2, *_image_shape(classifier))


def _to_onnx(classifier: StoredClassifier) -> bytes:
    program = torch.onnx.export(
        classifier.network,
        (_example(classifier),),
        input_names=[IMAGES],
        output_names=[LOGITS],
        dynamic_shapes=({0: torch.export.Dim(BATCH)},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    return data


def _of_onnx(data: bytes, classifier: StoredClassifier) -> Network:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([LOGITS], {IMAGES: images.numpy()})[0])


def _to_torch_export(classifier: StoredClassifier) -> bytes:
    shapes = ({0: torch.export.Dim(BATCH)},)
    program = torch.export.export(classifier.network, (_example(classifier),), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _of_torch_export(data: bytes, classifier: StoredClassifier) -> Network:
    return torch.export.load(io.BytesIO(data)).module()


def _to_safetensors(classifier: StoredClassifier) -> bytes:
    return classifier.file or weights_file.to_bytes(classifier.network.state_dict())


def _of_safetensors(data: bytes, classifier: StoredClassifier) -> Network:
    network: nn.Module = copy.deepcopy(classifier.network)
    for tensor in network.state_dict().values():
        tensor.zero_()  # So that a tensor that the file lacks is noticed.
    network.load_state_dict(safetensors_load(data))
    return network


FORMATS = {
    "onnx": Format(_to_onnx, _of_onnx),
    "torch-export": Format(_to_torch_export, _of_torch_export),
    "safetensors": Format(_to_safetensors, _of_safetensors),
}
"""Format of ``--format`` -> how it is written and loaded."""
