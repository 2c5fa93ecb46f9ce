"""Two workers over gloo against one process that does the same arithmetic: no Ray.

Everything the workers do happens in one pair of processes (starting one takes seconds); each test looks at one part of
what they left behind.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from made_up_shards import SHAPES, Shards
from torch import Tensor, nn

from components.config import TrainConfig
from components.network import build_net
from components.random_streams import ADVERSARIAL_STREAM, stream_seed
from components.training.adversarial import training_examples
from components.training.augment import Batch, gaussian_noise
from components.training.schedule import learning_rate, phase_at_epoch
from components.training.step import PhaseModule, make_optimizer, train_step
from pipeline.runtime.storage import Storage
from pipeline.training.loop import NonFiniteLoss, RankData, Ranks, TrainingLoop

pytestmark = pytest.mark.slow
WORLD = 2
CPU = torch.device("cpu")
ALTERNATING = {"schedule": "alternating", "cycles": 1, "autoencoder_epochs": 1, "classifier_epochs": 1, "epochs": 3}
CASES: dict[str, dict[str, Any]] = {
    "classifier": {"defense": "none"},
    "joint": {},
    "joint, all shared, latent noise": {"shared_blocks": 4, "noise_location": "latent"},
    "joint, input noise, clipped": {"noise_location": "input", "clip_norm": 0.5},
    "alternating": ALTERNATING,
    "TRADES, joint": {
        "adversarial_training": True,
        "adversarial_loss": "trades",
        "adversarial_attack": "pgd",
        "adversarial_steps": 2,
    },
    "examples, alternating, averaged": {
        **ALTERNATING,
        "adversarial_training": True,
        "adversarial_attack": "n-fgsm",
        "ema_decay": 0.5,
    },
}


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"width": 4, "batch_size": 8, "lr": 0.02, "epochs": 2, "shared_blocks": 2, **changes})


def rows(rank: int, world: int = WORLD, n: int = 19, seed: int = 0, levels: bool = True) -> RankData:
    return RankData(Shards(n, seed), rank, world, CPU, levels=levels)


def freeze_batch_norm(net: nn.Module) -> None:
    """Batch norm in eval mode for good: the only part of the network that sees the rest of its batch."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.train = lambda mode=True, m=m: m  # type: ignore[method-assign,assignment,misc]


