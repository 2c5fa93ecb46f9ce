"""Publication to MLflow. No other package imports mlflow."""

import os

# MLflow reads these variables when it is imported or at each call. The user's own values stay.
for _name, _value in {
    # alembic otherwise reports every table that it creates.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # The default of 7 retries with growing pauses blocks the caller of a dead server for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # An open connection would still use a database file that was put aside.
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
}.items():
    os.environ.setdefault(_name, _value)
