"""Defend++: a classifier and an auto-encoder whose first encoder blocks are the same weights (sec. 3.4, Fig. 1)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from components.errors import ConfigError
from components.models.classifiers import ResNet18, apply_head, encoder_blocks
from components.models.decoders import BlockShape, PyramidDecoder

Noise = Callable[[Tensor], Tensor]


def block_shapes(classifier: ResNet18, channels: int, image_size: int) -> list[BlockShape]:
    """Shapes of the encoder blocks, measured by sending one blank image through them; the network is not changed."""
    was_training = classifier.training
    classifier.eval()  # in training mode the blank image would move the batch norm statistics
    parameter = next(classifier.parameters())
    x = torch.zeros(1, channels, image_size, image_size, device=parameter.device)
    shapes = []
    with torch.no_grad():
        for i, block in enumerate(encoder_blocks(classifier)):
            y = block(x)
            stage = getattr(classifier, f"layer{i + 1}")
            # the first block's input for a mirror is what the stem gives: the stem has a mirror of its own
            in_channels = classifier.conv1.out_channels if i == 0 else x.shape[1]
            shapes.append(
                BlockShape(depth=len(stage), in_channels=in_channels, out_channels=y.shape[1], size=y.shape[-1])
            )
            x = y
    classifier.train(was_training)
    return shapes


class AutoEncoder(nn.Module):
    """Encoder blocks and decoder: what is kept beside the classifier to reconstruct images after training.

    Args:
        encoder: the blocks, input to latent. Shared ones are the classifier's own modules.
        decoder: maps (features, latent) to the levels.
    """

    def __init__(self, encoder: Sequence[nn.Module], decoder: PyramidDecoder) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(encoder)
        self.decoder = decoder

    def forward(self, images: Tensor, noise: Noise | None = None) -> list[Tensor]:
        """Reconstructed levels, level 0 first, of images [N, C, W, W] in [0,1]. ``noise`` is added to the latent."""
        features = run_blocks(self.encoder, images)
        return self.decode(features, noise)

    def decode(self, features: list[Tensor], noise: Noise | None = None) -> list[Tensor]:
        """Reconstructed levels from the outputs of the encoder blocks."""
        latent = features[-1] if noise is None else noise(features[-1])
        levels: list[Tensor] = self.decoder(features, latent)
        return levels


def run_blocks(blocks: Sequence[nn.Module] | nn.ModuleList, x: Tensor) -> list[Tensor]:
    """The output of every block in turn."""
    features = []
    for block in blocks:
        x = block(x)
        features.append(x)
    return features


class DefendNet(nn.Module):
    """A classifier together with its auto-encoder during training.

    The first ``shared_blocks`` encoder blocks are one set of weights for both; the auto-encoder owns copies of the others,
    initialised with the classifier's weights (sec. 3.4).

    Args:
        classifier: stays untouched; train it alone by never calling anything else.
        shared_blocks: 1 .. number of encoder blocks.
        sizes: level sizes in pixels, level 0 first.
        channels: image channels.
        seed: initial weights of the decoder follow from it.

    Raises:
        ConfigError: shared_blocks out of range, or sizes that the encoder does not have.
    """

    def __init__(
        self, classifier: ResNet18, *, shared_blocks: int, sizes: Sequence[int], channels: int, seed: int = 0
    ) -> None:
        super().__init__()
        blocks = encoder_blocks(classifier)
        if not 1 <= shared_blocks <= len(blocks):
            raise ConfigError.of("train.shared_blocks", shared_blocks, f"1 to {len(blocks)}")
        shapes = block_shapes(classifier, channels, sizes[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)  # + 1: not the stream that made the classifier
            decoder = PyramidDecoder(shapes, sizes, channels)
        self.shared_blocks = shared_blocks
        self.classifier = classifier
        own = [copy.deepcopy(block) for block in blocks[shared_blocks:]]
        self.autoencoder = AutoEncoder([*blocks[:shared_blocks], *own], decoder)

    def joint(
        self, images: Tensor, classifier_noise: Noise | None = None, autoencoder_noise: Noise | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits and reconstructed levels of the same images; the shared blocks run once.

        The noise functions are added to the latent of the classifier and of the auto-encoder. Where all blocks are shared
        there is one latent, and the classifier's is used for both.
        """
        s = self.shared_blocks
        encoder = list(self.autoencoder.encoder)
        shared = run_blocks(encoder[:s], images)
        own_blocks = encoder_blocks(self.classifier)[s:]
        latent = run_blocks(own_blocks, shared[-1])[-1] if own_blocks else shared[-1]
        if classifier_noise is not None:
            latent = classifier_noise(latent)
        logits = apply_head(self.classifier, latent)
        if own_blocks:
            features = shared + run_blocks(encoder[s:], shared[-1])
            return logits, self.autoencoder.decode(features, autoencoder_noise)
        # the noisy latent goes to the decoder alone: the taps H read the clean maps
        return logits, self.autoencoder.decoder(shared, latent)


def classify_with_noise(classifier: ResNet18, images: Tensor, noise: Noise | None = None) -> Tensor:
    """Logits [N, classes], with ``noise`` added to the latent representation (sec. 4.2, ours + GN)."""
    if noise is None:
        logits: Tensor = classifier(images)
        return logits
    return apply_head(classifier, noise(run_blocks(encoder_blocks(classifier), images)[-1]))
