"""Network of a training config."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from components.config import Shapes, TrainConfig
from components.models import libraries
from components.models.classifiers import build_classifier, load_weights
from components.models.comdefend import ComDefend
from components.models.defend import DefendNet
from components.models.weights import renamed


def build_net(config: TrainConfig, shapes: Shapes, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Build the untrained network of a config.

    Args:
        weights: the weights of ``config.pretrained``, from which the classifier starts.

    Returns:
        The classifier, a DefendNet (classifier and auto-encoder), or a ComDefend.

    Raises:
        ConfigError: sizes or blocks do not fit together.
        DataError: the weights are of another network.
    """
    if config.defense == "comdefend":
        return ComDefend(shapes.channels, width=config.width, sigma=config.reformer_sigma, seed=config.seed)
    classifier = build_classifier(
        config.arch,
        num_classes=shapes.num_classes,
        channels=shapes.channels,
        image_size=shapes.image_size,
        width=config.width,
        mean=config.normalize_mean,
        std=config.normalize_std,
        seed=config.seed,
        needs_adapter=config.defense == "defend++" or config.noise_location == "latent",
        pretrained=bool(config.pretrained),
    )
    if weights is not None:
        tensors = libraries.tensors_for(config.arch, renamed(classifier, weights))
        where = getattr(weights, "where", config.pretrained)
        load_weights(classifier, tensors, where, replace_head=config.replace_head, trains=config.epochs > 0)
    if config.defense != "defend++":
        return classifier
    return DefendNet(
        classifier,
        shared_blocks=config.shared_blocks,
        sizes=shapes.sizes,
        channels=shapes.channels,
        decoder=config.decoder,
        levels=1 if config.targets == "none" else 0,
        seed=config.seed,
    )


def classifier_of(net: nn.Module) -> nn.Module:
    """Return the classifier of a network with or without an auto-encoder."""
    return net.classifier if isinstance(net, DefendNet) else net