def momentum(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {n: optimizer.state[p]["momentum_buffer"] for n, p in net.named_parameters() if p in optimizer.state}


def state(loop: TrainingLoop) -> dict[str, Any]:
    return {"net": loop.net.state_dict(), "momentum": momentum(loop.net, loop.optimizer)}


def worker(rank: int, directory: str) -> None:
    """One rank: trains every case and keeps what it ended with."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=120),  # of one collective: a rank that waits for ever becomes an error
    )
    out: dict[str, Any] = {}

    def loop(config: TrainConfig, validation: bool = False, data: RankData | None = None) -> TrainingLoop:
        mine = data or rows(rank, levels=config.defense != "none")
        return TrainingLoop(
            config, SHAPES, mine, rows(rank, n=11, seed=1) if validation else None, ranks=Ranks(rank, WORLD)
        )

    for name, changes in CASES.items():
        config = tiny(**changes)
        run = loop(config)
        records = [run.run_epoch() for _ in range(config.epochs)]
        losses = [s["loss"] for r in records for s in r["steps"]]
        out[name] = {
            **state(run),
            "trained": run.trained_net.state_dict(),
            "losses": losses,
            "phases": [r["phase"] for r in records],
        }

    frozen = loop(tiny())
    freeze_batch_norm(frozen.net)
    for _ in range(2):
        frozen.run_epoch()
    out["frozen"] = state(frozen)

    validated = loop(tiny(), validation=True)
    record = validated.run_epoch()
    out["validated"] = {"result": record["validation"], "net": validated.net.state_dict()}

    config = tiny(**ALTERNATING, noise_location="latent")
    straight, first = loop(config, validation=True), loop(config, validation=True)
    for _ in range(3):
        straight.run_epoch()
    first.run_epoch()
    if rank == 0:
        first.save(Storage(directory))
    dist.barrier()
    second = loop(config, validation=True)
    second.resume(Storage(directory))
    for _ in range(2):
        second.run_epoch()
    out["straight"], out["continued"] = state(straight), state(second)

    # adversarial training reads the running statistics that ranks have of their own: PGD examples are made in eval mode
    config = tiny(defense="adversarial", adversarial_attack="pgd", adversarial_steps=2, epochs=3)
    straight, first = loop(config), loop(config)
    for _ in range(3):
        straight.run_epoch()
    first.run_epoch()
    if rank == 0:
        first.save(Storage(f"{directory}/adversarial"))
    dist.barrier()
    second = loop(config)
    second.resume(Storage(f"{directory}/adversarial"))
    for _ in range(2):
        second.run_epoch()
    validated = loop(config, validation=True)
    for _ in range(3):
        validated.run_epoch()
    out["adversarial"] = {"straight": state(straight), "continued": state(second), "validated": state(validated)}

    # a bad row on rank 1 alone: both must stop, and at the same step
    data = rows(rank)
    if rank == 1:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(stream_seed(0, 0, 1)))
        data.levels[0][order[1], 0, 0, 0] = float("nan")  # first batch of four: rank 0 sees it one step later
    try:
        loop(tiny(), data=data).run_epoch()
    except NonFiniteLoss as e:
        out["bad step"] = e.step
    torch.save(out, f"{directory}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ddp")
    mp.spawn(worker, args=(str(directory),), nprocs=WORLD)
    return [torch.load(Path(directory) / f"rank-{r}.pt", weights_only=False) for r in range(WORLD)]


def halves(config: TrainConfig, epoch: int, i: int) -> list[Batch]:
    """What each rank trains on in step i of an epoch."""
    out = []
    for rank in range(WORLD):
        data = rows(rank, levels=config.defense != "none")
        generator = torch.Generator().manual_seed(stream_seed(config.seed, epoch, rank))
        order = torch.randperm(len(data), generator=generator)
        n = config.batch_size // WORLD
        out.append(data.batch(order[i * n : (i + 1) * n]))
    return out


STEPS = 19 // WORLD // 4
"""Steps of an epoch: nine rows on each rank, four a step."""


def one_process(config: TrainConfig) -> tuple[list[nn.Module], list[torch.optim.SGD], list[float]]:
    """Two replicas in one process: each does its half, the gradients are averaged, each takes the step. Rank 0's losses."""
    nets = [build_net(config, SHAPES).train() for _ in range(WORLD)]
    optimizers = [make_optimizer(net, config) for net in nets]
    losses = []
    for step in range(config.epochs * STEPS):
        epoch = step // STEPS
        phase = phase_at_epoch(epoch, config)
        for rank, batch in enumerate(halves(config, epoch, step % STEPS)):
            optimizers[rank].zero_grad()
            images = batch.images.float() / 255
            targets = [images, *(x.float() for x in batch.levels)]
            noise = gaussian_noise(config, step, rank, CPU)
            module = PhaseModule(nets[rank], phase, config)
            examples = None
            if module.attacked is not None:
                draws = torch.Generator().manual_seed(stream_seed(config.seed, step, rank, ADVERSARIAL_STREAM))
                examples = training_examples(module.attacked, images, batch.labels, config, draws)
            loss, _ = module(images, batch.labels, targets, noise, examples)
            loss.backward()
            if rank == 0:
                losses.append(float(loss.detach()))
        for pair in zip(*(net.parameters() for net in nets), strict=True):
            if pair[0].grad is not None:
                average = sum(p.grad / WORLD for p in pair)
                for p in pair:
                    p.grad = average.clone()
        for net, optimizer in zip(nets, optimizers, strict=True):
            if config.clip_norm:
                with_gradient = PhaseModule(net, phase, config).parameters()
                torch.nn.utils.clip_grad_norm_(with_gradient, config.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, STEPS, config)
            optimizer.step()
        if step % STEPS == STEPS - 1:  # at an epoch's end every rank takes rank 0's batch norm statistics
            for first, other in zip(*(net.buffers() for net in nets), strict=True):
                other.copy_(first)
    return nets, optimizers, losses


@pytest.mark.parametrize("name", CASES)
def test_two_workers_are_two_half_batches_bit_for_bit(ranks: list[dict[str, Any]], name: str) -> None:
    config = tiny(**CASES[name])
    nets, optimizers, losses = one_process(config)
    for rank in range(WORLD):
        got = ranks[rank][name]
        for key, value in nets[rank].state_dict().items():
            # buffers as well: within an epoch batch norm is each rank's own
            assert torch.equal(got["net"][key], value), key
        expected = momentum(nets[rank], optimizers[rank])
        assert set(got["momentum"]) == set(expected)
        for key, value in expected.items():
            assert torch.equal(got["momentum"][key], value), key
    assert ranks[0][name]["losses"] == losses
    assert ranks[0][name]["losses"] != ranks[1][name]["losses"]
    if name == "alternating":
        assert ranks[0][name]["phases"] == ["autoencoder", "classifier", "joint"]
    if name == "examples, alternating, averaged":
        assert ranks[0][name]["phases"] == ["adversarial_autoencoder", "adversarial", "adversarial_joint"]


@pytest.mark.parametrize("name", CASES)
def test_ranks_end_with_the_same_weights_and_statistics(ranks: list[dict[str, Any]], name: str) -> None:
    """And have moved: an all-reduce that did nothing would leave them apart, a step that did nothing at the start."""
    a, b = (r[name]["net"] for r in ranks)
    start = build_net(tiny(**CASES[name]), SHAPES)
    parameters = dict(start.named_parameters())
    for key in parameters:
        assert torch.equal(a[key], b[key]), key
        assert not torch.equal(a[key], parameters[key]), key
    for key in a.keys() - parameters.keys():
        assert torch.equal(a[key], b[key]), key
    first, second = (r[name]["trained"] for r in ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], a[key]) for key in a) == ("averaged" in name)


