"""Defend++: a classifier and an auto-encoder that share their first encoder blocks.

See sec. 3.4 and Fig. 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from components.errors import ConfigError
from components.models.adapter import adapter_of, apply_head, encoder_blocks, encoder_units, evaluating, units_of
from components.models.decoder_plan import UnitShape
from components.models.decoders import build_decoder

Noise = Callable[[Tensor], Tensor]

_SMALLEST_REFERENCE = 1e-12
"""Least squared length by which :func:`adaptive_objective` divides; it keeps values and gradients
finite."""


def unit_shapes(classifier: nn.Module, channels: int, image_size: int) -> list[UnitShape]:
    """Measure the shapes of the encoder units, input to latent.

    One blank image is sent through them; the network is not changed.

    Raises:
        ConfigError: the output of a unit is not a square map [N, C, W, W].
    """
    adapter = adapter_of(classifier)
    parameter = next(classifier.parameters())
    x = torch.zeros(1, channels, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    shapes: list[UnitShape] = []
    # In training mode the blank image would change the batch norm statistics.
    with torch.no_grad(), evaluating(classifier):
        for i, units in enumerate(encoder_units(classifier)):
            for j, unit in enumerate(units):
                x = unit(x)
                if x.ndim != 4 or x.shape[2] != x.shape[3]:
                    raise ConfigError(
                        f"adapter.blocks[{i}], unit {j} of {type(classifier).__name__} gives {list(x.shape)}: a "
                        f"decoder mirrors square maps [N, C, W, W]"
                    )
                shapes.append(
                    UnitShape(
                        depth=adapter.depths[i][j],
                        in_channels=shapes[-1].out_channels if shapes else x.shape[1],
                        out_channels=x.shape[1],
                        size=x.shape[-1],
                        mirror=adapter.mirror,
                        stem=adapter.stem and not shapes,
                    )
                )
    return shapes


class AutoEncoder(nn.Module):
    """Encoder blocks and decoder.

    It is kept beside the classifier to reconstruct images after training.

    Args:
        encoder: the blocks, input to latent. Shared ones are the classifier's own modules.
        decoder: maps (outputs of the encoder's units, latent) to the levels.
    """

    def __init__(self, encoder: Sequence[nn.Module], decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(encoder)
        self.decoder = decoder

    def forward(self, images: Tensor, noise: Noise | None = None) -> list[Tensor]:
        """Reconstruct the levels, level 0 first, of images [N, C, W, W] in [0,1].

        ``noise`` is added to the latent.
        """
        features = run_units(self.encoder, images)
        return self.decode(features, noise)

    def decode(self, features: list[Tensor], noise: Noise | None = None) -> list[Tensor]:
        """Reconstruct the levels from the outputs of the encoder units."""
        latent = features[-1] if noise is None else noise(features[-1])
        levels: list[Tensor] = self.decoder(features, latent)
        return levels


def run_blocks(blocks: Sequence[nn.Module] | nn.ModuleList, x: Tensor) -> list[Tensor]:
    """Return the output of every block in turn."""
    features = []
    for block in blocks:
        x = block(x)
        features.append(x)
    return features


def run_units(blocks: Sequence[nn.Module] | nn.ModuleList, x: Tensor) -> list[Tensor]:
    """Return the output of every unit of every block in turn, which decoders read."""
    return run_blocks([unit for block in blocks for unit in units_of(block)], x)


class DefendNet(nn.Module):
    """Classifier together with its auto-encoder during training.

    The first ``shared_blocks`` encoder blocks are one set of weights for both. The auto-encoder
    owns copies of the others, initialised with the classifier's weights (sec. 3.4).

    Args:
        classifier: a network with an adapter (``build_classifier``), which is not modified. To
            train it alone, call only the classifier.
        shared_blocks: 1 .. number of encoder blocks.
        sizes: level sizes in pixels, level 0 first.
        channels: image channels.
        decoder: components.models.decoder_plan.DecoderKind.
        levels: number of levels, from level 0 on, that have a target (0: all). Only these get an
            image head.
        seed: seed of the decoder's initial weights.

    Raises:
        ConfigError: shared_blocks is out of range, the decoder is unknown, or the encoder does not
            have these sizes.
    """

    def __init__(
        self,
        classifier: nn.Module,
        *,
        shared_blocks: int,
        sizes: Sequence[int],
        channels: int,
        decoder: str = "pyramid",
        levels: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        blocks = encoder_blocks(classifier)
        if not 1 <= shared_blocks <= len(blocks):
            raise ConfigError.of(
                "train.shared_blocks",
                shared_blocks,
                f"1 to {len(blocks)} encoder blocks of {type(classifier).__name__}",
            )
        shapes = unit_shapes(classifier, channels, sizes[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)  # The classifier was drawn from the stream of seed itself.
            decoder_module = build_decoder(decoder, shapes, sizes, channels, levels)
        self.shared_blocks = shared_blocks
        self.classifier = classifier
        copied_blocks = [copy.deepcopy(block) for block in blocks[shared_blocks:]]
        self.autoencoder = AutoEncoder([*blocks[:shared_blocks], *copied_blocks], decoder_module)

    def joint(
        self, images: Tensor, classifier_noise: Noise | None = None, autoencoder_noise: Noise | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute logits and reconstructed levels of the same images; the shared blocks run once.

        The noise functions are added to the latent of the classifier and of the auto-encoder. If
        all blocks are shared there is one latent, and the classifier's noise is used for both.
        """
        s = self.shared_blocks
        encoder = list(self.autoencoder.encoder)
        shared = run_units(encoder[:s], images)
        own_blocks = encoder_blocks(self.classifier)[s:]
        latent = run_blocks(own_blocks, shared[-1])[-1] if own_blocks else shared[-1]
        if classifier_noise is not None:
            latent = classifier_noise(latent)
        logits = apply_head(self.classifier, latent)
        if own_blocks:
            features = shared + run_units(encoder[s:], shared[-1])
            return logits, self.autoencoder.decode(features, autoencoder_noise)
        # The noisy latent goes to the decoder alone: the taps H read the clean maps.
        return logits, self.autoencoder.decoder(shared, latent)


def classify_with_noise(classifier: nn.Module, images: Tensor, noise: Noise | None = None) -> Tensor:
    """Compute logits [N, classes] with ``noise`` added to the latent (sec. 4.2, ours + GN)."""
    if noise is None:
        logits: Tensor = classifier(images)
        return logits
    return apply_head(classifier, noise(run_blocks(encoder_blocks(classifier), images)[-1]))


def adaptive_objective(
    autoencoder: nn.Module, clean: Tensor, objective: str, weight: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the loss term of an attacker who knows the auto-encoder (attack ``adaptive``).

    The shared encoder is what the defense strengthens, so the attacker targets what it encodes, not
    the logits alone:

    - latent: |z(x) - z(clean)|^2 / |z(clean)|^2, where z is the output of the auto-encoder's last
      encoder block. With all blocks shared that is the classifier's own last feature map.
    - reconstruction: |r(x) - r(clean)|^2 / |r(clean)|^2, where r is the reconstructed image (level
      0).

    A denominator below 1e-12, as a dead network has, counts as 1e-12.

    Args:
        autoencoder: an :class:`AutoEncoder` in eval mode.
        clean: float32 [N,C,W,W] in [0,1].
        objective: "latent" or "reconstruction".
        weight: factor of the term.

    Returns:
        A function (x [n,C,W,W], rows int64 [n] among the N images) -> values [n].
    """
    if not isinstance(autoencoder, AutoEncoder):
        raise TypeError(f"an AutoEncoder wanted, got {type(autoencoder).__name__}")

    def representation(x: Tensor) -> Tensor:
        features = run_units(autoencoder.encoder, x)
        return (features[-1] if objective == "latent" else autoencoder.decode(features)[0]).flatten(1)

    with torch.no_grad():
        reference = representation(clean)
        scale = weight / reference.square().sum(1).clamp_min(_SMALLEST_REFERENCE)

    def term(x: Tensor, rows: Tensor) -> Tensor:
        return (representation(x) - reference[rows]).square().sum(1) * scale[rows]

    return term
