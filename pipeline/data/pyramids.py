"""Stage 1: images to multi-scale low-pass pyramids, stored as Parquet shards with a manifest (Ray Data).

One Ray Data task per missing shard decodes its images, computes their levels and writes one file, whole or not at all. The
manifest is written last: a directory without it does not exist for a reader, and a killed build continues with the shards that
are not there yet. Names and bytes follow from source and settings alone, so a continued build equals an unbroken one.

Before the manifest is written, a few of the stored images are compared with torch-dct, an independent implementation.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasink

from components.config import DataConfig, PyramidConfig, level_sizes
from components.errors import DataError, UserError
from components.fields import content_hash
from pipeline.data.shards import FORMAT_VERSION, MANIFEST, ShardSet, load, tensor_array, to_numpy
from pipeline.data.sources.base import Batch, Source, Split, split_rows
from pipeline.data.sources.open import open_source
from pipeline.data.splits import DRAW_VERSION
from pipeline.runtime.polling import polling
from pipeline.runtime.quiet import quiet_ray_data
from pipeline.runtime.storage import Storage
from pipeline.runtime.user_errors import carrying_user_errors, unwrap

PROGRESS_INTERVAL_S = 0.5
STALE_S = 60.0
"""A half-written file that has not grown for so long was left behind by a killed process: a write takes seconds."""
SHARD_BYTES = 32 << 20
"""Pixels and levels of a shard, before compression: Ray Data takes 0.1 to 0.2 s to follow a finished task with the next, which
must be little beside the task."""
MAX_SHARD_ROWS = 16384
CHUNK_BYTES = 2 << 20
"""float32 images low-pass filtered at once: few enough that they stay in the processor's cache."""
COMPARED_IMAGES = 8
"""Images of the first shard whose stored levels are compared with torch-dct."""
FLOAT32_ERROR = 1e-5
"""Bound on the rounding error of a level computed in float32. The largest measured one is 2.1e-6 for
images below 512 pixels and 4.1e-6 up to 4096 (random, binary and white images)."""


Targets = Literal["lowpass", "linear", "none"]


def address_of(data: DataConfig, pyramids: PyramidConfig, split: Split, *, targets: Targets = "lowpass") -> str:
    """Where :func:`build` puts this split. Reads the source's files to hash them. Raises as :func:`open_source`."""
    return _plan(data, pyramids, split, targets).address


def build(
    data: DataConfig,
    pyramids: PyramidConfig,
    storage: Storage,
    split: Split,
    *,
    targets: Targets = "lowpass",
    progress: Callable[[int, int], None] | None = None,
) -> ShardSet:
    """Build the pyramids of one split, continue a build that was killed, or find the one that is there.

    Needs a running Ray (``ray.init`` is the caller's) only if shards are missing. Memory does not grow with the data set: a
    task holds one shard.

    Args:
        storage: root; every node must reach it and the source.
        targets: lowpass (DCT), linear (bilinear), or none: images alone.
        progress: called with (images done, images in all), by one thread at a time, though not the caller's.

    Raises:
        DataError, ConfigError: as :func:`pipeline.data.sources.open.open_source` and :meth:`Source.read`, also out of a Ray task;
            DataError also where stored levels differ from torch-dct's.
        StorageError: the storage is full or not writable; finished shards are kept.
    """
    plan = _plan(data, pyramids, split, targets)
    report = progress or (lambda done, total: None)
    directory = storage / plan.address
    if not directory.exists(MANIFEST):
        missing = plan.missing(directory)
        with _reporting(plan, directory, report if missing else None):
            _write(plan, directory, missing)
    report(len(plan.rows), len(plan.rows))
    return load(storage, plan.address)


