"""Settings: what is refused and how it is said, and that a config survives text, JSON and hashing."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest
from config_errors import assert_error_has, assert_refused

from components.attacks.spec import AttackSpec
from components.config import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    PyramidConfig,
    ScalingConfig,
    TrainConfig,
    level_sizes,
)
from components.errors import ConfigError
from components.fields import content_hash, parse_spec, to_dict

ALTERNATING = {"schedule": "alternating", "cycles": 2, "autoencoder_epochs": 3, "classifier_epochs": 1}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("arch", "resnet19", "resnet18, resnet50"),
        ("defense", "defend", "none, defend++"),
        ("decoder", "unet", "pyramid"),
        ("schedule", "mixed", "joint, alternating"),
        ("reconstruction_reduction", "max", "mean, sum"),
        ("noise_location", "logits", "none, latent, input"),
        ("lr_schedule", "cosine", "one_cycle, step"),
        ("precision", "float16", "float32, bfloat16"),
        ("width", 0, "1 to 4096"),
        ("shared_blocks", 0, "1 to 4"),
        ("shared_blocks", 5, "1 to 4"),
        ("lam", -0.01, "0 or more"),
        ("lam", math.nan, "0 or more"),
        ("lam", math.inf, "finite"),
        ("reconstruction_weight", -1.0, "0 or more"),
        ("noise_sigma", -1.0, "0 or more"),
        ("weight_decay", -1.0, "0 or more"),
        ("clip_norm", math.nan, "0 or more"),
        ("lr", 0.0, "above 0"),
        ("lr", math.nan, "above 0"),
        ("lr_gamma", -0.1, "above 0"),
        ("momentum", 1.0, "[0, 1)"),
        ("momentum", -0.1, "[0, 1)"),
        ("epochs", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("lr_step_epochs", -1, "at least 0"),
        ("checkpoint_every_epochs", 0, "at least 1"),
    ],
)
def test_train_refuses(field: str, value: typing.Any, allowed: str) -> None:
    assert_refused(lambda: TrainConfig(**{field: value}), f"train.{field}", value, allowed)


@pytest.mark.parametrize(
    ("mean", "std", "field"),
    [
        ((0.5,), (), "normalize_std"),
        ((), (0.5,), "normalize_std"),
        ((0.5,), (0.0,), "normalize_std"),
        ((0.5,), (math.nan,), "normalize_std"),
        ((0.5,), (math.inf,), "normalize_std"),
        ((math.nan,), (0.5,), "normalize_mean"),
    ],
)
def test_normalisation_refuses(mean: tuple[float, ...], std: tuple[float, ...], field: str) -> None:
    value = mean if field == "normalize_mean" else std
    assert_refused(lambda: TrainConfig(normalize_mean=mean, normalize_std=std), f"train.{field}", value, "finite")


def test_alternating_needs_its_epochs_and_an_autoencoder() -> None:
    TrainConfig(**ALTERNATING, epochs=8)
    assert_refused(lambda: TrainConfig(**ALTERNATING, epochs=7), "train.epochs", 7, "= 8; the rest is joint")
    # without an auto-encoder there is nothing to alternate with: an undefended model of an alternating recipe says nothing of it
    assert TrainConfig(**ALTERNATING, epochs=1, defense="none").schedule == "alternating"
    for name in ("cycles", "autoencoder_epochs", "classifier_epochs"):
        assert_refused(
            lambda name=name: TrainConfig(**{**ALTERNATING, "epochs": 8, name: 0}), f"train.{name}", 0, "at least 1"
        )


@pytest.mark.parametrize(
    ("cls", "prefix", "field", "value", "allowed"),
    [
        (DataConfig, "data", "source", "http:x", "parquet:DIR"),
        (DataConfig, "data", "source", "parquet:", "parquet:DIR"),
        (DataConfig, "data", "image_size", 6, "at least 7 pixels"),
        (DataConfig, "data", "channels", 2, "1 (grey) or 3"),
        (DataConfig, "data", "num_classes", 1, "2 to 1000000"),
        (DataConfig, "data", "validation_fraction", 1.0, "[0, 1)"),
        (DataConfig, "data", "validation_fraction", math.nan, "[0, 1)"),
        (DataConfig, "data", "train_limit", -1, "0 (all)"),
        (DataConfig, "data", "test_limit", -1, "0 (all)"),
        (DataConfig, "data", "resize", "stretch", "none, crop"),
        (TrainConfig, "train", "targets", "wavelet", "lowpass, linear, none"),
        (TrainConfig, "train", "decoder", "unet", "hourglass_add"),
        (TrainConfig, "train", "arch", "alexnet", "MODULE:FUNCTION"),
        (TrainConfig, "train", "replace_head", True, "False where no weights are given (--train.pretrained FILE)"),
        (TrainConfig, "train", "adversarial_attack", "cw", "fgsm, pgd, ddn"),
        (TrainConfig, "train", "adversarial_eps", 0.0, "above 0"),
        (TrainConfig, "train", "adversarial_eps", math.nan, "above 0"),
        (TrainConfig, "train", "adversarial_steps", 0, "at least 1"),
        (TrainConfig, "train", "adversarial_share", 1.5, "at most 1"),
        (TrainConfig, "train", "adversarial_epochs", 5, "0 (all) to train.epochs, which is 4"),
        (TrainConfig, "train", "adversarial_max_norm", -1.0, "0 or more"),
        (TrainConfig, "train", "reformer_sigma", math.inf, "a finite number"),
        (TrainConfig, "train", "crop_padding", 0, "at least 1"),
        (ScalingConfig, "scaling", "parallel_models", -1, "0 (room decides)"),
        (PyramidConfig, "pyramids", "dtype", "int8", "float16, float32"),
        (PyramidConfig, "pyramids", "levels", 5, "to 4"),
        (PyramidConfig, "pyramids", "levels", -1, "to 4"),
        (PyramidConfig, "pyramids", "rows_per_shard", -1, "0 (by size)"),
        (EvaluationConfig, "evaluation", "attacks", (), "at least one attack"),
        (EvaluationConfig, "evaluation", "threat_models", (), "at least one threat model"),
        (EvaluationConfig, "evaluation", "seed", 2**63, "a number from -2**63 to 2**63 - 1"),
        (TrainConfig, "train", "seed", -(2**63) - 1, "a number from -2**63"),
        (TrainConfig, "train", "lr", 10**100, "a number from -2**63"),
        (ScalingConfig, "scaling", "workers", 2**63, "a number from -2**63"),
        (EvaluationConfig, "evaluation", "search_precision", "float16", "float32, bfloat16"),
        (DataConfig, "data", "image_size", 2**14 + 1, "at most 16384"),
        (DataConfig, "data", "num_classes", 10**6 + 1, "2 to 1000000"),
        (TrainConfig, "train", "width", 4097, "1 to 4096 channels"),
        (TrainConfig, "train", "reformer_sigma", 0.0, "above 0"),
        (EvaluationConfig, "evaluation", "test_images", -1, "0 (all)"),
        (EvaluationConfig, "evaluation", "chunk_size", 0, "at least 1"),
        (ScalingConfig, "scaling", "workers", 0, "at least 1"),
        (ScalingConfig, "scaling", "threads_per_worker", 0, "at least 1"),
        (ScalingConfig, "scaling", "cpus_per_worker", 0.0, "above 0"),
        (ScalingConfig, "scaling", "cpus_per_attack", math.nan, "above 0"),
        (ScalingConfig, "scaling", "gpus_per_attack", -0.5, "0 or more"),
        (ScalingConfig, "scaling", "max_failures", -1, "0 or more"),
    ],
)
def test_other_sections_refuse(cls: type, prefix: str, field: str, value: object, allowed: str) -> None:
    assert_refused(lambda: cls(**{field: value}), f"{prefix}.{field}", value, allowed)


def test_unknown_threat_model_and_attack() -> None:
    assert_refused(
        lambda: EvaluationConfig(threat_models=("grey_box",)),
        "evaluation.threat_models",
        "grey_box",
        "one of white_box, black_box, transfer, transfer:NAME and transfer:*",
    )
    assert_refused(
        lambda: EvaluationConfig(threat_models=("transfer:",)), "evaluation.threat_models", "transfer:", "transfer:NAME"
    )
    assert_refused(
        lambda: experiment(evaluation=EvaluationConfig(threat_models=("transfer:nobody",))),
        "evaluation.threat_models",
        "transfer:nobody",
        "one of the models control, defend, no_defense",
    )
    with pytest.raises(ConfigError, match="deepfool"):
        EvaluationConfig(attacks=("deepfool",))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("bim:eps=0.2", "bim:eps=0.2,steps=100"),
        ("bim:eps=0.2", "bim:eps=1/5"),
        ("bim:steps=40,eps=.2", "bim:eps=0.2,steps=40"),
        ("ddn", "ddn:steps=100"),
        ("pgd:eps=0.2,norm=linf,restarts=1", "pgd:eps=0.2"),
    ],
)
def test_an_attack_under_two_texts_is_one_attack(first: str, second: str) -> None:
    attacks = ("cw", first, second)
    assert_error_has(
        lambda: EvaluationConfig(attacks=attacks), f"{first} and {second} are both {AttackSpec.parse(first)}"
    )


def test_attacks_that_differ_in_a_setting_are_two() -> None:
    EvaluationConfig(attacks=("bim:eps=0.2", "bim:eps=0.1", "bim:eps=0.2,steps=40", "bim:eps=0.2,norm=l2"))


def test_each_threat_model_once() -> None:
    twice = ("white_box", "transfer", "white_box")
    assert_refused(
        lambda: EvaluationConfig(threat_models=twice), "evaluation.threat_models", twice, "each of them once"
    )


@pytest.mark.parametrize(
    ("channels", "size", "largest", "beyond"), [(1, 28, "28", "28.01"), (3, 32, "55.4", "55.5"), (3, 64, "110", "128")]
)
def test_an_l2_budget_beyond_the_longest_perturbation_is_refused(
    channels: int, size: int, largest: str, beyond: str
) -> None:
    def made(eps: str) -> Experiment:
        evaluation = EvaluationConfig(attacks=("cw", f"pgd:eps={eps},norm=l2"))
        return experiment(data=DataConfig(channels=channels, image_size=size), evaluation=evaluation)

    made(largest)
    assert_refused(lambda: made(beyond), "pgd.eps", float(beyond), f"{channels} x {size} x {size} pixels in [0,1]")


def experiment(**changes: typing.Any) -> Experiment:
    return Experiment(**{"name": "x", **changes})


def test_experiment_refuses_what_does_not_fit_together() -> None:
    experiment()
    assert_refused(lambda: experiment(name=""), "name", "", "letters, digits")
    assert_refused(lambda: experiment(models=()), "models", (), "at least one")
    assert_error_has(
        lambda: experiment(models=("no_defense:defense=none", "no_defense:seed=2")), "the name 'no_defense'"
    )
    assert_refused(
        lambda: experiment(train=TrainConfig(batch_size=10), scaling=ScalingConfig(workers=4)),
        "models[no_defense].batch_size",
        10,
        "a multiple of scaling.workers (4)",
    )
    # only the variant that is wrong is named
    assert_refused(
        lambda: experiment(
            models=("no_defense:defense=none", "odd:batch_size=9"),
            train=TrainConfig(batch_size=8),
            scaling=ScalingConfig(workers=2),
        ),
        "models[odd].batch_size",
        9,
        "a multiple of",
    )
    assert_refused(
        lambda: experiment(evaluation=EvaluationConfig(transfer_source="nobody")),
        "evaluation.transfer_source",
        "nobody",
        "control, no_defense",
    )
    assert_refused(
        lambda: experiment(evaluation=EvaluationConfig(transfer_source="defend")),
        "evaluation.transfer_source",
        "defend",
        "an undefended model",
    )
    # nobody transfers: the source may be missing
    experiment(evaluation=EvaluationConfig(transfer_source="nobody", threat_models=("white_box",)))
    assert_refused(
        lambda: experiment(train=TrainConfig(normalize_mean=(0.5, 0.5), normalize_std=(1.0, 1.0))),
        "models[no_defense].normalize_mean",
        (0.5, 0.5),
        "one value per channel (1)",
    )


def test_channels_last_in_float32_needs_a_gpu() -> None:
    """PyTorch's weight gradient of a stride-2 1x1 convolution corrupts memory there: a crash, or worse, none."""
    train = TrainConfig(channels_last=True)
    assert_refused(
        lambda: experiment(train=train), "models[no_defense].channels_last", True, "--train.precision bfloat16"
    )
    experiment(train=train, scaling=ScalingConfig(gpu=True))
    experiment(train=dataclasses.replace(train, precision="bfloat16"))


