"""Networks as MLflow's logged models: what the page "Models" of an experiment shows."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus

from pipeline.runtime import provenance
from pipeline.runtime.quiet import log_levels
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.requests import UPLOAD_TIMEOUT_SECONDS, http_limits
from pipeline.tracking.runs import user_name

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

WEIGHTS = "weights"
"""Tag of a logged model and of a registered version: a digest of the weights."""


@dataclass
class LoggedNetwork:
    """A network on its way to become the logged model of a run.

    ``mlflow.pytorch.load_model("models:/MODEL_ID")`` returns the module, with ``eval()`` and
    gradients. This requires MLflow's pickle format, and so trust in its author: the pt2 format
    returns a graph on which ``eval()`` raises. Attacks use neither. They rebuild the network from
    ``classifier.safetensors`` and ``model.json``.
    """

    name: str
    """Shown in MLflow's UI."""
    weights: str
    """Digest of the weights. A run has one logged model for each."""
    load: Callable[[], tuple[nn.Module, np.ndarray]]
    """Returns the network and an example of its input, float32 [B,C,H,W] in [0,1]. It is called when
    the model is sent, so that networks that wait take no memory."""
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON types for the model's MLmodel file."""

    def send(self, client: MlflowClient, outbox: Outbox, alias: str) -> None:
        """Create the logged model and upload the network, unless the run has one of these weights."""
        run_id = outbox.run_id(alias)
        model = self._existing(client, outbox, run_id) or self._create(client, outbox, run_id)
        with outbox.lock:
            outbox.state["models"][alias] = model.model_id
        # An earlier try may have got as far as any of these steps.
        if model.status != LoggedModelStatus.READY:
            self._upload(client, run_id, model)
            client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        outputs = client.get_run(run_id).outputs
        if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])

    def _existing(self, client: MlflowClient, outbox: Outbox, run_id: str) -> LoggedModel | None:
        models = client.search_logged_models([str(outbox.state["experiment"])], f"source_run_id = '{run_id}'")
        return next((model for model in models if model.tags.get(WEIGHTS) == self.weights), None)

    def _create(self, client: MlflowClient, outbox: Outbox, run_id: str) -> LoggedModel:
        return client.create_logged_model(
            str(outbox.state["experiment"]),
            re.sub("""[/:.%"']""", "_", self.name),  # MLflow refuses these in the name of a logged model.
            run_id,
            tags={
                WEIGHTS: self.weights,
                "mlflow.user": user_name(),
                **{key: text_of(value) for key, value in self.tags.items()},
            },
            params={key: text_of(value) for key, value in self.params.items()},
            model_type="classifier",
        )

    def _upload(self, client: MlflowClient, run_id: str, model: LoggedModel) -> None:
        """Save the network in MLflow's pickle format and upload it, with signature and example."""
        import mlflow.pytorch
        import torch
        from mlflow.models import Model, infer_signature

        loaded, example = self.load()
        module = copy.deepcopy(loaded).cpu().eval()
        with torch.no_grad():
            output = module(torch.from_numpy(example)).numpy()
        metadata = dict(self.metadata) or None
        card = Model(
            model.artifact_location, run_id, model_uuid=model.model_id, metadata=metadata, model_id=model.model_id
        )
        # MLflow logs a warning of the pickle format.
        with (
            tempfile.TemporaryDirectory(prefix="defendpp-") as directory,
            log_levels({"mlflow.pytorch": logging.ERROR}),
        ):
            mlflow.pytorch.save_model(
                module,
                f"{directory}/model",
                mlflow_model=card,
                signature=infer_signature(example, output),
                input_example=example,
                serialization_format="pickle",
                code_paths=[str(provenance.ROOT / "components")],
                # Without this list MLflow loads the model in another process to infer it.
                pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", "torchvision", "numpy", "cloudpickle"],
            )
            with http_limits(timeout=UPLOAD_TIMEOUT_SECONDS):
                client.log_model_artifacts(model.model_id, f"{directory}/model")


def weights_digest(*checksums: str) -> str:
    """Return a digest of a network's weights from the checksums of its files."""
    return hashlib.sha256(" ".join(checksums).encode()).hexdigest()[:16]


def text_of(value: Any) -> str:
    """Return a value as the text of a tag or param: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
