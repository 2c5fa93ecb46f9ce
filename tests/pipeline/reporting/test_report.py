"""The report says what the records say, no more and no less."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fake_run
import pytest
from rich.console import Console

from components.errors import DataError, UserError
from components.evaluation.statistics import mcnemar
from components.fields import to_dict
from pipeline.records import RunRecord
from pipeline.reporting import headline, labels, markdown, records, report, sentences, terminal
from pipeline.runtime import provenance
from pipeline.runtime.storage import Storage


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Storage, dict[str, str]]:
    root = Storage(tmp_path_factory.mktemp("storage"))
    run = fake_run.write(root)
    return run, root, report.build(run, root)


class _Tables(html.parser.HTMLParser):
    """The rows of every table with an id, cell texts joined by spaces; and every address that the page names."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self._rows: list[list[str]] | None = None
        self._cell: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [found[k] or "" for k in ("src", "href", "xlink:href") if k in found]
        if tag == "table" and found.get("id"):
            self._rows = self.tables.setdefault(found["id"] or "", [])
        if self._rows is not None and tag == "tr":
            self._rows.append([])
        if self._rows is not None and tag in ("td", "th"):
            self._cell = []

    def handle_data(self, data: str) -> None:
        if self._cell is not None and data.strip():
            self._cell.append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._rows and self._cell is not None:
            self._rows[-1].append(" ".join(self._cell))
            self._cell = None
        if tag == "table":
            self._rows = None


def test_a_table_taken_out_of_its_run_says_what_it_was_made_with(
    built: tuple[Storage, Storage, dict[str, str]],
) -> None:
    run, _, paths = built
    record, text = records.read_run(run), run.read_bytes(paths["table_md"]).decode()
    for part in (
        record.command,
        record.git["revision"],
        str(record.source),
        "Example CPU @ 2.60GHz, 2 CPUs, no GPU",
        "ray 2.60.0",
        "train 412",
    ):
        assert part in text
    assert f"<dt>Source</dt><dd>{markdown.source(record)}</dd>" in _page(run)[0]
    models = text[text.index("### Models") :]
    for name, model in record.models.items():
        error = model.reconstruction_validation
        (line,) = [x for x in models.splitlines() if x.startswith(f"| {name} |")]
        assert f"{100 * (model.clean_validation or 0):.1f} | {'–' if error is None else format(error, '.3g')} |" in line


@pytest.mark.parametrize(
    ("git", "source", "said"),
    [
        ({"revision": "e44c8eb", "dirty": False}, "5ac5be3c", "e44c8eb, source hash 5ac5be3c"),
        ({"revision": "e44c8eb", "dirty": True}, "5ac5be3c", "e44c8eb with uncommitted changes, source hash 5ac5be3c"),
        ({"revision": None, "dirty": None}, "5ac5be3c", "source hash 5ac5be3c"),  # a Ray job's copy
        ({"revision": "e44c8eb", "dirty": False}, None, "e44c8eb"),  # a record of an earlier version
        ({}, None, ""),
    ],
)
def test_code_is_named_by_its_revision_its_hash_or_both(git: dict[str, Any], source: str | None, said: str) -> None:
    record = {"name": "x", "experiment": to_dict(fake_run.experiment()), "git": git, "source": source}
    assert markdown.source(RunRecord.from_json(record)) == said


def _page(run: Storage) -> tuple[str, _Tables]:
    text = run.read_bytes("report/report.html").decode()
    parsed = _Tables()
    parsed.feed(text)
    return text, parsed


def _text(run: Storage, width: int) -> str:
    out = io.StringIO()
    terminal.print_table(run, console=Console(file=out, width=width))
    return out.getvalue()


def test_every_value_of_the_html_table_is_the_record(built: tuple[Storage, Storage, dict[str, str]]) -> None:
    run, _, _ = built
    record = run.read_json("run.json")
    _, page = _page(run)
    groups, heads, *rows = page.tables["results-table"]
    assert groups == ["model", "clean", "random (control)", "white-box", "transfer"]
    assert [h.split()[0] for h in heads] == ["no", "random", "FGSM", "BIM", "DDN", "FGSM", "BIM", "DDN"]
    order = [
        ("clean", "none"),
        ("random", "noise"),
        *((t, a) for t in ("white_box", "transfer") for a in ("fgsm", "bim", "ddn")),
    ]
    assert [row[0].split()[0] for row in rows] == list(fake_run.MODELS)
    seen = 0
    for row in rows:
        for (threat, attack), cell in zip(order, row[1:], strict=True):
            key = (row[0].split()[0], threat, attack)
            found = [
                e["metrics"]
                for e in record["evaluations"]
                if (e["model"], e["threat_model"], e["attack"].partition(":")[0]) == key
            ]
            if not found:
                assert cell == "source"
                continue
            m = found[0]
            numbers = [float(x) for x in re.findall(r"\d+\.\d+", cell)]
            assert numbers[:3] == [round(100 * m[k], 1) for k in ("accuracy", "accuracy_low", "accuracy_high")], key
            if attack == "ddn":
                broken = round(m["success_rate"] * round(m["clean_accuracy"] * fake_run.N))
                if broken >= 10:
                    assert cell.endswith(f" L2 {m['l2_median']:.2f} of {broken}"), key
                else:
                    assert cell.endswith(f" {broken or 'none'} broken"), key
            seen += 1
    assert seen == len(record["evaluations"])


