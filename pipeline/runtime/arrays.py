"""Files of named arrays."""

from __future__ import annotations

import io
import zipfile

import numpy as np

from components.errors import DataError
from pipeline.runtime.storage import Storage


def read_arrays(run: Storage, name: str) -> dict[str, np.ndarray]:
    """A .npz of a run; empty if it has none. Raises DataError if it is corrupt."""
    if not run.exists(name):
        return {}
    try:
        with np.load(io.BytesIO(run.read_bytes(name)), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f"{run.uri}/{name} is corrupt ({e}); delete it and run the same command again") from e
