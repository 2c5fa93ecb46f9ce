"""Stage 1: images to multi-scale low-pass pyramids, as Parquet shards with a manifest (Ray Data).

One Ray Data task per missing shard decodes its images, computes their levels and writes one file,
whole or not at all. The manifest is written last: readers ignore a directory without it, and a
killed build continues with the missing shards. Names and bytes follow from source and settings
alone, so a continued build equals an uninterrupted one.

Before the manifest is written, a few stored images are compared with the independent torch-dct.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasink

from components.config import DataConfig, PyramidConfig
from components.errors import DataError, UserError
from pipeline import ray_metrics
from pipeline.data.shard_plan import ShardSetPlan, Targets, plan_shard_set, shard_name
from pipeline.data.shards import MANIFEST, ShardSet, load, to_numpy
from pipeline.data.sources.base import Split
from pipeline.runtime.polling import polling
from pipeline.runtime.quiet import RAY_DATA, log_levels
from pipeline.runtime.storage import Storage
from pipeline.runtime.user_errors import carrying_user_errors, unwrap

PROGRESS_INTERVAL_S = 0.5
STALE_S = 60.0
"""Age at which a temporary file belongs to a killed process: a write takes seconds."""
COMPARED_IMAGES = 8
"""Images of the first shard whose stored levels are compared with torch-dct."""
FLOAT32_ERROR = 1e-5
"""Bound on the rounding error of a level computed in float32. The largest measured one is 2.1e-6
for images below 512 pixels and 4.1e-6 up to 4096 (random, binary and white images)."""


def address_of(data: DataConfig, pyramids: PyramidConfig, split: Split, *, targets: Targets = "lowpass") -> str:
    """Return the address at which :func:`build` stores a split.

    The source's files are read for their hash. Raises as :func:`open_source`.
    """
    return plan_shard_set(data, pyramids, split, targets).address


def build(
    data: DataConfig,
    pyramids: PyramidConfig,
    storage: Storage,
    split: Split,
    *,
    targets: Targets = "lowpass",
    progress: Callable[[int, int], None] | None = None,
) -> ShardSet:
    """Build the pyramids of one split, or continue a build that was killed.

    Ray must be running if shards are missing. A task holds one shard, so large sets fit the memory.

    Args:
        storage: the root. Every node must reach it and the source.
        targets: lowpass (DCT), linear (bilinear), or none (images without levels).
        progress: called with (images done, all images), by one thread at a time, not the caller's.

    Raises:
        DataError, ConfigError: as :func:`pipeline.data.sources.open.open_source` and
            :meth:`Source.read`, also in a Ray task; or stored levels differ from torch-dct's.
        StorageError: the storage is full or not writable. Finished shards are kept.
    """
    plan = plan_shard_set(data, pyramids, split, targets)
    report = progress or (lambda done, total: None)
    directory = storage / plan.address
    if not directory.exists(MANIFEST):
        if missing := plan.missing(directory):
            with _reporting(plan, directory, report):
                _write(plan, directory, missing)
        else:  # The last build was killed between the last shard and the manifest.
            write_manifest(plan, directory, [])
    report(len(plan.rows), len(plan.rows))
    return load(storage, plan.address)


class _ShardDatasink(Datasink[dict[str, Any]]):
    """A Ray Data sink that writes each task's table as a shard, and then the manifest."""

    def __init__(self, plan: ShardSetPlan, directory: Storage) -> None:
        self.plan = plan
        self.directory = directory

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> dict[str, Any]:
        """Write a task's table. Return the shard's entry in the manifest."""
        # Ray Data may cut a task's table into several blocks.
        table = pa.concat_tables(blocks)
        shard = json.loads(table.schema.metadata[b"defendpp"])["shard"]
        expected = len(self.plan.shard_rows(shard))
        if table.num_rows != expected:
            raise RuntimeError(f"Ray Data passed {table.num_rows} rows of shard {shard}, not {expected}")
        with carrying_user_errors():
            entry = write_shard(self.directory, shard, table)
        ray_metrics.shard_written(self.plan.split, table.num_rows)
        return entry

    def on_write_complete(self, write_result: Any) -> None:
        """Write the manifest."""
        write_manifest(self.plan, self.directory, write_result.write_returns)


