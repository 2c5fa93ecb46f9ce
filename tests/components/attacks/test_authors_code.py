"""Our attacks beside the authors' own code, from github.com/fra31/auto-attack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attacked_models import broken, norm_of, seeded
from torch import Tensor, nn

from components.attacks.apgd import apgd, apgd_t
from components.attacks.fab import fab_t
from components.attacks.square import square


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.7)])
@pytest.mark.parametrize("name", ["apgd", "apgd-dlr", "apgd-t", "square"])
def test_budget_attacks_break_as_many_as_the_authors(
    name: str, norm: str, eps: float, mnist: tuple[Tensor, Tensor, nn.Module]
) -> None:
    pytest.importorskip("autoattack")
    x, y, model = mnist
    authors, ours = authors_and_ours(name, norm, eps, x, y, model)
    fallen = [broken(model, out, y) for out in (authors, ours)]
    assert 5 < fallen[0].sum() < 95, "of no use unless some fall and some stand"
    assert abs(int(fallen[0].sum()) - int(fallen[1].sum())) <= (6 if name == "square" else 2)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_finds_the_norms_of_the_authors(norm: str, mnist: tuple[Tensor, Tensor, nn.Module]) -> None:
    pytest.importorskip("autoattack")
    x, y, model = mnist
    x, y = x[:30], y[:30]
    # No sample reaches this eps. Otherwise the authors' code stops at the first target within it.
    authors, ours = authors_and_ours("fab-t", norm, 1e-6, x, y, model)
    norms = [norm_of(out - x, norm) for out in (authors, ours)]
    assert np.median(norms[1]) == pytest.approx(np.median(norms[0]), rel=0.02)


def authors_and_ours(
    name: str, norm: str, eps: float, x: Tensor, y: Tensor, model: nn.Module, steps: int = 40, queries: int = 300
) -> tuple[Tensor, Tensor]:
    from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from autoattack.fab_pt import FABAttack_PT
    from autoattack.square import SquareAttack

    options = {"norm": norm.capitalize(), "seed": 0, "device": "cpu", "eps": eps}
    with torch.random.fork_rng():
        if name in ("apgd", "apgd-dlr"):
            loss = "dlr" if name == "apgd-dlr" else "ce"
            authors = APGDAttack(model, n_iter=steps, loss=loss, **options).perturb(x, y)
            ours = apgd(model, x, y, eps=eps, norm=norm, steps=steps, loss=loss, generator=seeded(0))
        elif name == "apgd-t":
            authors = APGDAttack_targeted(model, n_iter=steps, n_target_classes=9, **options).perturb(x, y)
            ours = apgd_t(model, x, y, eps=eps, norm=norm, steps=steps, generator=seeded(0))
        elif name == "square":
            authors = SquareAttack(model, n_queries=queries, **options).perturb(x, y)
            ours = square(model, x, y, eps=eps, norm=norm, queries=queries, generator=seeded(0))
        else:
            # The authors' perturb() stops early. Our code minimises over all targets, so this calls each search.
            attack = FABAttack_PT(model, n_iter=steps, targeted=True, **options)
            best, best_norm = x, np.full(len(x), np.inf)
            for target in range(2, 11):
                attack.target_class = target
                out = attack.attack_single_run(x, y, is_targeted=True)
                size = np.where(broken(model, out, y), norm_of(out - x, norm), np.inf)
                best = torch.where(torch.from_numpy(size < best_norm).view(-1, 1, 1, 1), out, best)
                best_norm = np.minimum(size, best_norm)
            authors = best
            ours = fab_t(model, x, y, norm=norm, steps=steps)
    return authors.detach(), ours
