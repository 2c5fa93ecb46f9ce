"""``defendpp export``: a trained classifier as a file for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from components.errors import ConfigError, one_of
from pipeline.cli.options import Parser
from pipeline.program import program
from pipeline.runtime.console import say

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
"""Usual suffix of the files of each format."""
USAGE = """\
usage: {program} export MODEL_DIR --out FILE [--format FORMAT] [--arch MODULE:FUNCTION]
       {program} export RUN/MODEL --out FILE ...

A trained classifier for other programs.

  MODEL_DIR   a trained model: STORAGE/models/KIND-HASH
  RUN/MODEL   a run's directory and the name of its model: STORAGE/runs/NAME-HASH/defend. A reformer
              (comdefend) is exported with its classifier behind it, and so needs this form

options:
  --out       the file to write, a path or a URI
  --format    onnx, torch-export (torch.export.load reads it) or safetensors (weights alone);
              default: by the suffix of --out, .onnx, .pt2 or .safetensors
  --arch      the network of your own that the model names, if you trust that module

The network takes images, float32 [N,C,H,W] in [0,1], in batches of any size, and gives logits. The
file is loaded again, and its logits are compared with the network's, before it is kept.
ONNX needs: pip install 'defendpp[export]'
"""


def execute(arguments: Sequence[str]) -> int:
    """Write the file that the arguments ask for. Return the exit status.

    Raises:
        ConfigError: an option is missing or wrong, or a package is not installed.
        UserError: the model cannot be read, or its file would give other logits.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE.format(program=program()), end="")
        return 0 if arguments else 2
    parser = Parser("export")
    parser.add_argument("model", nargs="?", default="")
    for option in ("--out", "--format", "--arch"):
        parser.add_argument(option, default="")
    options = parser.parse_args(list(arguments))
    if not options.model or not options.out:
        missing = "--out is missing: name the file to write" if options.model else "name the model first"
        raise ConfigError(f"{missing} ({program()} export --help)")
    form = options.format or next((f for f, s in SUFFIXES.items() if PurePosixPath(options.out).suffix == s), "")
    if form not in SUFFIXES:
        raise ConfigError.of("--format", form, one_of(form, SUFFIXES))
    say(f"export {options.model}: loading PyTorch ...")
    _write(options.model, form, options.out, options.arch)
    return 0


def _write(model: str, form: str, out: str, arch: str) -> None:
    # These modules load torch.
    from pipeline.data.sources.base import absolute_path
    from pipeline.interchange import classifier, formats
    from pipeline.runtime.storage import split_uri
    from pipeline.training import exports

    storage, name = split_uri(absolute_path(out, "--out"))
    storage.check_writable()
    if arch:
        exports.trust([arch])
    stored = classifier.load(absolute_path(model, "the model"), formats.CHECKED_IMAGES)
    data, comparison = formats.convert(stored, form)
    storage.write_bytes(name, data)
    real = f", {comparison.real:.2g} on {comparison.images} real ones" if comparison.real is not None else ""
    shapes = stored.shapes
    say(
        f"{stored.name}: images float32 [N,{shapes.channels},{shapes.image_size},{shapes.image_size}] in [0,1] to "
        f"{shapes.num_classes} logits"
    )
    say(
        f"largest difference of logits: {comparison.random:.2g} on {formats.CHECKED_IMAGES} random images{real}; "
        f"allowed: {comparison.allowed:.2g}" + ("" if real else "; the storage has no real images of it")
    )
    say(f"{form}: {storage.uri}/{name} ({len(data) / 1e6:.2f} MB)")
