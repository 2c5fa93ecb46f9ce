"""``defendpp reproduction``: a page with the paper's numbers beside those of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from components.errors import ConfigError, DataError
from pipeline.cli.options import Parser
from pipeline.program import program

USAGE = """\
usage: {program} reproduction DIR [DIR ...] --out FILE

A page in Markdown with one row for each number that the paper prints: the paper's, ours under each
threat model, the control's, the number of images and seeds, and a verdict. Nothing is computed.

  DIR         a run's directory, STORAGE/runs/NAME-HASH, or another one that holds its run.json

options:
  --out       the file to write, a path or a URI
"""


def execute(arguments: Sequence[str]) -> int:
    """Write the page that the arguments ask for. Return the exit status.

    Raises:
        ConfigError: the command line is wrong.
        DataError: a directory has no record of a run, or none of the runs is one of a table.
        StorageError: a record cannot be read, or the page cannot be written.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE.format(program=program()), end="")
        return 0 if arguments else 2
    parser = Parser("reproduction")
    parser.add_argument("directories", nargs="*", metavar="DIR")
    parser.add_argument("--out", default="")
    options = parser.parse_args(list(arguments))
    if not options.directories or not options.out:
        missing = "--out is missing: name the file to write" if options.directories else "name a run's directory"
        raise ConfigError(f"{missing} ({program()} reproduction --help)")
    _write(options.directories, options.out)
    return 0


def _write(directories: Sequence[str], out: str) -> None:
    from pipeline.reporting import reproduction
    from pipeline.reporting.records import read_run
    from pipeline.runtime.console import say
    from pipeline.runtime.storage import split_uri

    # A directory may be relative, like a file and unlike a storage: no other node has to reach it.
    records = {directory.rstrip("/"): read_run(split_uri(f"{directory}/run.json")[0]) for directory in directories}
    of_paper = [name for name, record in records.items() if record.experiment.paper]
    if not of_paper:
        raise DataError(
            f"{', '.join(records)}: none of these runs is of a table of the paper (their experiments have no `paper`)"
        )
    command = f"{PurePosixPath(program()).name} reproduction {' '.join(directories)} --out {out}"
    storage, name = split_uri(out)
    storage.write_bytes(name, reproduction.page(records, command).encode())
    say(f"{len(of_paper)} run{'s' if len(of_paper) > 1 else ''}: {out}")
