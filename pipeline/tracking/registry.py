"""Logged models as versions of registered models."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from pipeline.tracking.logged_models import WEIGHTS, text_of
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.requests import global_uri


@dataclass
class Registration:
    """The logged model of a run on its way to become a version of a registered model.

    ``mlflow.pytorch.load_model("models:/NAME@newest")`` returns its network.
    """

    name: str
    """Of the registered model."""
    weights: str
    """Digest of the weights. A run has one version for each."""
    version_alias: str = "newest"
    """Registry alias that is moved to this version."""
    own_alias: str = ""
    """A second alias, which no other registration moves."""
    concluded: float | None = None
    """When the network was chosen as the best (unix seconds). ``version_alias`` does not move if it
    stands for a later choice. If None, it moves whenever other weights are registered."""
    tags: Mapping[str, Any] = field(default_factory=dict)
    """Of the version."""

    def __post_init__(self) -> None:
        self.name = re.sub("[/:]", "_", self.name)  # MLflow refuses these in the name of a registered model.

    @property
    def key(self) -> str:
        """Key of the operation. A later choice of the same weights has another one."""
        key = f"register/{self.name}/{self.version_alias}/{self.weights}"
        return key if self.concluded is None else f"{key}/{self.concluded}"

    def send(self, client: MlflowClient, outbox: Outbox, alias: str) -> None:
        """Create the version, unless the run has one of these weights. Set its tags and aliases."""
        run_id, model_id = outbox.run_id(alias), outbox.model_id(alias)
        # The versions are not filtered by name, since MLflow's filters have no escape for quotes.
        versions = [v for v in client.search_model_versions(f"run_id = '{run_id}'") if v.name == self.name]
        version = next((str(v.version) for v in versions if v.tags.get(WEIGHTS) == self.weights), None)
        if version is None:
            version = self._create_version(client, outbox, run_id, model_id, {WEIGHTS: self.weights, "alias": alias})
        self._link_back(client, model_id, version)
        concluded = {} if self.concluded is None else {"concluded": self.concluded}
        for key, value in {**self.tags, **concluded}.items():
            client.set_model_version_tag(self.name, version, key, text_of(value))
        if self.own_alias:
            client.set_registered_model_alias(self.name, self.own_alias, version)
        self._move_alias(client, outbox, version)

    def _create_version(
        self, client: MlflowClient, outbox: Outbox, run_id: str, model_id: str, tags: dict[str, Any]
    ) -> str:
        """Register the logged model. Return the version's number."""
        with contextlib.suppress(MlflowException):  # It may exist.
            client.create_registered_model(self.name)
        with global_uri(outbox.uri):  # MLflow looks up the logged model of a database by its global URI.
            version = client.create_model_version(self.name, f"models:/{model_id}", run_id, tags, model_id=model_id)
        return str(version.version)

    def _link_back(self, client: MlflowClient, model_id: str, version: str) -> None:
        """Name the version in the logged model, as ``mlflow.register_model`` does."""
        link = {"name": self.name, "version": int(version)}
        links = json.loads(client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
        if not any((other["name"], str(other["version"])) == (self.name, version) for other in links):
            client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*links, link])})

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
