"""Passwords and keys of URIs are redacted, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from components.errors import ConfigError
from pipeline.recipes import mnist
from pipeline.run_directory import recorded
from pipeline.runtime import provenance
from pipeline.runtime.redaction import check_no_secret, without_password

SECRET = [
    ("postgresql+psycopg://mlflow:ab/cd@db/mlflow", "postgresql+psycopg://***@db/mlflow"),
    ("http://user:pa'ss@host", "http://***@host"),
    ('http://user:pa"s?s#@host/x', "http://***@host/x"),
    ("http://user:p@ss@host:5000/x", "http://***@host:5000/x"),
    ("http://me@work.example:a/b@host", "http://***@host"),
    ("https://token@host/x", "https://***@host/x"),
    ("mysql://to'ken@host/x", "mysql://***@host/x"),
    ("abfss://container:key@account/x", "abfss://***@account/x"),
    ("postgresql://host/x?user=me&password=a'b\"c/d", "postgresql://host/x?user=me&password=***"),
    ("http://host/x?pass=hunter2", "http://host/x?pass=***"),
    ("http://host/x?auth=hunter2&a=b", "http://host/x?auth=***&a=b"),
    ("http://host/x?proxy_auth=hunter2", "http://host/x?proxy_auth=***"),
    ("s3://bucket/x?access_key=a&secret_key=b", "s3://bucket/x?access_key=***&secret_key=***"),
    ("https://account/x?sv=2024&sig=a%2Fb", "https://account/x?sv=2024&sig=***"),
    ("mssql+pyodbc:///?odbc_connect=Driver%3Dx%3BPWD%3Dhunter2", "mssql+pyodbc:///?odbc_connect=***"),
]
NOT_SECRET = [
    "abfss://container@account.dfs.example/path",
    "abfss://c@account/x?credential_kind=workload_identity&tenant_id=t&client_id=i",
    "abfss://c@account/x?blob_storage_authority=127.0.0.1:1&dfs_storage_authority=127.0.0.1:1&enable_tls=false",
    "gs://anonymous@bucket/x",
    "sftp://user@host/x",
    "hf://datasets/user/name@main/x.parquet",
    "s3://bucket/a@b/c?region=eu-west-1&endpoint_override=minio:9000&scheme=http",
    "ftp://host/x?passive=true",
    "http://[::1]:5000/x",
    "http://host:5000/#/experiments/1/runs/2?workflowType=machine_learning",
    "sqlite:////home/me@work/mlflow.db",
    "/home/me:you@work/x",
]


@pytest.mark.parametrize(("uri", "shown"), SECRET)
def test_a_secret_is_redacted_in_a_uri_in_a_text_and_in_a_command(uri: str, shown: str) -> None:
    assert without_password(uri) == shown
    assert without_password(f"MLflow at {uri} is down. Mail me@host") == f"MLflow at {shown} is down. Mail me@host"
    assert without_password(f"it is '{uri}', not a") == f"it is '{shown}', not a"
    assert provenance.command(["main.py", f"--storage={uri}", uri]).count("***") == 2 * shown.count("***")
    with pytest.raises(ConfigError, match="holds a password or key") as caught:
        check_no_secret(uri)
    assert shown in str(caught.value)


@pytest.mark.parametrize("uri", NOT_SECRET)
def test_a_uri_without_a_secret_stays_whole(uri: str) -> None:
    check_no_secret(uri)
    assert without_password(uri) == uri
    assert without_password(f"storage '{uri}' answers again") == f"storage '{uri}' answers again"


def test_a_record_holds_its_storage_whole_and_its_tracking_server_without_a_user() -> None:
    storage = "abfss://container@account.dfs.example/path?credential_kind=anonymous"
    experiment = replace(mnist.mnist_smoke(), storage=storage, tracking_uri="http://me:a/b@host:5000")
    record = recorded(experiment)
    assert record["storage"] == storage
    assert record["tracking_uri"] == "http://host:5000"