def test_a_level_under_seven_pixels_is_refused() -> None:
    assert_refused(
        lambda: experiment(pyramids=PyramidConfig(levels=4)), "pyramids.levels", 4, "1 to 3 at image size 28"
    )
    experiment(pyramids=PyramidConfig(levels=3))
    assert_refused(lambda: experiment(data=DataConfig(image_size=13)), "data.image_size", 13, "at least 14 pixels")
    # what is wrong here is the number of levels, not the size
    assert_refused(lambda: experiment(pyramids=PyramidConfig(levels=1)), "pyramids.levels", 1, "at least 2")


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (28, (28, 14, 7)),
        (32, (32, 16, 8)),
        (64, (64, 32, 16, 8)),
        (224, (224, 112, 56, 28)),
        (7, (7,)),
        (13, (13,)),
        (14, (14, 7)),
        (29, (29, 14, 7)),
        (27, (27, 13)),
        (55, (55, 27, 13)),
        (57, (57, 28, 14, 7)),
    ],
)
def test_level_sizes(size: int, sizes: tuple[int, ...]) -> None:
    assert level_sizes(size) == sizes
    for levels in range(1, len(sizes) + 1):
        assert level_sizes(size, levels) == sizes[:levels]
    assert_refused(lambda: level_sizes(size, len(sizes) + 1), "pyramids.levels", len(sizes) + 1, f"1 to {len(sizes)}")
    assert_refused(lambda: level_sizes(size, -1), "pyramids.levels", -1, f"1 to {len(sizes)}")


