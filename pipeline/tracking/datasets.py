"""A split of a run's data as MLflow's data set."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from mlflow.data.schema import TensorDatasetSchema
from mlflow.entities import Dataset
from mlflow.types import Schema, TensorSpec

DIGEST_LENGTH = 36
"""MLflow's limit on the characters of a digest."""


@dataclass(frozen=True, kw_only=True)
class SplitData:
    """A split: uint8 images [N,C,H,W] and int32 labels [N] in Parquet shards."""

    name: str
    digest: str
    """Hash of all that the images follow from."""
    source: str
    """URI of the shards."""
    rows: int
    channels: int
    image_size: int

    def entity(self) -> Dataset:
        """Return the data set as MLflow's clients send it."""
        images = TensorSpec(np.dtype("uint8"), (-1, self.channels, self.image_size, self.image_size), "image")
        labels = TensorSpec(np.dtype("int32"), (-1,), "label")
        scheme, _, _ = self.source.partition("://")
        return Dataset(
            name=self.name,
            digest=self.digest[:DIGEST_LENGTH],
            source_type="local" if scheme in ("file", self.source) else scheme,
            source=json.dumps({"uri": self.source}),
            schema=json.dumps(TensorDatasetSchema(Schema([images]), Schema([labels])).to_dict()),
            profile=json.dumps({"num_rows": self.rows}),
        )
