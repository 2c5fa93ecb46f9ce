"""The bundled sample: the first 6,000 training and 1,000 test images of MNIST.

    python pipeline/data/make_sample.py ../shared/data/mnist pipeline/data/mnist-sample

The input is MNIST as it is published on the Hugging Face hub (train-*.parquet, test-*.parquet). The
schema's ``huggingface`` metadata (class names) is kept; the PNG bytes are copied as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = {"train": 6000, "test": 1000}


def main(source: Path, target: Path) -> None:
    """Write the first rows of each split as one Parquet file."""
    target.mkdir(parents=True, exist_ok=True)
    for split, rows in ROWS.items():
        tables = [pq.read_table(path) for path in sorted(source.glob(f"{split}-*.parquet"))]
        table = pa.concat_tables(tables).slice(0, rows)
        path = target / f"{split}-00000-of-00001.parquet"
        pq.write_table(table, path, compression="zstd", compression_level=19, row_group_size=1000)
        print(f"{path}: {table.num_rows} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