def test_with_batch_norm_frozen_two_workers_are_the_full_batch(ranks: list[dict[str, Any]]) -> None:
    config = tiny()
    net = build_net(config, SHAPES).train()
    freeze_batch_norm(net)
    optimizer, module = make_optimizer(net, config), PhaseModule(net, "joint", config)
    for step in range(2 * STEPS):
        a, b = halves(config, step // STEPS, step % STEPS)
        batch = Batch(
            images=torch.cat([a.images, b.images]),
            labels=torch.cat([a.labels, b.labels]),
            levels=tuple(torch.cat(pair) for pair in zip(a.levels, b.levels, strict=True)),
        )
        train_step(module, optimizer, batch, lr=learning_rate(step, STEPS, config), config=config)
    for key, value in net.named_parameters():
        torch.testing.assert_close(ranks[0]["frozen"]["net"][key], value.detach(), rtol=1e-5, atol=1e-5, msg=key)
    # weights hide a wrong gradient behind a small learning rate; momentum is the gradients themselves
    for key, value in momentum(net, optimizer).items():
        size = float(value.abs().max())
        assert size > 0
        torch.testing.assert_close(ranks[0]["frozen"]["momentum"][key], value, rtol=1e-4, atol=1e-4 * size, msg=key)


def test_validation_is_that_of_the_weights_and_statistics_which_are_exported(ranks: list[dict[str, Any]]) -> None:
    first, second = (r["validated"] for r in ranks)
    assert first["result"] == second["result"]
    alone = TrainingLoop(tiny(), SHAPES, rows(0, 1), rows(0, 1, n=10, seed=1))  # the eleventh row is no rank's
    alone.net.load_state_dict(first["net"])
    assert first["result"] == pytest.approx(alone.validate(), rel=1e-6)


def test_continuing_from_rank_0s_checkpoint(ranks: list[dict[str, Any]]) -> None:
    """Over a phase change, with noise: both ranks as if nothing had happened."""
    for rank in ranks:
        for part in ("net", "momentum"):
            assert list(rank["straight"][part]) == list(rank["continued"][part])
            for key, value in rank["straight"][part].items():
                assert torch.equal(rank["continued"][part][key], value), key


@pytest.mark.parametrize("other", ["continued", "validated"])
def test_adversarial_training_without_validation_is_the_same(ranks: list[dict[str, Any]], other: str) -> None:
    """Continued after a kill, or with validation images beside it: every rank as if nothing had happened."""
    for rank in ranks:
        for part, values in rank["adversarial"]["straight"].items():
            for key, value in values.items():
                assert torch.equal(rank["adversarial"][other][part][key], value), key


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_at_its_step(ranks: list[dict[str, Any]]) -> None:
    assert [r["bad step"] for r in ranks] == [0, 0]
