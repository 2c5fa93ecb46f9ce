"""Networks as MLflow's logged models, and as versions of registered models."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException

from pipeline.runtime import provenance
from pipeline.runtime.quiet import log_levels
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.requests import UPLOAD_TIMEOUT_SECONDS, global_uri, http_limits

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


@dataclass
class Registration:
    """A network on its way to become a version of a registered model.

    ``mlflow.pytorch.load_model("models:/NAME@newest")`` returns the module, with ``eval()`` and
    gradients. This requires MLflow's pickle format, and so trust in its author: the pt2 format
    returns a graph on which ``eval()`` raises. Attacks use neither. They rebuild the network from
    ``classifier.safetensors`` and ``model.json``.

    The object remembers what an earlier try has made, so that the next one does not make it again.
    """

    module: nn.Module
    example_input: np.ndarray
    """A batch of images, float32 [B,C,H,W], for the signature."""
    name: str
    """Of the registered model."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON types for the model's MLmodel file."""
    version_alias: str = "newest"
    """Registry alias that is moved to this version."""
    own_alias: str = ""
    """A second alias, which no other registration moves."""
    concluded: float | None = None
    """When the network was chosen as the best (unix seconds). ``version_alias`` does not move if it
    stands for a later choice. If None, it moves whenever other weights are registered."""
    tags: Mapping[str, Any] = field(default_factory=dict)
    """Of the version."""
    weights: str = field(init=False)
    """Digest of the weights. A run has one version for each."""
    _model_id: str = field(init=False, default="")
    _location: str = field(init=False, default="")
    _is_uploaded: bool = field(init=False, default=False)
    _is_output: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.weights = weights_digest(self.module)
        self.name = re.sub("[/:]", "_", self.name)  # MLflow refuses these in the name of a registered model.

    @property
    def key(self) -> str:
        """Key of the operation. A later choice of the same weights has another one."""
        key = f"register/{self.name}/{self.version_alias}/{self.weights}"
        return key if self.concluded is None else f"{key}/{self.concluded}"

    def send(self, client: MlflowClient, outbox: Outbox, alias: str) -> None:
        """Create the version, unless the run has one of these weights. Set its tags and aliases."""
        run_id = outbox.run_id(alias)
        # The versions are not filtered by name, since MLflow's filters have no escape for quotes.
        versions = [v for v in client.search_model_versions(f"run_id = '{run_id}'") if v.name == self.name]
        version = next((str(v.version) for v in versions if v.tags.get("weights") == self.weights), None)
        if version is None:
            version = self._create_version(client, outbox, run_id, {"weights": self.weights, "alias": alias})
        concluded = {} if self.concluded is None else {"concluded": self.concluded}
        for key, value in {**self.tags, **concluded}.items():
            client.set_model_version_tag(self.name, version, key, text_of(value))
        if self.own_alias:
            client.set_registered_model_alias(self.name, self.own_alias, version)
        self._move_alias(client, outbox, version)

    def _create_version(self, client: MlflowClient, outbox: Outbox, run_id: str, tags: dict[str, Any]) -> str:
        """Log the network as a model of the run and register it. Return the version's number."""
        if not self._model_id:
            name = re.sub("""[/:.%"']""", "_", self.name)  # A logged model's name is more restricted.
            experiment_id = str(outbox.state["experiment"])
            model = client.create_logged_model(experiment_id, name, run_id, model_type="classifier")
            self._model_id, self._location = model.model_id, model.artifact_location
        if not self._is_uploaded:
            self._upload(client, run_id)
            self._is_uploaded = True
        client.finalize_logged_model(self._model_id, "READY")
        if not self._is_output:
            client.log_outputs(run_id, [LoggedModelOutput(self._model_id, step=0)])
            self._is_output = True
        with contextlib.suppress(MlflowException):  # It may exist.
            client.create_registered_model(self.name)
        source = f"models:/{self._model_id}"
        with global_uri(outbox.uri):  # MLflow looks up the logged model of a database by its global URI.
            version = client.create_model_version(self.name, source, run_id, tags, model_id=self._model_id)
        return str(version.version)

    def _upload(self, client: MlflowClient, run_id: str) -> None:
        """Save the network in MLflow's pickle format and upload it for the logged model."""
        import mlflow.pytorch
        import torch
        from mlflow.models import Model, infer_signature

        module = copy.deepcopy(self.module).cpu().eval()
        with torch.no_grad():
            output = module(torch.from_numpy(self.example_input)).numpy()
        metadata = dict(self.metadata) or None
        card = Model(self._location, run_id, model_uuid=self._model_id, metadata=metadata, model_id=self._model_id)
        # MLflow logs a warning of the pickle format.
        with (
            tempfile.TemporaryDirectory(prefix="defendpp-") as directory,
            log_levels({"mlflow.pytorch": logging.ERROR}),
        ):
            mlflow.pytorch.save_model(
                module,
                f"{directory}/model",
                mlflow_model=card,
                signature=infer_signature(self.example_input, output),
                serialization_format="pickle",
                code_paths=[str(provenance.ROOT / "components")],
                # Without this list MLflow loads the model in another process to infer it.
                pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", "torchvision", "numpy", "cloudpickle"],
            )
            with http_limits(timeout=UPLOAD_TIMEOUT_SECONDS):
                client.log_model_artifacts(self._model_id, f"{directory}/model")

    def _move_alias(self, client: MlflowClient, outbox: Outbox, version: str) -> None:
        """Move ``version_alias`` to the version, unless it stands for a later conclusion."""
        name, alias = self.name, self.version_alias
        holder = client.get_registered_model(name).aliases.get(alias)
        if self.concluded is not None and holder is not None and str(holder) != version:
            tags = client.get_model_version(name, str(holder)).tags
            owner = f"version {holder}, which {tags.get('sweep') or tags.get('alias', 'another run')} chose"
            if float(tags.get("concluded", "-inf")) > self.concluded:
                outbox.echo(f"MLflow: {name}@{alias} stays with {owner} later")
                return
            outbox.echo(f"MLflow: {name}@{alias} is now version {version}; before, {owner}")
        client.set_registered_model_alias(name, alias, version)


def weights_digest(module: nn.Module) -> str:
    """Return a hash of the names and values of a network's state."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        # NumPy has no bfloat16 and no float8, so the bytes are read as integers.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def text_of(value: Any) -> str:
    """Return a value as the text of a tag or param: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