def test_level_sizes_refuses_small_images() -> None:
    assert_refused(lambda: level_sizes(6), "data.image_size", 6, "at least 7 pixels")


@pytest.mark.parametrize("name", ["../../evil", "a/b", "", ".", "..", "-x", "a b", "a\0b", "a\n", "x" * 101, "é" * 51])
def test_a_name_that_no_path_takes_is_refused_everywhere(name: str) -> None:
    assert_refused(lambda: experiment(name=name), "name", name, "letters, digits")
    assert_error_has(lambda: parse_spec(f"{name}:seed=1"), "letters, digits")


@pytest.mark.parametrize("name", ["a", "mnist-demo", "defend+gn", "resnet18_bn.2", "_x", "x" * 100, "é" * 50, "網路"])
def test_a_name_that_every_path_takes_is_accepted(name: str) -> None:
    assert experiment(name=name).name == name
    assert parse_spec(name) == (name, {})


def test_papers_place_exists() -> None:
    assert_refused(lambda: experiment(paper="tabel1"), "paper", "tabel1", "table1")


def test_threat_models_are_refused_where_none_attacks_anything() -> None:
    alone = ("a:defense=none",)
    for threats in (("transfer",), ("transfer:a",), ("transfer:*",), ("transfer", "transfer:a")):
        evaluation = EvaluationConfig(threat_models=threats)
        assert_refused(
            lambda e=evaluation: experiment(models=alone, evaluation=e),
            "evaluation.threat_models",
            ", ".join(threats),
            "second model",
        )
        experiment(models=alone, evaluation=dataclasses.replace(evaluation, threat_models=("white_box", *threats)))
    for attacks in (("pgd:eps=0.1",), ("pgd:eps=0.1", "noise:eps=0.1")):
        evaluation = EvaluationConfig(attacks=attacks, threat_models=("black_box",))
        assert_refused(
            lambda e=evaluation: experiment(evaluation=e), "evaluation.threat_models", "black_box", "square:eps=0.2"
        )
        experiment(evaluation=dataclasses.replace(evaluation, threat_models=("white_box", "black_box")))
    experiment(evaluation=EvaluationConfig(attacks=("square:eps=0.1",), threat_models=("black_box",)))


