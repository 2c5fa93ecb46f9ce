"""A run as MLflow shows it, made from its records (docs/mlflow.md)."""
