"""The paper's numbers: every cell is there, and they agree and disagree with one another as they do in print."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from components.config import PRINTED_IN
from components.errors import ConfigError, DataError
from pipeline.reporting import paper
from pipeline.reporting.paper import Printed

FIVE = ("fgsm", "bim", "cw", "ddn", "clean")
ABLATION = (
    *("shared1", "shared2", "shared3", "shared4", "without_lowpass", "linear", "defend"),
    *("hourglass", "hourglass_concat", "hourglass_add"),
)
TABLES = {  # dataset, networks, rows
    "table1": ("mnist", ("resnet18",), ABLATION),
    "table2": (
        "mnist",
        ("resnet18",),
        ("no_defense", "adv_fgsm", "adv_ddn", "comdefend", "comdefend_wb", "defend", "defend_gn"),
    ),
    "table3": ("cifar10", ("resnet18",), ("no_defense", "adv_fgsm", "adv_ddn", "comdefend", "defend", "defend_gn")),
    "table4": ("imagenet", ("resnet18",), ("no_defense", "adv_fgsm", "defend")),
    "table5": ("mnist", ("vgg16", "resnet50"), ("no_defense", "defend")),
    "table6": ("cifar10", ("vgg16", "resnet50"), ("no_defense", "defend")),
}
TRANSFER = [  # classifier, made on
    *(("vgg16", "vgg16"), ("vgg16", "resnet18"), ("resnet50", "resnet50")),
    *(("resnet50", "resnet18"), ("resnet18", "resnet18"), ("resnet18", "vgg16")),
]
CELLS = {
    "table1": 50,
    "table2": 35,
    "table3": 30,
    "table4": 15,
    "table5": 20,
    "table6": 20,
    "table7": 12,
    "table8": 12,
    "sec4.2": 27,
    "sec4.3": 8,
    "sec4.5": 10,
}


def lookup(where: str, row: str, column: str, made_on: str = "", arch: str = "", dataset: str = "") -> Printed | None:
    """Return the number at one place; None if there is none. An empty arch or dataset matches any."""
    matches = [
        p
        for p in paper.printed_values(where)
        if (p.row, p.column, p.made_on) == (row, column, made_on)
        and arch in ("", p.arch)
        and dataset in ("", p.dataset)
    ]
    assert len(matches) < 2, matches
    return matches[0] if matches else None


def number(where: str, row: str, column: str, made_on: str = "", arch: str = "", dataset: str = "") -> Decimal:
    """Return the printed number, exact, so that differences can be compared with those of the paper."""
    found = lookup(where, row, column, made_on, arch, dataset)
    assert found is not None, (where, row, column, made_on, arch)
    return Decimal(found.text)


def row(where: str, slug: str, arch: str = "") -> list[Decimal]:
    return [number(where, slug, column, arch=arch) for column in FIVE]


def noted(where: str, slug: str, column: str, made_on: str = "", arch: str = "") -> str:
    found = lookup(where, slug, column, made_on, arch)
    assert found is not None
    assert found.note
    return found.note


# --- the file is whole


@pytest.mark.parametrize("where", TABLES)
def test_a_table_has_every_row_and_column(where: str) -> None:
    dataset, archs, rows = TABLES[where]
    expected = {(where, dataset, arch, "", slug, column) for arch in archs for slug in rows for column in FIVE}
    assert {p.key for p in paper.printed_values(where)} == expected


@pytest.mark.parametrize(("where", "dataset"), [("table7", "mnist"), ("table8", "cifar10")])
def test_a_transfer_table_has_every_pair(where: str, dataset: str) -> None:
    expected = {(where, dataset, *pair, slug, "fgsm") for pair in TRANSFER for slug in ("no_defense", "defend")}
    assert {p.key for p in paper.printed_values(where)} == expected


@pytest.mark.parametrize("where", PRINTED_IN)
def test_every_place_has_its_number_of_cells(where: str) -> None:
    assert len(paper.printed_values(where)) == CELLS[where]


def test_slugs_and_values() -> None:
    numbers = paper.load()
    assert len(numbers) == sum(CELLS.values()) == 239
    assert len({p.key for p in numbers}) == len(numbers)
    assert {p.row for p in numbers} == set(paper.ROWS)
    assert {p.column for p in numbers} == set(paper.COLUMNS)
    assert {p.where for p in numbers} == set(PRINTED_IN)
    for p in numbers:
        assert p.value == float(p.text)
        assert 0 <= p.value <= 100
        assert p.printed_row


def test_tables_print_two_decimals_but_for_one_cell() -> None:
    odd = [p.key for p in paper.load() if p.where.startswith("table") and len(p.text.partition(".")[2]) != 2]
    assert odd == [("table5", "mnist", "resnet50", "", "defend", "clean")]
    found = lookup("table5", "defend", "clean", arch="resnet50")
    assert found is not None
    assert (found.text, found.value) == ("99.6", 99.6)


def test_made_on_is_given_in_the_transfer_tables_and_in_sec_4_5() -> None:
    assert {p.where for p in paper.load() if p.made_on} == {"table7", "table8", "sec4.5"}


def test_a_table_names_a_row_as_the_paper_does() -> None:
    for p in paper.load():
        if p.where.startswith("table"):
            assert p.printed_row.partition(" (")[0] == paper.ROWS[p.row]


# --- where the paper agrees with itself


def test_ours_is_the_same_in_tables_1_and_2() -> None:
    assert row("table1", "defend") == row("table1", "shared4") == row("table2", "defend")


@pytest.mark.parametrize(
    ("where", "others", "default"), [("table7", "table5", "table2"), ("table8", "table6", "table3")]
)
def test_white_box_transfer_repeats_the_other_tables(where: str, others: str, default: str) -> None:
    for slug in ("no_defense", "defend"):
        for arch in ("vgg16", "resnet50"):
            assert number(where, slug, "fgsm", arch, arch) == number(others, slug, "fgsm", arch=arch)
        assert number(where, slug, "fgsm", "resnet18", "resnet18") == number(default, slug, "fgsm")


@pytest.mark.parametrize("where", ["table7", "table8"])
def test_attacks_of_another_network_are_easier_to_stand(where: str) -> None:
    for arch, made_on in TRANSFER:
        assert number(where, "defend", "fgsm", made_on, arch) > number(where, "no_defense", "fgsm", made_on, arch)
        if made_on != arch:
            for slug in ("no_defense", "defend"):
                assert number(where, slug, "fgsm", made_on, arch) > number(where, slug, "fgsm", arch, arch)


def repeated() -> Iterator[tuple[paper.Printed, str]]:
    """What the text says again, and the table it says it from."""
    for p in paper.printed_values("sec4.2"):
        if p.column != "pgd" and p.row not in ("adv_pgd", "defend_gn_gain"):
            yield p, "table1" if p.row in ABLATION and p.row != "defend" else "table2"
    for p in paper.printed_values("sec4.3"):
        yield p, "table3"
    for p in paper.printed_values("sec4.5"):
        if p.made_on:
            yield p, "table7" if p.dataset == "mnist" else "table8"
        elif p.row == "defend":
            yield p, "table6"


def test_the_text_repeats_the_tables() -> None:
    pairs = list(repeated())
    assert len(pairs) == 14 + 8 + 7
    for p, table in pairs:
        found = lookup(table, p.row, p.column, p.made_on, p.arch)
        assert found is not None
        assert found.text == p.text, p


def test_linear_targets_are_inferior_to_ours_everywhere() -> None:
    assert all(ours > linear for ours, linear in zip(row("table1", "defend"), row("table1", "linear"), strict=True))
    worse = [a < b for a, b in zip(row("table1", "linear"), row("table1", "without_lowpass"), strict=True)]
    assert worse == [True, True, False, True, True]


def test_white_box_comdefend_is_no_better_than_the_baseline() -> None:
    pairs = zip(row("table2", "comdefend_wb"), row("table2", "no_defense"), strict=True)
    assert all(comdefend <= baseline for comdefend, baseline in pairs)


def test_ours_beats_adv_fgsm_on_imagenet_on_all_but_fgsm() -> None:
    better = [a > b for a, b in zip(row("table4", "defend"), row("table4", "adv_fgsm"), strict=True)]
    assert better == [False, True, True, True, True]


def test_cited_comdefend_is_better_on_fgsm_alone() -> None:
    better = [
        number("sec4.5", "defend", c, arch="resnet50") > number("sec4.5", "comdefend", c) for c in ("fgsm", "bim", "cw")
    ]
    assert better == [False, True, True]


# --- where it does not: each of these has a note in the file


def test_cw_of_hourglass_sc_stands_alone() -> None:
    gaps = {slug: abs(number("table1", slug, "cw") - number("table1", slug, "ddn")) for slug in ABLATION}
    assert gaps.pop("hourglass_concat") == Decimal("9.10")
    assert max(gaps.values()) == Decimal("0.07")
    assert number("table1", "hourglass_concat", "cw") == 90
    assert "misprint" in noted("table1", "hourglass_concat", "cw")


def test_four_shared_blocks_are_not_best_on_cw_and_ddn() -> None:
    better = [a > b for a, b in zip(row("table1", "shared3"), row("table1", "shared4"), strict=True)]
    assert better == [False, False, True, True, False]
    assert noted("table1", "shared3", "cw")
    assert noted("table1", "shared3", "ddn")


def test_hourglass_is_not_below_ours_on_every_entry() -> None:
    above = [
        (slug, column)
        for slug in ("hourglass", "hourglass_concat", "hourglass_add")
        for column in FIVE
        if number("table1", slug, column) > number("table1", "defend", column)
    ]
    assert above == [("hourglass", "clean"), ("hourglass_add", "ddn")]
    assert all(noted("table1", *cell) for cell in above)


def test_gain_of_noise_is_right_on_fgsm_and_wrong_on_bim() -> None:
    gain = {c: number("table2", "defend_gn", c) - number("table2", "defend", c) for c in ("fgsm", "bim")}
    assert gain["fgsm"] == number("sec4.2", "defend_gn_gain", "fgsm") == Decimal("3.75")
    assert gain["bim"] == Decimal("1.07")
    assert number("sec4.2", "defend_gn_gain", "bim") == Decimal("1.13")
    assert "1.07" in noted("sec4.2", "defend_gn_gain", "bim")


def test_the_sentence_on_noise_lacks_the_clean_accuracy() -> None:
    given = [p.column for p in paper.printed_values("sec4.2") if p.row == "defend_gn"]
    assert given == ["fgsm", "bim", "cw", "ddn"]
    assert lookup("sec4.2", "defend_gn", "clean") is None
    assert "missing" in noted("sec4.2", "defend_gn", "ddn")


def test_noise_lowers_ddn_on_cifar10() -> None:
    better = [a > b for a, b in zip(row("table3", "defend_gn"), row("table3", "defend"), strict=True)]
    assert better == [True, True, True, False, False]
    assert "fall" in noted("table3", "defend_gn", "ddn")


def test_adv_pgd_is_better_than_ours_on_pgd() -> None:
    for column in FIVE:
        assert number("table2", "defend", column) > number("sec4.2", "adv_pgd", column)
    assert number("sec4.2", "defend", "pgd") < number("sec4.2", "adv_pgd", "pgd")
    assert "it is not" in noted("sec4.2", "adv_pgd", "pgd")


def test_pgd_is_similar_to_bim_but_for_adv_pgd() -> None:
    five = [p.row for p in paper.printed_values("sec4.2") if p.column == "pgd" and p.row != "adv_pgd"]
    assert five == ["no_defense", "adv_fgsm", "adv_ddn", "comdefend", "defend"]
    gaps = [number("table2", slug, "bim") - number("sec4.2", slug, "pgd") for slug in five]
    assert (min(gaps), max(gaps)) == (0, Decimal("4.87"))
    assert number("sec4.2", "adv_pgd", "bim") - number("sec4.2", "adv_pgd", "pgd") == Decimal("-12.2")
    assert noted("sec4.2", "adv_pgd", "bim")


@pytest.mark.parametrize("where", ["table5", "table6"])
@pytest.mark.parametrize("arch", ["vgg16", "resnet50"])
def test_ours_is_below_the_baseline_on_clean_with_other_networks(where: str, arch: str) -> None:
    better = [a > b for a, b in zip(row(where, "defend", arch), row(where, "no_defense", arch), strict=True)]
    assert better == [True, True, True, True, False]
    assert "baseline" in noted(where, "defend", "clean", arch=arch)


def test_resnet50_is_not_slightly_better_than_resnet18() -> None:
    mnist = [a - b for a, b in zip(row("table5", "defend", "resnet50"), row("table2", "defend"), strict=True)]
    assert [gain > 0 for gain in mnist] == [True, False, True, True, True]
    cifar10 = [a - b for a, b in zip(row("table6", "defend", "resnet50"), row("table3", "defend"), strict=True)]
    assert cifar10[:2] == [Decimal("14.55"), Decimal("32.00")]
    assert noted("table5", "defend", "bim", arch="resnet50")
    assert noted("table6", "defend", "fgsm", arch="resnet50")
    assert noted("table6", "defend", "bim", arch="resnet50")


def test_table_4_cannot_come_from_1000_images() -> None:
    odd = [p for p in paper.printed_values("table4") if Decimal(p.text) % Decimal("0.1")]
    assert len(odd) == 11
    assert all("multiple of 0.1" in p.note for p in odd)
    assert not any(Decimal(p.text) % Decimal("0.05") for p in paper.printed_values("table4"))


def test_accuracy_under_attack_above_clean_accuracy() -> None:
    above = [
        (p.where, p.row, p.arch, p.column)
        for where in TABLES
        for p in paper.printed_values(where)
        if p.column != "clean" and Decimal(p.text) > number(where, p.row, "clean", arch=p.arch)
    ]
    assert above == [
        ("table2", "adv_fgsm", "resnet18", "fgsm"),
        ("table4", "adv_fgsm", "resnet18", "fgsm"),
        ("table5", "defend", "vgg16", "cw"),
    ]
    assert all(noted(where, slug, column, arch=arch) for where, slug, arch, column in above)


def test_bim_is_not_the_strongest_attack_on_undefended_vgg16() -> None:
    assert number("table5", "no_defense", "bim", arch="vgg16") > number("table5", "no_defense", "cw", arch="vgg16") == 0
    assert number("table5", "no_defense", "ddn", arch="vgg16") == Decimal("17.68")
    assert noted("table5", "no_defense", "ddn", arch="vgg16")
    assert noted("table6", "no_defense", "bim", arch="vgg16")


def test_adv_ddn_is_also_better_than_ours_on_fgsm() -> None:
    for where in ("table2", "table3"):
        assert number(where, "adv_ddn", "fgsm") > number(where, "defend", "fgsm")
        assert "better too" in noted(where, "adv_ddn", "fgsm")


# --- reading a file


@pytest.mark.parametrize("where", ["table9", "", "sec4.4", "Table1"])
def test_unknown_place(where: str) -> None:
    with pytest.raises(ConfigError, match=r"where is .*table1"):
        paper.printed_values(where)


HEADER = ",".join(paper.FIELDS)
GOOD = "table2,mnist,resnet18,,defend,fgsm,86.81,ours,"


def test_a_good_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "paper.csv"
    path.write_text(f"{HEADER}\n{GOOD}\n", encoding="utf-8")
    (found,) = paper.load(path)
    assert found == lookup("table2", "defend", "fgsm")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "first line"),
        ("where,row\n", "first line"),
        (f"{HEADER}\n", "holds no number"),
        (f"{HEADER}\n{GOOD},more\n", "line 2: 10 cells"),
        (f"{HEADER}\n\n{GOOD}\n", "line 2: 0 cells"),
        (f"{HEADER}\n{GOOD}\n{GOOD}\n", "line 3: .* twice"),
        (f"{HEADER}\n{GOOD.replace('table2', 'table9')}\n", "line 2: where='table9'"),
        (f"{HEADER}\n{GOOD.replace('mnist', 'svhn')}\n", "dataset='svhn'"),
        (f"{HEADER}\n{GOOD.replace('resnet18', '')}\n", "arch=''"),
        (f"{HEADER}\n{GOOD.replace('resnet18,', 'resnet18,alexnet')}\n", "made_on='alexnet'"),
        (f"{HEADER}\n{GOOD.replace('defend', 'ours')}\n", "row='ours'"),
        (f"{HEADER}\n{GOOD.replace('fgsm', 'deepfool')}\n", "column='deepfool'"),
        (f"{HEADER}\n{GOOD.replace('86.81', '')}\n", "value=''"),
        (f"{HEADER}\n{GOOD.replace('86.81', 'nan')}\n", "value='nan'"),
        (f"{HEADER}\n{GOOD.replace('86.81', '186.81')}\n", "value='186.81'"),
        (f"{HEADER}\n{GOOD.replace('86.81', '-1')}\n", "value='-1'"),
        (f'{HEADER}\n{GOOD}"open\n', "cannot be read"),
    ],
)
def test_malformed_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "paper.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        paper.load(path)


def test_file_that_is_no_text_or_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "paper.csv"
    with pytest.raises(DataError, match="cannot be read"):
        paper.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        paper.load(path)