def test_variants_keep_order_and_inherit() -> None:
    e = experiment(
        train=TrainConfig(width=4, seed=7),
        models=("b:defense=none", "a", "c:seed=1"),
        evaluation=EvaluationConfig(transfer_source="b"),
    )
    assert list(e.model_configs()) == ["b", "a", "c"]
    assert e.model_configs()["a"] == e.train
    assert e.model_configs()["c"] == dataclasses.replace(e.train, seed=1)


def test_configs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        TrainConfig("resnet18")  # type: ignore[misc]


def test_settings_without_influence_do_not_name_a_model() -> None:
    """What is trained once must have one address, and what is another model another."""

    def same(a: TrainConfig, b: TrainConfig) -> bool:
        return content_hash(to_dict(a.canonical())) == content_hash(to_dict(b.canonical()))

    bare = TrainConfig(defense="none")
    for field, value in (
        ("lam", 1.0),
        ("decoder", "hourglass"),
        ("shared_blocks", 1),
        ("targets", "linear"),
        ("adversarial_eps", 0.5),
        ("schedule", "alternating"),
        ("checkpoint_every_epochs", 3),
        ("noise_sigma", 0.7),
        ("lr_gamma", 0.5),
    ):
        assert same(bare, dataclasses.replace(bare, **{field: value})), field
    for field, value in (("seed", 1), ("width", 8), ("lr", 0.2), ("augment", "flip"), ("noise_location", "latent")):
        assert not same(bare, dataclasses.replace(bare, **{field: value})), field
    defended = TrainConfig()
    for field, value in (("lam", 1.0), ("decoder", "hourglass"), ("shared_blocks", 1), ("targets", "linear")):
        assert not same(defended, dataclasses.replace(defended, **{field: value})), field
    adversarial = TrainConfig(defense="adversarial", adversarial_attack="pgd")
    assert not same(adversarial, dataclasses.replace(adversarial, adversarial_steps=3))
    assert not same(adversarial, dataclasses.replace(adversarial, adversarial_share=0.5))
    assert same(adversarial, dataclasses.replace(adversarial, lam=1.0))
    assert same(adversarial, dataclasses.replace(adversarial, adversarial_training=True))
    assert same(adversarial, dataclasses.replace(adversarial, adversarial_beta=1.0))
    assert not same(adversarial, dataclasses.replace(adversarial, ema_decay=0.9))
    assert adversarial.canonical().canonical() == adversarial.canonical()