def test_table_files_hold_the_records(built: tuple[Storage, Storage, dict[str, str]]) -> None:
    run, _, paths = built
    record = run.read_json("run.json")
    rows = list(csv.DictReader(io.StringIO(run.read_bytes(paths["table_csv"]).decode())))
    table = run.read_json(paths["table_json"])
    assert len(rows) == len(record["evaluations"]) == sum(len(r["cells"]) for r in table["rows"])
    for row, e in zip(rows, record["evaluations"], strict=True):
        assert (row["model"], row["threat_model"], row["attack"]) == (e["model"], e["threat_model"], e["attack"])
        assert float(row["accuracy"]) == e["metrics"]["accuracy"]
        key = next(
            c["key"] for c in table["columns"] if (c["threat_model"], c["attack"]) == (e["threat_model"], e["attack"])
        )
        cell = next(r for r in table["rows"] if r["model"] == e["model"])["cells"][key]
        assert cell["accuracy_low"] == e["metrics"]["accuracy_low"]
        assert cell["source"] == e["source"]
    assert {r["model"]: r["role"] for r in table["rows"]} == {
        "no_defense": "source",
        "control": "control",
        "defend": "defended",
    }


def test_comparison_is_paired_by_sample(built: tuple[Storage, Storage, dict[str, str]]) -> None:
    run, root, paths = built
    found = run.read_json(paths["table_json"])["comparisons"]
    assert [(c["defended"], c["control"], c["attack"].partition(":")[0]) for c in found] == [
        ("defend", "control", a) for a in ("fgsm", "bim", "ddn")
    ]
    for c in found:
        short = c["attack"].partition(":")[0]
        right = {}
        for model in ("defend", "control"):
            columns = records.read_judged(root, f"judged/{model}-transfer-{short}")
            right[model] = columns["adversarial_prediction"] == columns["label"]
        assert c["only_defended"] == int((right["defend"] & ~right["control"]).sum())
        assert c["only_control"] == int((right["control"] & ~right["defend"]).sum())
        assert c["p"] == mcnemar(right["defend"], right["control"])
    _, page = _page(run)
    assert [row[7] for row in page.tables["comparisons-table"][1:]] == ["300"] * 3


def test_html_needs_nothing_from_outside(built: tuple[Storage, Storage, dict[str, str]]) -> None:
    run, _, paths = built
    text, page = _page(run)
    images = [a for a in page.addresses if a.startswith("data:image/png;base64,")]
    anchors = {a for a in page.addresses if a.startswith("#")}
    files = set(page.addresses) - set(images) - anchors
    assert images
    assert files == {"table.csv", "table.md", "table.json", "history.csv", "../run.json", "plots/"}
    assert all((run.local_root / "report" / file).exists() for file in files)
    assert not re.search(r"@import|url\((?!#)|<script|<link|<img", text)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "of two elements with one id, a link finds the first"
    assert {a.removeprefix("#") for a in anchors} <= set(ids)
    assert text.count('<svg class="plot"') == len([k for k in paths if k.startswith("plot_")])
    assert "This report is partial" not in text
    for sentence in sentences.explanation(records.read_run(run)):
        assert sentence in text


def test_without_a_control_it_says_so_and_what_to_add(built: tuple[Storage, Storage, dict[str, str]]) -> None:
    record = built[0].read_json("run.json")

    def explanation() -> list[str]:
        return sentences.explanation(RunRecord.from_json(record))

    *_, with_control = explanation()
    assert with_control.startswith("Control: an undefended model")
    models = [m for m in record["experiment"]["models"] if not m.startswith("control")]
    record["experiment"]["models"] = models
    record["evaluations"] = [e for e in record["evaluations"] if e["model"] != "control"]
    *_, without = explanation()
    assert without.startswith("There is no control for defend:")
    assert '"control:defense=none,seed=1"' in without
    # a control of another architecture is judged on other examples
    record["experiment"]["models"] = [*models, "small:defense=none,arch=vgg16,seed=1"]
    assert explanation()[-1] == without
    # nothing is transferred, so nothing has to be controlled
    record["experiment"]["models"] = models
    record["evaluations"] = [e for e in record["evaluations"] if e["threat_model"] != "transfer"]
    assert "There is no control" not in "".join(explanation())