@dataclass(frozen=True)
class ShardSetPlan:
    """All that a task needs to make any shard of a set. Picklable."""

    source: Source
    fingerprint: str
    split: Split
    pyramids: PyramidConfig
    rows: np.ndarray
    """Positions in the source of the split's rows, in the order in which they are stored, int64."""
    sizes: tuple[int, ...]
    targets: Targets

    @property
    def address(self) -> str:
        return f"pyramids/{content_hash(self.settings())}"

    def settings(self) -> dict[str, Any]:
        """All that the bytes follow from, as JSON."""
        data = self.source.data
        settings: dict[str, Any] = {
            "version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "split": self.split,
            "source_rows": self.source.num_rows,
            "image_size": data.image_size,
            "channels": data.channels,
            "num_classes": data.num_classes,
            "targets": self.targets,
            "level_sizes": list(self.sizes),
            # without levels their precision says nothing
            "dtype": self.pyramids.dtype if len(self.sizes) > 1 else None,
            "rows_per_shard": self.pyramids.rows_per_shard,
        }
        if data.resize != "none":
            settings["resize"] = data.resize
        # Only the test images and a limited source depend on a draw. Without one the address does not change with the draw's
        # version: whole training splits, and so the models trained on them, stay where they are.
        if self.split == "test" or self.source.drawn is not None:
            settings["draw"] = {"version": DRAW_VERSION, "seed": data.subset_seed}
        if data.class_order == "number":
            settings["class_order"] = data.class_order
        if self.split != "test":  # another validation split leaves the test images what they are
            settings |= {"validation_fraction": data.validation_fraction, "split_seed": data.split_seed}
        return settings

    @property
    def has_lowpass_levels(self) -> bool:
        return self.targets == "lowpass" and len(self.sizes) > 1

    @property
    def num_shards(self) -> int:
        return -(-len(self.rows) // self.pyramids.rows_per_shard)

    def shard_rows(self, shard: int) -> np.ndarray:
        return self.rows[shard * self.pyramids.rows_per_shard : (shard + 1) * self.pyramids.rows_per_shard]

    def missing(self, directory: Storage) -> list[int]:
        """Shards that are not there whole: another process may have been killed, or the disk full."""
        present = set(directory.list())
        return [i for i in range(self.num_shards) if _name(i) not in present or not self._is_whole(directory, i)]

    def _is_whole(self, directory: Storage, shard: int) -> bool:
        try:
            with pq.ParquetFile(directory.fs.open_input_file(directory.path(_name(shard)))) as file:
                tag = (file.schema_arrow.metadata or {}).get(b"defendpp")
                return tag == self.tag(shard) and file.metadata.num_rows == len(self.shard_rows(shard))
        except (pa.ArrowException, OSError):
            return False

    def tag(self, shard: int) -> bytes:
        """Schema metadata of a shard: which one it is, of which set."""
        return json.dumps({"address": self.address, "shard": shard}, sort_keys=True).encode()

    def table(self, shard: int) -> pa.Table:
        """Decode the images of a shard and compute their levels. Raises DataError as :meth:`Source.read`."""
        images, labels = self._read(self.shard_rows(shard))
        columns: dict[str, pa.Array] = {
            "index": pa.array(self.source.numbers[self.shard_rows(shard)]),
            "label": pa.array(labels.astype(np.int32)),
            "image": tensor_array(images),
        }
        for m, level in enumerate(self._levels(images), start=1):
            columns[f"level_{m}"] = tensor_array(level)
        return pa.table(columns).replace_schema_metadata({"defendpp": self.tag(shard)})

    def _read(self, rows: np.ndarray) -> Batch:
        """Read rows in the order given; the source reads its files from front to back, each part of them once."""
        order = np.argsort(rows)
        images, labels = self.source.read(rows[order])
        if (np.diff(order) == 1).all():
            return images, labels
        back = np.argsort(order)
        return images[back], labels[back]

    def _levels(self, images: np.ndarray) -> list[np.ndarray]:
        """Levels 1.. of uint8 images [n,C,W,W], in the stored precision."""
        if len(self.sizes) == 1:
            return []
        _import_torch()
        import torch

        from components.dct import target_levels

        n, channels, size = images.shape[:3]
        levels = [np.empty((n, channels, s, s), np.dtype(self.pyramids.dtype)) for s in self.sizes[1:]]
        chunk = max(1, CHUNK_BYTES // (4 * channels * size * size))
        with _one_thread():
            for start in range(0, n, chunk):
                part = slice(start, start + chunk)
                batch = torch.from_numpy(images[part]).float().div_(255)
                for stored, level in zip(levels, target_levels(batch, self.sizes, self.targets)[1:], strict=True):
                    torch.from_numpy(stored[part]).copy_(level)
        return levels


class _ShardDatasink(Datasink[dict[str, Any]]):
    """Writes each task's table as one file, and the manifest when all are there."""

    def __init__(self, plan: ShardSetPlan, directory: Storage) -> None:
        self.plan = plan
        self.directory = directory

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> dict[str, Any]:
        # Ray Data may cut a large table into several blocks of the same task
        table = pa.concat_tables(blocks)
        shard = json.loads(table.schema.metadata[b"defendpp"])["shard"]
        expected = len(self.plan.shard_rows(shard))
        if table.num_rows != expected:
            raise RuntimeError(f"Ray Data passed {table.num_rows} rows of shard {shard}, not {expected}")
        with carrying_user_errors():
            return _write_shard(self.directory, shard, table)

    def on_write_complete(self, write_result: Any) -> None:
        _write_manifest(self.plan, self.directory, write_result.write_returns)


def _write(plan: ShardSetPlan, directory: Storage, missing: list[int]) -> None:
    if not missing:  # killed between the last shard and the manifest
        _write_manifest(plan, directory, [])
        return
    import ray.data

    # one row, one block, one task per shard; without the number Ray Data would put them all into a few blocks
    shards = ray.data.from_items([{"shard": i} for i in missing], override_num_blocks=len(missing))
    context = shards.context  # this data set's own copy: nothing is changed for others
    context.enable_progress_bars = False  # ``progress`` says it
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else only its text comes back
    context.target_max_block_size = None  # a shard is as large as rows_per_shard says, and stays one block

    def build_shard(batch: pa.Table) -> pa.Table:
        with carrying_user_errors():
            return plan.table(batch["shard"][0].as_py())

    tables = shards.map_batches(build_shard, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
    try:
        with quiet_ray_data():
            tables.write_datasink(_ShardDatasink(plan, directory))
    except Exception as e:
        user_error = unwrap(e)
        if user_error is None:
            raise
        raise user_error from None


def _write_shard(directory: Storage, shard: int, table: pa.Table) -> dict[str, Any]:
    """Write one file; its manifest entry. Bytes follow from the table alone: one row group, no time, no thread order."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, table.num_rows),
        # Parquet stores a uint8 or float16 as 4 or 2 separate byte streams here, which zstd then packs best and fastest
        # (1000 MNIST rows: 565 kB, 14 ms; plain 3,654 kB, 11 ms; dictionary 605 kB, 17 ms)
        use_dictionary=False,
        use_byte_stream_split=[f"{name}.list.element" for name in table.column_names[2:]],
        compression="zstd",
        compression_level=1,
        write_statistics=False,
    )
    data = sink.getvalue()
    directory.write_bytes(_name(shard), data)
    return _entry(shard, table.num_rows, data)


def _entry(shard: int, rows: int, data: bytes | pa.Buffer) -> dict[str, Any]:
    return {"name": _name(shard), "rows": rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_manifest(plan: ShardSetPlan, directory: Storage, written: Sequence[dict[str, Any]]) -> None:
    """Write the manifest, last; shards that an earlier, killed build left are hashed again."""
    entries = {entry["name"]: entry for entry in written}
    earlier = [i for i in range(plan.num_shards) if _name(i) not in entries]
    with ThreadPoolExecutor(4) as pool:
        for entry in pool.map(lambda i: _entry(i, len(plan.shard_rows(i)), directory.read_bytes(_name(i))), earlier):
            entries[entry["name"]] = entry
    comparison = _compare_with_torch_dct(plan, directory) if plan.has_lowpass_levels else {}
    directory.delete_stale("", older_than_s=STALE_S)
    manifest = {
        **plan.settings(),
        "code_version": _code_version(),
        "source": plan.source.describe(),
        "num_rows": len(plan.rows),
        "columns": {"index": "int64", "label": "int32", "image": "uint8"}
        | {f"level_{m}": plan.pyramids.dtype for m in range(1, len(plan.sizes))},
        **comparison,
        "shards": [entries[_name(i)] for i in range(plan.num_shards)],
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
    shard = pq.read_table(pa.BufferReader(directory.read_bytes(_name(0))), columns=columns, use_threads=False)
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
                f"{directory.uri}/{_name(0)}: {column} differs from torch-dct's result by {difference:.2g}, and rounding "
                f"explains at most {allowed:.2g}. Delete {directory.uri} and run the same command again; if the message "
                "comes back, PyTorch computes wrong results on this machine: reinstall it"
            )
        largest = max(largest, difference)
    return {"torch_dct_difference": float(f"{largest:.3g}"), "torch_dct_images": len(rows)}


def _plan(data: DataConfig, pyramids: PyramidConfig, split: Split, targets: Targets) -> ShardSetPlan:
    source = open_source(data, "test" if split == "test" else "train")
    sizes = level_sizes(data.image_size, 1 if targets == "none" else pyramids.levels)
    if pyramids.rows_per_shard == 0:
        stored = np.dtype(pyramids.dtype).itemsize
        row_bytes = data.channels * (sizes[0] ** 2 + stored * sum(size**2 for size in sizes[1:]))
        pyramids = replace(pyramids, rows_per_shard=max(1, min(MAX_SHARD_ROWS, SHARD_BYTES // row_bytes)))
    return ShardSetPlan(
        source=source,
        fingerprint=source.fingerprint,
        split=split,
        pyramids=pyramids,
        rows=split_rows(source, split),
        sizes=sizes,
        targets=targets,
    )


def _code_version() -> str:
    try:
        return importlib.metadata.version("defendpp")
    except importlib.metadata.PackageNotFoundError:  # a Ray job's copy of the source is not installed
        return "source"


def _name(shard: int) -> str:
    return f"shard-{shard:05d}.parquet"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Ray counts one CPU for a task, and the order of sums, so the bytes, must not follow the machine's size."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _reporting(plan: ShardSetPlan, directory: Storage, report: Callable[[int, int], None] | None) -> Iterator[None]:
    """Report the images in finished shards while the body runs: what is on the storage is what a rerun would not redo."""
    if report is None:
        yield
        return

    def look() -> None:
        with contextlib.suppress(OSError, UserError):  # a listing that fails shows in the build itself
            names = set(directory.list())
            done = sum(len(plan.shard_rows(i)) for i in range(plan.num_shards) if _name(i) in names)
            report(done, len(plan.rows))

    with polling(look, PROGRESS_INTERVAL_S):
        yield


def _import_torch() -> None:
    """Import what a task needs out of components.dct, so that no interrupt can leave torch half imported.

    When a task fails, Ray interrupts the others in their main threads; one that was just importing torch would leave it unusable
    in a worker process that lives on. An interrupt does not reach another thread.
    """
    thread = threading.Thread(target=importlib.import_module, args=("components.dct",))
    thread.start()
    thread.join()
