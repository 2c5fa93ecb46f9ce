"""The docs site, built as its users build it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

pytestmark = pytest.mark.slow


def test_make_docs_builds_every_page_and_a_reference_without_a_broken_link():
    built = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    site = ROOT / "build/site"
    pages = {page.relative_to(ROOT) for page in [*ROOT.glob("docs/*.md"), *ROOT.glob("results/*/*.md")]}
    missing = {page for page in pages if not (site / page).with_suffix(".html").exists()}
    assert not missing
    reference = (site / "docs/api/components.attacks.html").read_text()
    assert 'id="components.attacks.apgd.apgd"' in reference
    assert "McNemar" in (site / "search.json").read_text()
    assert not [page for page in site.rglob("*.html") if ":func:`" in page.read_text()]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[a](nowhere.md)", "page does not exist"),
        ("[a](README.md#nowhere)", "anchor does not exist"),
        ("![a](nowhere.png)", "nowhere.png"),
        ("[a](infra/nowhere.sh)", "nowhere.sh"),
    ],
)
def test_a_broken_link_is_an_error(tmp_path, text, named):
    root = tmp_path / "repository"
    (root / "docs").mkdir(parents=True)
    (root / "components").mkdir()
    (root / "pipeline").mkdir()
    for file in ("docs/build_site.py", "docs/griffe_roles.py"):
        shutil.copy(ROOT / file, root / file)
    (root / "zensical.toml").write_text(
        '[project]\nsite_name = "small"\ndocs_dir = "build/pages"\nsite_dir = "build/site"\nuse_directory_urls = false\n'
    )
    (root / "README.md").write_text(f"# Small\n\n{text}\n")
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    built = subprocess.run(
        [sys.executable, root / "docs/build_site.py"], cwd=root, capture_output=True, text=True, check=False
    )
    assert built.returncode == 1
    assert named in built.stdout
    assert not list(Path(root).glob("build/site/nowhere*"))