def _write(plan: ShardSetPlan, directory: Storage, missing: list[int]) -> None:
    """Write the missing shards in Ray Data tasks, and the manifest."""
    import ray.data

    # Each shard is one row, one block and one task. By default Ray Data makes a few blocks.
    shards = ray.data.from_items([{"shard": i} for i in missing], override_num_blocks=len(missing))
    context = shards.context  # This is a copy for this data set.
    context.enable_progress_bars = False  # ``progress`` replaces them.
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # Otherwise only its text is returned.
    context.target_max_block_size = None  # A shard of any size stays one block.

    def build_shard(batch: pa.Table) -> pa.Table:
        with carrying_user_errors():
            return plan.table(batch["shard"][0].as_py())

    tables = shards.map_batches(build_shard, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
    try:
        with log_levels(RAY_DATA):
            tables.write_datasink(_ShardDatasink(plan, directory))
    except Exception as e:
        user_error = unwrap(e)
        if user_error is None:
            raise
        raise user_error from None


def write_shard(directory: Storage, shard: int, table: pa.Table) -> dict[str, Any]:
    """Write a shard and return its entry in the manifest. Its bytes follow from the table alone."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, table.num_rows),
        # Parquet stores a uint8 or float16 as 4 or 2 separate byte streams, which zstd packs best
        # (1000 MNIST rows: 565 kB, 14 ms; plain 3,654 kB, 11 ms; dictionary 605 kB, 17 ms).
        use_dictionary=False,
        use_byte_stream_split=[f"{name}.list.element" for name in table.column_names[2:]],
        compression="zstd",
        compression_level=1,
        write_statistics=False,
    )
    data = sink.getvalue()
    directory.write_bytes(shard_name(shard), data)
    return _entry(shard, table.num_rows, data)


def _entry(shard: int, rows: int, data: bytes | pa.Buffer) -> dict[str, Any]:
    """Return a shard's entry in the manifest."""
    return {"name": shard_name(shard), "rows": rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_manifest(plan: ShardSetPlan, directory: Storage, written: Sequence[dict[str, Any]]) -> None:
    """Write the manifest. Shards of an earlier build, which are not in ``written``, are hashed."""
    entries = {entry["name"]: entry for entry in written}
    earlier = [i for i in range(plan.num_shards) if shard_name(i) not in entries]
    with ThreadPoolExecutor(4) as pool:
        hashed = pool.map(lambda i: _entry(i, len(plan.shard_rows(i)), directory.read_bytes(shard_name(i))), earlier)
        entries |= {entry["name"]: entry for entry in hashed}
    has_lowpass_levels = plan.targets == "lowpass" and len(plan.sizes) > 1
    comparison = _compare_with_torch_dct(plan, directory) if has_lowpass_levels else {}
    directory.delete_stale("", older_than_s=STALE_S)
    manifest = {
        **plan.settings(),
        "code_version": _code_version(),
        "source": plan.source.describe(),
        "num_rows": len(plan.rows),
        "columns": {"index": "int64", "label": "int32", "image": "uint8"}
        | {f"level_{m}": plan.pyramids.dtype for m in range(1, len(plan.sizes))},
        **comparison,
        "shards": [entries[shard_name(i)] for i in range(plan.num_shards)],
    }
    directory.write_json(MANIFEST, manifest)


def _compare_with_torch_dct(plan: ShardSetPlan, directory: Storage) -> dict[str, Any]:
    """Compare stored low-pass levels with torch-dct's, for a few images of the first shard.

    The reference takes sec. 3.3 literally, in float64: the DCT of the image is cropped to the
    level's frequencies, scaled and transformed back. A stored level may differ from it by float32
    arithmetic and by the rounding to ``dtype``. The images are spread evenly over the shard.

    Returns:
        The manifest's ``torch_dct_difference``, the largest absolute difference in units of [0,1]
        pixels, and ``torch_dct_images``, the number of images. Three digits are kept, so that the
        value is the same on every machine.

    Raises:
        DataError: a level differs by more than rounding explains.
    """
    import torch
    import torch_dct

    columns = ["image", *(f"level_{m}" for m in range(1, len(plan.sizes)))]
    shard = pq.read_table(pa.BufferReader(directory.read_bytes(shard_name(0))), columns=columns, use_threads=False)
    rows = np.unique(np.linspace(0, shard.num_rows - 1, COMPARED_IMAGES).astype(int))
    images = torch.from_numpy(to_numpy(shard["image"])[rows]).double() / 255
    frequencies = torch_dct.dct_2d(images, norm="ortho")
    largest = 0.0
    for column, size in zip(columns[1:], plan.sizes[1:], strict=True):
        reference = torch_dct.idct_2d(frequencies[..., :size, :size] * (size / plan.sizes[0]), norm="ortho").numpy()
        difference = float(np.abs(to_numpy(shard[column])[rows] - reference).max())
        # Rounding to nearest changes a value by at most half an epsilon of it.
        allowed = FLOAT32_ERROR + np.finfo(plan.pyramids.dtype).eps / 2 * max(1.0, float(np.abs(reference).max()))
        if not difference <= allowed:
            raise DataError(
                f"{directory.uri}/{shard_name(0)}: {column} differs from torch-dct's result by {difference:.2g}, and "
                f"rounding explains at most {allowed:.2g}. Delete {directory.uri} and run the same command again; if "
                "the message comes back, PyTorch computes wrong results on this machine: reinstall it"
            )
        largest = max(largest, difference)
    return {"torch_dct_difference": float(f"{largest:.3g}"), "torch_dct_images": len(rows)}


def _code_version() -> str:
    """Return the version of this project for the manifest."""
    try:
        return importlib.metadata.version("defendpp")
    except importlib.metadata.PackageNotFoundError:  # A Ray job's copy of the source is not installed.
        return "source"


def _reporting(
    plan: ShardSetPlan, directory: Storage, report: Callable[[int, int], None]
) -> contextlib.AbstractContextManager[None]:
    """Report the images in finished shards while the body runs."""

    def look() -> None:
        with contextlib.suppress(OSError, UserError):  # The build itself reports a storage that fails.
            names = set(directory.list())
            done = sum(len(plan.shard_rows(i)) for i in range(plan.num_shards) if shard_name(i) in names)
            report(done, len(plan.rows))

    return polling(look, PROGRESS_INTERVAL_S)