def test_a_whole_number_is_the_same_setting_as_its_float() -> None:
    whole = TrainConfig(lr=1)  # as plain Python in a recipe, or as JSON read back
    assert content_hash(to_dict(whole)) == content_hash(to_dict(TrainConfig(lr=1.0)))


def test_replicates_have_seeds_far_apart_and_sources_of_their_own() -> None:
    one, three = experiment(), experiment(seeds=3)
    assert list(one.model_configs()) == ["no_defense", "control", "defend"]
    assert list(three.model_configs())[:4] == ["no_defense-s0", "no_defense-s1", "no_defense-s2", "control-s0"]
    seeds = [c.seed for c in three.model_configs().values()]
    assert seeds == [0, 1000, 2000, 1, 1001, 2001, 1, 1001, 2001]
    assert three.replicates()["defend-s2"] == ("defend", 2)
    assert three.transfer_source_of("defend-s2") == "no_defense-s2"
    assert three.transfer_source_of("no_defense-s1") is None
    assert three.transfer_source_of("control-s1", "defend") == "defend-s1"


def test_examples_are_transferred_within_an_architecture() -> None:
    models = (
        "a-vgg16:defense=none,arch=vgg16",
        "b-vgg16:arch=vgg16,shared_blocks=2",
        "a-small:defense=none,width=8",
        "b-small:width=8",
    )
    found = experiment(models=models)
    assert {n: found.transfer_source_of(n) for n in found.model_configs()} == {
        "a-vgg16": None,
        "b-vgg16": "a-vgg16",
        "a-small": None,
        "b-small": "a-small",
    }
    assert_error_has(
        lambda: experiment(models=models[1:]), "b-vgg16 needs an undefended model", "defense=none,arch=vgg16,width=64"
    )
    experiment(models=models[1:], evaluation=EvaluationConfig(threat_models=("white_box",)))
    # behind a reformer there has to be a classifier, whatever the threat models
    assert_error_has(
        lambda: experiment(models=("c:defense=comdefend",), evaluation=EvaluationConfig(threat_models=("white_box",))),
        "c needs an undefended model",
        "which stands behind the reformer",
    )


