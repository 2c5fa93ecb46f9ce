"""The Hugging Face Hub: data sets and files named ``hf:ORG/NAME[@REVISION][/PATH]``.

The package huggingface_hub downloads them into the Hub's own cache, which it shares with every
other program of the user. Without a connection they are read from there. A token is the package's
business: it takes it from its login or from HF_TOKEN, and no record sees it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from components.errors import ConfigError, DataError, first_line

PREFIX = "hf:"
USUAL_WEIGHTS = "model.safetensors"
_ADDRESS = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:convert/[\w.-]+|pr/\d+)|[^/@]+))?"  # A branch with a slash is not accepted.
    r"(?:/(?P<path>[^/].*?))?/?"
)
_TRAINING = ("train[-./]*", "*/train[-./]*")
"""Files of the training split, which an evaluation does not download."""
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True)
class HubAddress:
    """A repository of the Hub at a revision, and a path in it."""

    repo: str
    revision: str
    """Branch, tag or commit. Empty: the default branch."""
    path: str
    """Folder or file in the repository. Empty: its top."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}{revision}" + (f"/{self.path}" if self.path else "")


def parse(text: str, setting: str) -> HubAddress:
    """Return the parts of ``hf:ORG/NAME[@REVISION][/PATH]``.

    Args:
        setting: the field that holds the text, for the message.

    Raises:
        ConfigError: the text has another form.
    """
    match = _ADDRESS.fullmatch(text.removeprefix(PREFIX))
    if match is None or ".." in text.split("/"):
        raise ConfigError.of(setting, text, "hf:ORG/NAME, hf:ORG/NAME@REVISION, or one of these with /PATH behind it")
    return HubAddress(match["repo"], match["revision"] or "", match["path"] or "")


@dataclass(frozen=True)
class Snapshot:
    """A data set's Parquet files on this machine."""

    directory: str
    address: HubAddress
    """The same data set at the commit that the revision stands for."""


@functools.lru_cache(maxsize=32)
def snapshot(text: str, *, without_training: bool = False) -> Snapshot:
    """Download the Parquet files of ``hf:ORG/NAME[@REVISION][/CONFIG]`` that the cache lacks.

    A process takes the same commit of a revision every time, also if the branch moves.

    Args:
        without_training: leave out the files of the training split.

    Raises:
        ConfigError: the text has another form, or huggingface_hub is not installed.
        DataError: the data set is absent, private, not in the cache while the Hub cannot be
            reached, or it has no Parquet file.
    """
    address = parse(text, "data.source")
    below = f"{address.path}/" if address.path else ""
    with _errors(text, address, "data set", "data.source"):
        from huggingface_hub import snapshot_download

        top = Path(
            snapshot_download(
                address.repo,
                repo_type="dataset",
                revision=_commits.get((address.repo, address.revision), address.revision or None),
                allow_patterns=[f"{below}*.parquet"],
                ignore_patterns=[below + pattern for pattern in _TRAINING] if without_training else None,
            )
        )
    commit = _commits.setdefault((address.repo, address.revision), top.name)
    if next((top / address.path).rglob("*.parquet"), None) is None:
        convert = "" if address.revision else f", or take the Hub's own conversion: {text}@refs/convert/parquet"
        raise DataError(
            f"{text} has no .parquet file at commit {commit}; give a data set (or, behind a /, a configuration) that "
            f"has some{'' if address.path else convert}"
        )
    return Snapshot(str(top / address.path), dataclasses.replace(address, revision=commit))


_commits: dict[tuple[str, str], str] = {}
"""Commit that each repository's revision stands for in this process."""


def resolved(source: str) -> str:
    """Return ``data.source`` with the commit that this process reads, or "" for other sources."""
    if not source.startswith(PREFIX):
        return ""
    address = parse(source, "data.source")
    return str(dataclasses.replace(address, revision=_commits.get((address.repo, address.revision), address.revision)))


def download(text: str, setting: str) -> tuple[HubAddress, bytes]:
    """Return a file of a model's repository, and its address at the commit that it was read at.

    Args:
        text: ``hf:ORG/NAME[@REVISION][/FILE]``. Without FILE it is the Hub's usual one.
        setting: the field that holds the text, for messages.

    Raises:
        ConfigError: the text has another form, or huggingface_hub is not installed.
        DataError: the file is absent, private, or not in the cache while the Hub cannot be reached.
    """
    address = parse(text, setting)
    address = dataclasses.replace(address, path=address.path or USUAL_WEIGHTS)
    with _errors(text, address, "model", setting):
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(address.repo, address.path, revision=address.revision or None))
        # The cache's folder of a snapshot has the name of its commit.
        commit = file.parents[address.path.count("/")].name
        return dataclasses.replace(address, revision=commit), file.read_bytes()


@contextlib.contextmanager
def _errors(text: str, address: HubAddress, kind: str, setting: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into one that says what to do."""
    try:
        from huggingface_hub import constants, errors
    except ImportError as e:
        raise ConfigError(
            f"{setting} is {text!r}; the Hugging Face Hub needs a package of its own ({e}): pip install 'defendpp[hub]'"
        ) from None
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{address.repo}"
    try:
        yield
    except errors.HFValidationError as e:
        raise ConfigError.of(setting, text, f"hf:ORG/NAME with a name that the Hub allows ({first_line(e)})") from e
    except errors.GatedRepoError as e:
        raise DataError(f"{text}: its owner grants access on request: ask for it at {page}, then {_LOG_IN}") from e
    except errors.RepositoryNotFoundError as e:
        raise DataError(
            f"{text}: there is no {kind} {page}, or it is private: check the name; for a private one {_LOG_IN}"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise DataError(
            f"{text}: {page} has no revision {address.revision!r}; give a branch, a tag or a commit of it"
        ) from e
    except errors.LocalEntryNotFoundError as e:
        cause = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the Hub cannot be reached"
        raise DataError(
            f"{text} is not in the cache {constants.HF_HUB_CACHE}, and {cause}: connect this machine, or fill the "
            f"cache where there is a connection: hf download {address.repo}"
            f"{' --repo-type dataset' if kind == 'data set' else ''}"
        ) from e
    except errors.EntryNotFoundError as e:
        raise DataError(f"{text}: {page} has no file {address.path!r} at this revision; check its name there") from e
    except Exception as e:  # Errors of the disk, and of the HTTP library, which depends on the version.
        raise DataError(
            f"{text} cannot be read from {page} ({type(e).__name__}: {first_line(e)}); check the connection and the "
            "cache"
        ) from e
