"""Ray, MLflow and the file system: one file per stage of a run."""
