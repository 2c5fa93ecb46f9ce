"""The records of a sweep as tables, plots, a page and MLflow runs."""