@pytest.mark.slow
def test_building_again_gives_the_same_bytes(built: tuple[Storage, Storage, dict[str, str]], tmp_path: Path) -> None:
    run, root, paths = built
    shutil.copytree(root.local_root, tmp_path / "copy")
    other_root = Storage(tmp_path / "copy")
    other = other_root / run.uri.removeprefix(root.uri + "/")
    shutil.rmtree(other.local_root / "report")
    assert report.build(other, other_root) == paths
    for name in paths.values():
        assert other.read_bytes(name) == run.read_bytes(name), name


def test_user_text_is_escaped(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    run = fake_run.write(root, gallery=False)
    record = run.read_json("run.json")
    record["command"] = "<script>alert(1)</script>"
    run.write_json("run.json", record)
    report.build(run, root)
    text = run.read_bytes("report/report.html").decode()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_terminal_table_fits_and_names_the_threat_model(
    built: tuple[Storage, Storage, dict[str, str]], width: int
) -> None:
    run, _, _ = built
    text = _text(run, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    heads = re.split(r"─{10,}", text)
    attacks = sum(part.count("FGSM") + part.count("BIM") + part.count("DDN") for part in heads)
    threats = len(re.findall(r"white-box(?!:)|transfer(?!:)", text.partition("Accuracy in %")[0]))
    assert attacks == threats == 6
    assert "n = 300 test images" in text.replace("\n", " ")
    fgsm = next(
        e["metrics"]
        for e in run.read_json("run.json")["evaluations"]
        if (e["model"], e["threat_model"], e["attack"]) == ("defend", "transfer", "fgsm:eps=0.2")
    )
    # both ends: the interval is not symmetric
    assert f"{100 * fgsm['accuracy']:.1f}" in text
    assert f"{100 * fgsm['accuracy_low']:.1f}–{100 * fgsm['accuracy_high']:.1f}" in text
    verdict = headline.verdict(RunRecord.from_json(run.read_json("run.json"))).headline
    assert " ".join(text.split()).endswith(f" {verdict}.")


def test_partial_runs_give_a_partial_report(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    run = fake_run.write(root, evaluations=False, gallery=False, finished=False)
    paths = report.build(run, root)
    text, page = _page(run)
    assert "This report is partial" in text
    for word in ("no evaluations yet", "no gallery of images yet", "the run has not finished"):
        assert word in text
    assert "results-table" not in page.tables
    assert {k for k in paths if k.startswith("plot_")} == {"plot_losses", "plot_validation"}
    assert "no evaluations yet" in _text(run, 100)

    record = run.read_json("run.json")
    record["models"] = {}
    run.write_json("run.json", record)
    report.build(run, root)
    assert "not trained yet: no_defense, control, defend" in _page(run)[0]


@pytest.mark.parametrize("file", ["run.json", "sweep.json"])
@pytest.mark.parametrize("text", ["null", "[]", "1", "{}", '{"schema": 99}'])
def test_a_record_of_another_kind_is_refused(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=f"{file} has schema (None|99); this version reads schema 1"):
        records.read_record(Storage(tmp_path), file)


@pytest.mark.slow
def test_missing_and_corrupt_records_are_named(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    with pytest.raises(UserError, match=r"runs/none is not the directory of a run"):
        report.build(root / "runs/none", root)
    run = fake_run.write(root)

    def refused(name: str, data: bytes | None, match: str) -> None:
        kept = root.read_bytes(name)
        if data is None:
            root.delete(name)
        else:
            root.write_bytes(name, data)
        with pytest.raises(UserError, match=match):
            report.build(run, root)
        root.write_bytes(name, kept)

    here = run.uri.removeprefix(root.uri + "/")
    refused(f"{here}/run.json", b"{", "run.json is not valid JSON")
    refused(f"{here}/run.json", b'{"schema": 99}', "schema 99")
    refused(f"{here}/gallery.npz", b"PK no zip", "gallery.npz is corrupt")
    refused(
        "models/defend-fedcba9876543210/history/epoch-00001.json",
        b"[]",
        "epoch-00001.json is not the record of an epoch",
    )
    refused("judged/defend-transfer-fgsm/chunk-00001.parquet", b"PAR1", "fgsm/chunk-00001.parquet is corrupt")
    refused("judged/defend-transfer-fgsm/chunk-00001.parquet", None, "chunk-00001.parquet")
    refused("judged/defend-transfer-fgsm/chunk-00002.parquet", None, "not of the same samples")
    report.build(run, root)  # and all of that was put right again


def test_attacks_of_one_name_are_told_apart(tmp_path: Path) -> None:
    attacks = ("bim:eps=0.1,steps=40", "bim:eps=0.2,steps=40", "fgsm:eps=0.2", "bim:eps=0.2,norm=l2,steps=40")
    assert labels.attack_labels(attacks) == {
        "none": "none",
        "bim:eps=0.1,steps=40": "bim_eps0.1",
        "bim:eps=0.2,steps=40": "bim_eps0.2",
        "fgsm:eps=0.2": "fgsm",
        "bim:eps=0.2,norm=l2,steps=40": "bim-l2",
    }
    assert labels.attack_title("cw:steps=20") == ("C&W", "any L2 norm, 20 steps")
    assert labels.attack_title("bim:eps=0.03137254901960784,steps=40") == ("BIM", "eps 8/255, 40 steps")


def test_environment_of_a_checkout_and_of_none(tmp_path: Path) -> None:
    found = provenance.environment()
    json.dumps(found)
    assert found["versions"]["torch"]
    assert found["hardware"]["cpus"] >= 1
    assert provenance.git(tmp_path) == {"revision": None, "dirty": None}
    # a directory inside a checkout is not that checkout
    assert provenance.git(provenance.ROOT / "pipeline") == {"revision": None, "dirty": None}
    # The Python API runs in a script of the user's own.
    command = provenance.command(["study.py", "--tracking-uri", "https://me:secret@host/x", "a b"])
    assert command == "python study.py --tracking-uri 'https://***@host/x' 'a b'"


def test_environment_without_a_checkout_takes_the_revision_that_it_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    revision = "e44c8eb0c2a44d3f8f0c4f8e5b1a0d2c3e4f5a6b"
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.delenv("DEFENDPP_REVISION", raising=False)
    assert provenance.environment()["git"] == {"revision": None, "dirty": None}
    monkeypatch.setenv("DEFENDPP_REVISION", revision)
    assert provenance.environment()["git"] == {"revision": revision, "dirty": None}
    monkeypatch.setenv("DEFENDPP_REVISION", f"{revision}-dirty")  # as `git describe --dirty` writes it
    assert provenance.environment()["git"] == {"revision": revision, "dirty": True}
    # The source of an image has the file beside it, and the file wins.
    (tmp_path / "REVISION").write_text("\n")
    assert provenance.environment()["git"]["revision"] == revision
    (tmp_path / "REVISION").write_text(f"{revision[::-1]}-dirty\n")
    assert provenance.environment()["git"] == {"revision": revision[::-1], "dirty": True}
    monkeypatch.undo()
    monkeypatch.setenv("DEFENDPP_REVISION", revision)  # a checkout knows better
    assert provenance.environment()["git"] == provenance.git(provenance.ROOT)


def test_source_hash_is_that_of_a_copy_and_changes_with_every_byte_and_name(tmp_path: Path) -> None:
    expected = provenance.environment()["source"]
    assert re.fullmatch(r"[0-9a-f]{16}", expected)
    for name in ("components", "pipeline", "tune_spaces"):
        shutil.copytree(provenance.ROOT / name, tmp_path / name)
    assert provenance.source_hash(tmp_path) == expected
    (tmp_path / "pipeline" / "__pycache__").mkdir(exist_ok=True)
    (tmp_path / "pipeline" / "__pycache__" / "x.pyc").write_bytes(b"x")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "x.py").write_text("x")
    assert provenance.source_hash(tmp_path) == expected
    for name in ("components/dct.py", "pipeline/reporting/html/run.html.j2", "tune_spaces/ablation.py"):
        file = tmp_path / name
        source = file.read_bytes()
        file.write_bytes(source + b"\n")
        assert provenance.source_hash(tmp_path) != expected
        file.write_bytes(source)
    assert provenance.source_hash(tmp_path) == expected
    (tmp_path / "components" / "dct.py").rename(tmp_path / "components" / "dct2.py")
    assert provenance.source_hash(tmp_path) != expected


def test_environment_sees_uncommitted_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
            check=True,
            capture_output=True,
        )

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    clean = provenance.git(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", clean["revision"])
    assert clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert provenance.git(tmp_path) == {**clean, "dirty": True}
