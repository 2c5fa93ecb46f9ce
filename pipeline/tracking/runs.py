"""Creation and deletion of MLflow's runs."""

from __future__ import annotations

import getpass
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Run

from components.errors import UserError
from pipeline.tracking.outbox import Outbox

EARLIER = "earlier runs"
"""Alias of the operation that deletes them."""
UNQUOTED = " !#$&()*+,-./:;<=>?@[]^_`{|}~"
"""Characters besides letters and digits that are not quoted in the key by which a run is found."""


def create(client: MlflowClient, outbox: Outbox, alias: str, name: str, parent: str | None, start: int) -> None:
    """Create the run of an alias, unless an earlier try did whose answer was lost.

    Args:
        parent: alias of the run that this one belongs to.
        start: when the run began (milliseconds).
    """
    key = f"{outbox.key_prefix}{quote(alias, safe=UNQUOTED)}"  # MLflow's filters have no escape for quotes.
    experiment_id = str(outbox.state["experiment"])
    runs = client.search_runs([experiment_id], f"tags.defendpp_key = '{key}'", max_results=1)
    if runs:
        run_id = runs[0].info.run_id
    else:
        if not outbox.is_saved:
            # A restarted process can find the run only by a key that is persistent.
            outbox.save()
        tags = {"defendpp_key": key, "mlflow.user": user_name()}
        if parent is not None:
            tags["mlflow.parentRunId"] = outbox.run_id(parent)
        run_id = client.create_run(experiment_id, start, tags, name).info.run_id
    with outbox.lock:
        outbox.state["runs"][alias] = {"id": run_id, "start": start}


def delete_earlier(client: MlflowClient, outbox: Outbox) -> None:
    """Delete the runs of earlier generations of a run directory, with their logged models.

    Raises:
        UserError: a part of the new runs was refused or could not be read.
    """
    if any(not key.startswith(f"{EARLIER}|") for key in outbox.refused):
        raise UserError("the earlier runs stay, since the new ones are not complete")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    of_directory = _search(client, experiments, f"tags.defendpp_key LIKE '{outbox.token}%'")
    earlier = [run for run in of_directory if not run.data.tags["defendpp_key"].startswith(outbox.key_prefix)]
    for run in earlier:
        info = run.info
        for model in client.search_logged_models([info.experiment_id], f"source_run_id = '{info.run_id}'"):
            client.delete_logged_model(model.model_id)
        client.delete_run(info.run_id)
    with outbox.lock:
        outbox.state["is_replacing"] = False
    if earlier:
        outbox.echo(
            f"MLflow: {len(earlier)} earlier runs of {outbox.directory.uri} are deleted; its UI lists them under "
            "State: Deleted, and can restore them"
        )


def _search(client: MlflowClient, experiments: list[str], filter_text: str) -> list[Run]:
    """Return all runs that a filter finds."""
    found: list[Run] = []
    page = client.search_runs(experiments, filter_text, max_results=1000)
    while True:
        found += page
        if not page.token:
            return found
        page = client.search_runs(experiments, filter_text, max_results=1000, page_token=page.token)


def user_name() -> str:
    """Return the name of the user who runs this process, or "unknown"."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container's user may have no name.
        return "unknown"
