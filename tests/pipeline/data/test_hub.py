"""The Hugging Face Hub, as its own library reads it: from the cache without a connection, and from a server."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from components.config import DataConfig
from components.errors import ConfigError
from pipeline.data import hub
from pipeline.data.sources.open import open_source

pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")

SAMPLE = ROOT / "pipeline" / "data" / "mnist-sample"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPEN = """
import json, sys
from components.config import DataConfig
from components.errors import UserError
from pipeline.data import hub
from pipeline.data.sources.open import check_source, open_source
answers = []
for source in sys.argv[1:]:
    try:
        data = DataConfig(source=source)
        check_source(data)
        test = open_source(data, "test")
        answers.append([open_source(data, "train").fingerprint, test.fingerprint, test.describe()["resolved"], hub.resolved(source)])
    except UserError as e:
        answers.append(f"{type(e).__name__}: {e}")
print(json.dumps(answers))
"""


def opened(*sources: str, **environment: str) -> list[Any]:
    """Check and open sources in a process of its own, since the library reads its settings when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *sources],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=-1,
        text=True,
        check=True,
    )
    answers: list[Any] = json.loads(done.stdout)
    return answers


def cache(home: Path, repo: str, below: str = "", revision: str = "main") -> None:
    """Write the sample into a cache as the library itself lays it out."""
    folder = home / "hub" / f"datasets--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT / below
    for directory in (snapshot, folder / "blobs", (folder / "refs" / revision).parent):
        directory.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(COMMIT)
    for file in SAMPLE.glob("*.parquet"):
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


@pytest.mark.slow
def test_the_cache_is_read_without_a_connection(tmp_path: Path) -> None:
    cache(tmp_path, "someone/digits", "data")
    cache(tmp_path, "someone/converted", "mnist", "refs/convert/parquet")
    cache(tmp_path, "someone/many", "big")
    cache(tmp_path, "someone/many", "small")
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_secret"}
    whole, pinned, converted, small, many, absent, branch = opened(
        "hf:someone/digits",
        f"hf:someone/digits@{COMMIT}/data",
        "hf:someone/converted@refs/convert/parquet/mnist",
        "hf:someone/many/small",
        "hf:someone/many",
        "hf:someone/absent",
        "hf:someone/digits@v2",
        **offline,
    )
    sample = DataConfig(source="sample:mnist")
    prints = [open_source(sample, "train").fingerprint, open_source(sample, "test").fingerprint]
    address = f"hf:someone/digits@{COMMIT}"
    assert whole == [*prints, address, address]  # The same images have the same shards, wherever they come from.
    assert pinned == [*prints, f"{address}/data", f"{address}/data"]
    assert converted[:2] == prints
    assert small[:2] == prints
    assert many.endswith("Give the one that you mean as --data.source, for example hf:someone/many/big")
    for answer, name in ((absent, "hf:someone/absent"), (branch, "hf:someone/digits@v2")):
        assert f"DataError: {name} is not in the cache {tmp_path}/hub, and HF_HUB_OFFLINE is set" in answer
        assert answer.endswith("--repo-type dataset")
        assert "secret" not in answer


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Answer as the Hub does for a data set, a gated and a private neighbour, and one whose downloads break off.

    Gives the address, and the files of the first one that were asked for.
    """
    files = {f"data/{file.name}": file.read_bytes() for file in SAMPLE.glob("*.parquet")}
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            repo = next((r for r in ("someone/digits", "someone/broken") if f"/datasets/{r}/" in path), "")
            if repo and "/revision/" in path:
                if not path.endswith(("/main", COMMIT)):
                    return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                return self.answer(200, {}, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
            if repo and "/tree/" in path:
                tree = [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()
                ]
                return self.answer(200, {}, json.dumps(tree).encode())
            if (name := path.partition(f"/datasets/{repo}/resolve/{COMMIT}/")[2]) in files:
                content, digest = files[name], hashlib.sha256(files[name]).hexdigest()
                if self.command == "GET" and repo == "someone/broken":
                    content, self.close_connection = content[:100], True
                elif self.command == "GET":
                    asked.append(name)
                headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(files[name]))}
                return self.answer(200, headers, content)
            code = "GatedRepo" if "/gated/" in path else "RepoNotFound"
            return self.answer(403 if code == "GatedRepo" else 401, {"X-Error-Code": code})

        do_HEAD = do_GET

        def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


@pytest.mark.slow
def test_a_data_set_is_downloaded_once_and_refusals_are_explained(
    server: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, asked = server
    online = {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_secret",
    }
    whole, revision, private, gated, wrong, broken = opened(
        "hf:someone/digits",
        "hf:someone/digits@v2",
        "hf:someone/private",
        "hf:gated/digits",
        "hf:some--one/digits",
        "hf:someone/broken",
        **online,
    )
    sample = DataConfig(source="sample:mnist")
    assert whole[:2] == [open_source(sample, "train").fingerprint, open_source(sample, "test").fingerprint]
    assert sorted(asked) == sorted(f"data/{file.name}" for file in SAMPLE.glob("*.parquet"))
    assert revision == (
        f"DataError: hf:someone/digits@v2: {endpoint}/datasets/someone/digits has no revision 'v2'; "
        "give a branch, a tag or a commit of it"
    )
    assert f"there is no data set {endpoint}/datasets/someone/private, or it is private" in private
    assert f"its owner grants access on request: ask for it at {endpoint}/datasets/gated/digits" in gated
    assert "ConfigError: data.source is 'hf:some--one/digits'; it must be hf:ORG/NAME" in wrong
    assert f"hf:someone/broken cannot be read from {endpoint}/datasets/someone/broken (" in broken
    assert broken.endswith("); check the connection and the cache")
    assert "secret" not in " ".join([revision, private, gated, broken])


@pytest.mark.slow
def test_an_evaluation_downloads_no_training_images(server: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = server
    code = (
        "from components.config import DataConfig\nfrom pipeline.data.sources.open import check_source\n"
        "check_source(DataConfig(source='hf:someone/digits'), trains=False)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert asked == ["data/test-00000-of-00001.parquet"]


@pytest.mark.parametrize("text", ["hf:digits", "hf:", "hf:a/b@", "hf:a/b/../c", "hf:a/b c"])
def test_an_address_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="it must be hf:ORG/NAME"):
        hub.parse(text, "data.source")


def test_the_parts_of_an_address() -> None:
    assert hub.parse("hf:a/b.c", "x") == hub.HubAddress("a/b.c", "", "")
    assert hub.parse("hf:a/b@v1.0/x/y.pth", "x") == hub.HubAddress("a/b", "v1.0", "x/y.pth")
    assert hub.parse("hf:a/b@refs/convert/parquet", "x") == hub.HubAddress("a/b", "refs/convert/parquet", "")
    assert hub.parse("hf:a/b@refs/pr/3/data", "x") == hub.HubAddress("a/b", "refs/pr/3", "data")
    for text in ("hf:a/b", "hf:a/b@v1/x", "hf:a/b@refs/pr/3/data"):
        assert str(hub.parse(text, "x")) == text
