"""Image files and Parquet files as a user might have them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from components.config import DataConfig
from components.errors import UserError
from pipeline.data.sources.open import check_source, open_source

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encode(array: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(n: int, size: int = 28, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size), dtype=np.uint8)


def write_parquet(
    path: Path, encoded: Sequence[bytes | None], labels: Sequence[int | None], column: str = "image", group: int = 4
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(encoded)], IMAGE)
    pq.write_table(pa.table({column: images, "label": pa.array(labels, pa.int64())}), path, row_group_size=group)


PNG = encode(grey(1)[0])


def hub(directory: Path, *names: str, classes: int = 3) -> DataConfig:
    """Write Parquet files of one image of each class."""
    for name in names:
        write_parquet(directory / name, [PNG] * classes, range(classes))
    return DataConfig(source=f"parquet:{directory}", validation_fraction=0.0, num_classes=classes)


def folders(directory: Path, *names: str, classes: int = 2) -> DataConfig:
    """Write image files with the names SPLIT/CLASS/FILE."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(PNG)
    return DataConfig(source=f"folder:{directory}", validation_fraction=0.0, num_classes=classes)


def outcome(data: DataConfig) -> str:
    """Open, check and read a whole data set. Return "read", or the text of the error."""
    try:
        check_source(data, trains=False)
        source = open_source(data, "test")
        source.read(np.arange(source.num_rows))
        assert source.fingerprint
        return "read"
    except UserError as e:
        text = str(e)
        assert text.isprintable(), text
        assert len(text) < 3000
        return text
