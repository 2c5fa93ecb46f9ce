"""Attack specs as text."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from attacked_models import CASCADE_ATTACKS, GRADIENT_AND_NOISE
from hypothesis import given
from hypothesis import strategies as st

from components.attacks.registry import ATTACKS
from components.attacks.spec import ATTACK_NAMES, AttackSpec
from components.errors import ConfigError
from components.fields import from_dict, to_dict


def test_all_have_a_spec() -> None:
    assert tuple(ATTACKS) == ATTACK_NAMES
    parsed = {
        text: AttackSpec.parse(text) for text in (*CASCADE_ATTACKS, "adaptive:eps=0.1", "noise:eps=0.1", "ddn", "cw")
    }
    assert {s.name for s in parsed.values() if s.kind == "minimal_norm"} == {"fab-t", "ddn", "cw"}
    assert {s.name for s in parsed.values() if s.can_stop_on_success} == {"pgd", "apgd", "apgd-t", "adaptive"}
    assert {s.name for s in parsed.values() if not s.needs_gradients} == {"square", "noise"}
    assert {s.name for s in parsed.values() if s.judged_on_source_only} == {"autoattack", "square"}
    for spec in parsed.values():
        assert AttackSpec.parse(str(spec)) == spec
        assert from_dict(AttackSpec, to_dict(spec)) == spec
        assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        # Addresses of existing results depend on these texts.
        ("fgsm:eps=0.1", "fgsm:eps=0.1"),
        ("bim:eps=0.2", "bim:eps=0.2,steps=100"),
        ("pgd:eps=0.2,steps=40,restarts=1", "pgd:eps=0.2,steps=40"),
        ("cw:target=", "cw:steps=20"),
        ("ddn", "ddn:steps=100"),
        ("noise:eps=0.2", "noise:eps=0.2"),
        ("pgd:restarts=5,eps=0.2", "pgd:eps=0.2,steps=100,restarts=5"),
        ("apgd:eps=8/255,loss=dlr", f"apgd:eps={8 / 255},steps=100,loss=dlr"),
        ("apgd-t:eps=1,norm=l2,targets=4", "apgd-t:eps=1.0,norm=l2,steps=100,targets=4"),
        ("fab-t:norm=l2", "fab-t:norm=l2,steps=100"),
        ("square:eps=0.3", "square:eps=0.3"),
        ("autoattack:queries=5000,eps=0.3", "autoattack:eps=0.3,steps=100"),
        (
            "adaptive:eps=0.3,objective=reconstruction,weight=3",
            "adaptive:eps=0.3,steps=100,objective=reconstruction,weight=3.0",
        ),
        ("ddn:target=random", "ddn:steps=100,target=random"),
    ],
)
def test_text_of_a_spec_of_autoattack_is_canonical(text: str, canonical: str) -> None:
    assert str(AttackSpec.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apgd", "apgd needs eps"),
        ("apgd:eps=0.1,loss=hinge", r"apgd\.loss is 'hinge'.*one of ce, dlr"),
        ("apgd:eps=0.1,loss=", r"apgd\.loss is ''.*one of ce, dlr$"),
        ("bim:eps=0.1,target=worst", r"bim\.target is 'worst'.*random, least_likely, runner_up, or empty"),
        ("bim:eps=0.1,restarts=2", r"unknown field of bim: 'restarts'"),
        ("pgd:eps=0.1,restarts=0", r"pgd\.restarts is 0.*at least 1"),
        ("pgd:eps=0.1,restarts=1.5", r"pgd\.restarts is '1\.5'.*whole number"),
        ("apgd-t:eps=0.1,targets=0", r"apgd-t\.targets is 0.*at least 1"),
        ("apgd-t:eps=0.1,target=random", r"unknown field of apgd-t: 'target'"),
        ("fab-t:eps=0.1", r"unknown field of fab-t: 'eps'"),
        ("square:eps=0.1,queries=0", r"square\.queries is 0.*at least 1"),
        ("square:eps=0.1,norm=l1", r"square\.norm is 'l1'.*linf or l2"),
        ("autoattack:eps=0.1,restarts=2", r"unknown field of autoattack: 'restarts'"),
        ("adaptive:eps=0.1,objective=logits", r"adaptive\.objective is 'logits'.*latent, reconstruction"),
        ("adaptive:eps=0.1,weight=-1", r"adaptive\.weight is -1\.0"),
        ("adaptive:eps=0.1,weight=nan", r"adaptive\.weight is nan"),
    ],
)
def test_impossible_specs_of_autoattack_name_field_value_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackSpec.parse(text)


def test_a_target_shows_in_the_short_name() -> None:
    assert AttackSpec.parse("bim:eps=0.1,norm=l2,target=random").short_name == "bim-l2-random"
    assert AttackSpec.parse("fab-t:norm=l2").short_name == "fab-t-l2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fgsm:eps=0.2", {"eps": 0.2, "norm": "linf", "steps": None, "step_size": None}),
        ("bim:eps=0.2", {"eps": 0.2, "norm": "linf", "steps": 100, "step_size": 0.0}),
        ("pgd:eps=8/255,norm=l2,steps=7", {"eps": 8 / 255, "norm": "l2", "steps": 7}),
        ("cw", {"eps": None, "norm": "l2", "steps": 20, "binary_search_steps": 5, "confidence": 0.0}),
        (
            "ddn",
            {"eps": None, "norm": "l2", "steps": 100, "gamma": 0.05, "initial_norm": 1.0, "quantization_levels": 0},
        ),
        ("noise:eps=1", {"eps": 1.0, "norm": "linf", "steps": None}),
    ],
)
def test_parse_fills_the_defaults(text: str, expected: dict[str, object]) -> None:
    spec = AttackSpec.parse(text)
    assert {name: getattr(spec, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("bim:steps=100,eps=.2", "bim:eps=0.2,steps=100"),
        ("bim:eps=0.2", "bim:eps=0.2,steps=100"),
        ("pgd:norm=l2,eps=1", "pgd:eps=1.0,norm=l2,steps=100"),
        ("cw:lr=0.5", "cw:steps=20"),
        ("cw:lr=0.01", "cw:steps=20,lr=0.01"),
        ("fgsm:eps=1/4", "fgsm:eps=0.25"),
    ],
)
def test_text_of_a_spec_is_canonical(text: str, canonical: str) -> None:
    assert str(AttackSpec.parse(text)) == canonical


positive = st.floats(1e-6, 1e3)
eps_of_either_norm = st.floats(1e-6, 1)


@given(
    st.one_of(
        st.builds(
            AttackSpec,
            name=st.sampled_from(["noise", "fgsm"]),
            eps=eps_of_either_norm,
            norm=st.sampled_from(["linf", "l2"]),
        ),
        st.builds(
            AttackSpec,
            name=st.sampled_from(["bim", "pgd"]),
            eps=eps_of_either_norm,
            norm=st.sampled_from(["linf", "l2"]),
            steps=st.integers(1, 999),
            step_size=st.floats(0, 1),
        ),
        st.builds(AttackSpec, name=st.just("apgd"), eps=positive, norm=st.just("l2")),
        st.builds(
            AttackSpec,
            name=st.just("cw"),
            steps=st.integers(1, 999),
            binary_search_steps=st.integers(1, 9),
            lr=positive,
            initial_const=positive,
            confidence=st.floats(0, 50),
        ),
        st.builds(
            AttackSpec,
            name=st.just("ddn"),
            gamma=st.floats(0.01, 0.9),
            initial_norm=positive,
            quantization_levels=st.sampled_from([0, 2, 256]),
        ),
    )
)
def test_a_spec_survives_text_dict_and_pickle(spec: AttackSpec) -> None:
    assert AttackSpec.parse(str(spec)) == spec
    assert from_dict(AttackSpec, to_dict(spec)) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nes:eps=1", r"unknown attack 'nes'.*noise, fgsm, bim, pgd, cw, ddn"),
        ("bim", r"bim needs eps"),
        ("noise", r"noise needs eps"),
        ("fgsm:eps=0", r"fgsm\.eps is 0\.0.*above 0"),
        ("fgsm:eps=-0.1", r"fgsm\.eps is -0\.1.*above 0"),
        ("fgsm:eps=nan", r"fgsm\.eps is nan"),
        ("fgsm:eps=inf", r"fgsm\.eps is inf"),
        ("fgsm:eps=8", r"fgsm\.eps is 8\.0.*at most 1 in linf, in units of \[0,1\] pixels: write 8/255"),
        ("noise:eps=1.0001", r"noise\.eps is 1\.0001.*at most 1 in linf"),
        ("autoattack:eps=300", r"autoattack\.eps is 300\.0.*at most 1 in linf, in units of \[0,1\] pixels$"),
        ("pgd:eps=8/255,step_size=2", r"pgd\.step_size is 2\.0.*at most 1 in linf.*write 2/255"),
        ("fgsm:eps=-1/-5", r"fgsm\.eps is '-1/-5'.*number"),
        ("fgsm:eps=1/-5", r"fgsm\.eps is '1/-5'.*number"),
        ("fgsm:eps=-1/5", r"fgsm\.eps is -0\.2.*above 0"),
        ("fgsm:eps=1/0", r"fgsm\.eps is '1/0'.*number"),
        ("fgsm:eps=big", r"fgsm\.eps is 'big'.*number"),
        ("cw:norm=linf", r"cw\.norm is 'linf'.*l2"),
        ("bim:eps=0.1,norm=l1", r"bim\.norm is 'l1'.*linf or l2"),
        ("bim:eps=0.1,steps=0", r"bim\.steps is 0.*at least 1"),
        ("bim:eps=0.1,steps=2.5", r"bim\.steps is '2\.5'.*whole number"),
        ("bim:eps=0.1,step_size=-1", r"bim\.step_size is -1\.0"),
        ("fgsm:eps=0.1,steps=3", r"unknown field of fgsm: 'steps'; .*There are eps, norm"),
        ("ddn:eps=1", r"unknown field of ddn: 'eps'; .*There are norm, steps"),
        ("ddn:gamma=1", r"ddn\.gamma is 1\.0.*\(0, 1\)"),
        ("ddn:quantization_levels=1", r"ddn\.quantization_levels is 1.*at least 2"),
        ("cw:restarts=2", r"unknown field of cw: 'restarts'"),
        ("cw:confidence=-1", r"cw\.confidence is -1\.0"),
        ("cw:binary_search_steps=0", r"cw\.binary_search_steps is 0.*at least 1"),
        ("cw:lr=0", r"cw\.lr is 0\.0"),
    ],
)
def test_impossible_specs_name_field_value_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackSpec.parse(text)


@pytest.mark.parametrize("values", [{"steps": 2.5}, {"steps": True}, {"eps": "0.1"}])
def test_a_spec_made_in_python_is_checked_for_types(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"a (whole )?number"):
        AttackSpec(**{"name": "bim", "eps": 0.1, **values})


def test_kinds_and_names() -> None:
    kinds = {text.split(":")[0]: AttackSpec.parse(text).kind for text in GRADIENT_AND_NOISE}
    assert [name for name, kind in kinds.items() if kind == "minimal_norm"] == ["cw", "ddn"]
    assert {t.split(":")[0] for t in GRADIENT_AND_NOISE if AttackSpec.parse(t).can_stop_on_success} == {"bim", "pgd"}
    assert AttackSpec.parse("bim:eps=0.1").short_name == "bim"
    assert AttackSpec.parse("bim:eps=0.1,norm=l2").short_name == "bim-l2"
    assert tuple(ATTACKS) == ATTACK_NAMES


def test_reading_a_spec_does_not_load_torch() -> None:
    code = "import components.attacks.spec, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
