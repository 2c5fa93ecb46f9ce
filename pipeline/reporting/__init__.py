"""Stage 4: the records become tables, plots, a report and an MLflow run."""