@pytest.mark.parametrize(
    ("models", "seeds", "pair"),
    [
        (("no_defense:defense=none", "control:defense=none"), 1, "control is the same network as no_defense"),
        (("no_defense:defense=none,seed=3", "control:defense=none,seed=3"), 1, "control is the same network"),
        # equal but for a setting without influence
        (("no_defense:defense=none", "control:defense=none,lam=0.5"), 1, "control is the same network"),
        # seeds of replicates are SEED_STRIDE apart
        (("a:defense=none,seed=0", "b:defense=none,seed=1000"), 2, "b-s0 is the same network as a-s1"),
        (("a:defense=none,seed=0", "b:seed=0", "c:seed=1000"), 2, "c-s0 is the same network as b-s1"),
    ],
)
def test_a_network_that_is_its_own_control_is_refused(models: tuple[str, ...], seeds: int, pair: str) -> None:
    with pytest.raises(ConfigError, match=pair):
        experiment(models=models, seeds=seeds)


def test_equal_weights_under_two_names_are_refused_with_a_remedy_that_helps() -> None:
    given = "epochs=0,pretrained=x.pth,defense=none"
    with pytest.raises(ConfigError, match=r"remove one of them: both are the weights of train\.pretrained"):
        experiment(models=(f"a:{given},seed=0", f"b:{given},seed=1"))


def test_lengths_beyond_the_pixel_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"models\[a\].adversarial_max_norm is 255.0.*at most 28"):
        experiment(models=("no_defense:defense=none", "a:defense=adversarial,adversarial_max_norm=255,seed=1"))
    for attack in ("ddn:initial_norm=255", "bim:eps=1,step_size=40,norm=l2"):
        with pytest.raises(ConfigError, match="at most 28 in l2"):
            experiment(evaluation=EvaluationConfig(attacks=(attack,)))


def test_equal_defended_models_of_one_replicate_are_trained_once() -> None:
    experiment(models=("no_defense:defense=none", "a:seed=1", "b:seed=1,checkpoint_every_epochs=2"))


def test_a_seed_that_every_model_overrides_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.seed is 7.*each of models names a seed of its own"):
        experiment(train=TrainConfig(seed=7))
    experiment(train=TrainConfig(seed=7), models=("no_defense:defense=none", "defend:seed=1"))


def test_figures_are_the_papers() -> None:
    assert_refused(lambda: experiment(figures=("fig3",)), "figures", "fig3", "fig2, fig5, fig6, fig7, fig8")
    assert_refused(lambda: experiment(seeds=0), "seeds", 0, "at least 1")


def test_levels_that_the_images_do_not_have_are_refused_also_without_defend() -> None:
    with pytest.raises(ConfigError, match=r"pyramids\.levels is 4; it must be 1 to 3"):
        Experiment(
            name="x",
            models=("a:defense=none",),
            pyramids=PyramidConfig(levels=4),
            evaluation=EvaluationConfig(threat_models=("white_box",)),
        )
