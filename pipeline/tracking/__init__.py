"""MLflow: the only package that imports it."""

import os

# mlflow reads these when it is imported or at each call. Values that the user has set stand.
for _name, _value in {
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # otherwise alembic reports every table that it makes
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # The default, 7 retries with growing pauses, blocks the caller of a dead server for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # An open connection would go on with a database file that was put aside.
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
}.items():
    os.environ.setdefault(_name, _value)
