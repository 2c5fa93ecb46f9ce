"""Builds the docs site: every Markdown page of the repository, and a reference page per package.

    make docs        # build/site/index.html; any warning or broken link is an error

The pages keep their paths, so that a link works on the site and in the repository alike.
"""

import contextlib
import functools
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SUFFIXES = {".md", ".png", ".svg", ".csv", ".cff", ".css", ".ipynb"}


def main(root: Path) -> int:
    """Collect the pages of a repository, build its site, follow the links. Return an exit status."""
    pages = root / "build/pages"
    shutil.rmtree(root / "build", ignore_errors=True)
    for file in _repository_files(root):
        if Path(file).suffix in SUFFIXES and not file.startswith(("tests/", ".")):
            (pages / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, pages / file)
    _write_reference(root, pages / "docs/api")
    zensical = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    build = subprocess.run(zensical, cwd=root, capture_output=True, text=True, check=False)
    # Zensical's report of an issue comes before its own traceback, which says nothing.
    print((build.stdout + build.stderr).partition("Traceback")[0])
    # A docstring that griffe cannot read is no issue of Zensical's, so it does not abort the build.
    if build.returncode or "griffe:" in build.stdout + build.stderr:
        return 1
    status = _follow_links(root / "build/site")
    print("docs site: build/site/index.html; its search needs a server: python -m http.server --directory build/site")
    return status


def _follow_links(site: Path) -> int:
    """Follow every link of a site, those to pictures and files too. Return LinkChecker's status."""
    # LinkChecker gives up root's rights, so it may not be able to read the files themselves.
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        linkchecker = Path(sys.executable).with_name("linkchecker")
        address = f"http://127.0.0.1:{server.server_port}/index.html"
        status = subprocess.run([linkchecker, "--no-status", "--no-warnings", address], check=False).returncode
        server.shutdown()
    return status


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Handler that logs no requests."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send a file, of which the checker of links reads no more than it needs."""
        with contextlib.suppress(ConnectionError):
            super().copyfile(source, outputfile)


def _repository_files(root: Path) -> list[str]:
    """List the files of the repository: tracked, and new ones that are not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\n")
    return [file for file in files if (root / file).is_file()]


def _write_reference(root: Path, directory: Path) -> None:
    """Write a page for each package of ``components/`` and ``pipeline/``, and their contents."""
    directory.mkdir(parents=True)
    lines = ["# API reference\n", "Which functions and classes are there, with shapes, ranges and errors?\n"]
    for top in ("pipeline", "components"):
        lines.append(f"\n**{top}**\n\n")
        for path in sorted((root / top).iterdir()):
            if (path / "__init__.py").exists() or (path.suffix == ".py" and not path.stem.startswith("__")):
                name = f"{top}.{path.stem}"
                (directory / f"{name}.md").write_text(f"::: {name}\n")
                lines.append(f"- [`{name}`]({name}.md): {_summary(path)}\n")
    (directory / "README.md").write_text("".join(lines))


def _summary(path: Path) -> str:
    """Return the first line of the docstring of a module or package."""
    module = path / "__init__.py" if path.is_dir() else path
    return module.read_text().split('"""')[1].split("\n")[0]


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
