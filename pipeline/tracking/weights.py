"""Weights from MLflow, by the name of a registered model or the path of a run's file."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from components.errors import UserError
from pipeline.runtime.redaction import without_password
from pipeline.tracking.requests import reason_of
from pipeline.tracking.server import connect
from pipeline.tracking.uri import check_address


def download_weights(tracking_uri: str, uri: str) -> tuple[str, bytes]:
    """Return a file of weights from MLflow.

    Args:
        tracking_uri: the MLflow server or database.
        uri: ``models:/MODEL_ID``, ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``, a logged or
            registered model whose run has one file of weights (as the runs of this project do); or
            ``runs:/RUN_ID/PATH``, a file of a run.

    Returns:
        Its name, ``mlflow:runs:/RUN_ID/PATH``, and its content.

    Raises:
        UserError: there is no such file, there are several, or MLflow cannot be reached.
    """
    check_address(tracking_uri)
    try:
        client = connect(tracking_uri)
        run_id, path = _locate(client, uri)
        with tempfile.TemporaryDirectory() as directory:
            file = mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path=path, dst_path=directory, tracking_uri=tracking_uri
            )
            return f"mlflow:runs:/{run_id}/{path}", Path(file).read_bytes()
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as e:
        raise UserError(
            f"mlflow:{uri} at {without_password(tracking_uri)} cannot be had: {reason_of(e)}; "
            "check the name and --tracking-uri"
        ) from None


def _locate(client: MlflowClient, uri: str) -> tuple[str, str]:
    """Return the run and the path of the file that ``uri`` names."""
    kind, _, rest = uri.partition(":/")
    if kind == "runs":
        run_id, _, path = rest.strip("/").partition("/")
        if path:
            return run_id, path
    elif kind == "models":
        name, at, alias = rest.strip("/").partition("@")
        name, _, number = (name, "", "") if at else name.partition("/")
        if name and (alias or number or name.startswith("m-")):
            run_id = _run_of_model(client, name, alias, number)
            files = list(_weight_files(client, run_id))
            weights = [f for f in files if f.endswith("classifier.safetensors")] or files
            if len(weights) == 1:
                return run_id, weights[0]
            raise UserError(
                f"mlflow:{uri}: run {run_id} holds {len(weights)} files of weights "
                f"({', '.join(weights) or 'no .safetensors, .pth or .pt'}); name one as mlflow:runs:/{run_id}/PATH"
            )
    raise UserError(
        f"mlflow:{uri} names no weights: give mlflow:models:/MODEL_ID, mlflow:models:/NAME@ALIAS, "
        "mlflow:models:/NAME/VERSION or mlflow:runs:/RUN_ID/PATH"
    )


def _run_of_model(client: MlflowClient, name: str, alias: str, number: str) -> str:
    """Return the run of a registered model's version, or of the logged model whose id is ``name``."""
    if alias:
        return str(client.get_model_version_by_alias(name, alias).run_id)
    if number:
        return str(client.get_model_version(name, number).run_id)
    return str(client.get_logged_model(name).source_run_id)


def _weight_files(client: MlflowClient, run_id: str, path: str | None = None) -> Iterator[str]:
    """Yield the paths of a run's files of weights, those in folders included."""
    for entry in client.list_artifacts(run_id, path):
        if entry.is_dir:
            yield from _weight_files(client, run_id, entry.path)
        elif entry.path.endswith((".safetensors", ".pth", ".pt")):
            yield entry.path
