"""What a training step computes: recipes, schedules, optimisers, averages, each against PyTorch's own or a formula."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn import functional
from training_runs import HARD, TINY, images, losses, run

import fastvit
from fastvit.data import Augmentation, Batches
from fastvit.training import RECIPES, Recipe, TrainingError, train
from fastvit.training.average import Average
from fastvit.training.log import read_log
from fastvit.training.optimizer import make_optimizer
from fastvit.training.schedule import learning_rate


def test_the_recipes_are_the_papers() -> None:
    pretrain, finetune = RECIPES["pretrain"], RECIPES["finetune"]
    assert (pretrain.optimizer, pretrain.betas, pretrain.batch_size) == ("adamw", (0.9, 0.999), 4096)
    assert (pretrain.epochs, pretrain.lr, pretrain.warmup_steps) == (300, 3e-3, 10_000)
    assert (pretrain.weight_decay, pretrain.dropout, pretrain.clip, pretrain.schedule) == (0.3, 0.1, 1.0, "cosine")
    assert (finetune.optimizer, finetune.momentum, finetune.batch_size) == ("sgd", 0.9, 512)
    assert (finetune.weight_decay, finetune.clip, finetune.schedule) == (0.0, 1.0, "cosine")
    assert (finetune.steps, finetune.dropout) == (10_000, 0.0)
    assert finetune.lr in (0.001, 0.003, 0.01, 0.03)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0.0}, "lr must be a number > 0, got 0.0"),
        ({"lr": math.nan}, "lr"),
        ({"optimizer": "adam"}, "optimizer must be one of sgd, adamw, got 'adam'"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, constant"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 10, "accumulate": 3}, "accumulate must be a divisor of batch_size 10, got 3"),
        ({"steps": 0}, "one of steps and epochs"),
        ({"steps": 5, "epochs": 2.0}, "one of steps and epochs"),
        ({"steps": 400}, "warmup_steps must be below steps 400, got 500"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"mixup": -1.0}, "mixup"),
        ({"seed": 1.5}, "seed must be an integer >= 0"),
        ({"flip": 1}, "flip must be True or False"),
        ({"keep": 0}, "keep must be an integer >= 1"),
    ],
)
def test_a_wrong_option_is_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RECIPES["finetune"].override(**wrong)


def test_overriding() -> None:
    assert RECIPES["pretrain"].override(steps=20_000).epochs == 0
    assert RECIPES["finetune"].override(epochs=3.0).steps == 0
    with pytest.raises(TypeError, match="unknown recipe option 'batchsize'; expected one of batch_size"):
        RECIPES["finetune"].override(batchsize=3)
    assert all(field.metadata["help"] for field in dataclasses.fields(Recipe))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warm", [0, 7])
def test_the_rate_is_what_torchs_schedulers_make(schedule: str, warm: int) -> None:
    steps, lr = 40, 0.37
    recipe = RECIPES["finetune"].override(lr=lr, schedule=schedule, warmup_steps=warm, steps=steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    lr_scheduler = torch.optim.lr_scheduler
    after: torch.optim.lr_scheduler.LRScheduler = {
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, steps - warm),
        "linear": lambda: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps - warm),
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, 1.0),
    }[schedule]()
    for step in range(warm):
        assert learning_rate(recipe, step, steps) == pytest.approx(lr * (step + 1) / warm, rel=1e-12)
    for step in range(warm, steps):
        assert learning_rate(recipe, step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        after.step()


def test_weight_decay_is_for_matrices_alone() -> None:
    model = fastvit.VisionTransformer(TINY, init_values=1e-3, num_classes=3, reg_tokens=2)
    optimizer = make_optimizer(model, RECIPES["pretrain"])
    named = {id(p): name for name, p in model.named_parameters()}
    groups = {g["weight_decay"]: {named[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert set(groups) == {0.3, 0.0}
    matrices = ("patch_embed.proj.weight", "qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight", "head.weight")
    assert {name for name in named.values() if name.endswith(matrices)} == groups[0.3]
    assert {"pos_embed", "cls_token", "reg_token", "blocks.0.norm1.weight", "blocks.0.ls1.gamma"} < groups[0.0]
    assert len(groups[0.3]) + len(groups[0.0]) == len(named)
    frozen = fastvit.VisionTransformer(TINY).requires_grad_(False)
    frozen.head.requires_grad_(True)
    assert sum(len(g["params"]) for g in make_optimizer(frozen, RECIPES["finetune"]).param_groups) == 2


def test_the_average_is_its_formula() -> None:
    torch.manual_seed(3)
    layer = torch.nn.Linear(5, 4)
    average, want = Average(layer, 0.9), {n: p.detach().double() for n, p in layer.named_parameters()}
    for _ in range(20):
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.randn_like(p))
        average.update()
        want = {n: 0.9 * want[n] + 0.1 * p.detach().double() for n, p in layer.named_parameters()}
    for name, tensor in average.tensors.items():
        torch.testing.assert_close(tensor.double(), want[name], rtol=1e-5, atol=1e-6)
    own = copy.deepcopy(layer.state_dict())
    with average.in_place():
        assert all(torch.equal(p, average.tensors[n]) for n, p in layer.named_parameters())
    assert all(torch.equal(t, own[n]) for n, t in layer.state_dict().items())


def plain_loop(recipe: Recipe, steps: int) -> tuple[list[float], list[float], torch.nn.Module]:
    """The same training as its recipe says it, in a few lines of eager PyTorch: losses, norms and averaged weights."""
    torch.manual_seed(recipe.seed)
    model = fastvit.VisionTransformer(TINY, num_classes=3, weight_init="jax")
    bare = {"pos_embed", "cls_token"}
    groups = [
        {"params": [p for n, p in model.named_parameters() if p.dim() > 1 and n not in bare]},
        {"params": [p for n, p in model.named_parameters() if p.dim() == 1 or n in bare], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=recipe.betas, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay)

    def rate(k: int) -> float:
        if k < recipe.warmup_steps:
            return recipe.lr * (k + 1) / recipe.warmup_steps
        return recipe.lr / 2 * (1 + math.cos(math.pi * (k - recipe.warmup_steps) / (steps - recipe.warmup_steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    augmentation = Augmentation(flip=True, mixup=recipe.mixup)
    batches = Batches(
        images(), recipe.batch_size, size=(32, 32), train=True, augmentation=augmentation, seed=recipe.seed
    )
    found: list[float] = []
    norms: list[float] = []
    epoch = 0
    with fastvit.backend("reference"):
        while len(found) < steps:
            for x, y in batches.epoch(epoch):
                loss = functional.cross_entropy(model((x / 255 - 0.5) / 0.5), y, label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip).item())
                optimizer.step()
                scheduler.step()
                averaged.update_parameters(model)
                found.append(loss.item())
            epoch += 1
    return found[:steps], norms[:steps], averaged.module


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "pretrain", "lr": 3e-3, "mixup": 0.4, "label_smoothing": 0.1},
        {"recipe": "finetune", "lr": 0.05, "weight_decay": 0.01, "clip": 0.5, "seed": 3},
    ],
    ids=["adamw", "sgd"],
)
def test_a_run_is_the_loop_that_its_recipe_describes(tmp_path, options: dict) -> None:
    options = {
        "steps": 20,
        "batch_size": 16,
        "warmup_steps": 5,
        "dropout": 0.0,
        "crop_scale": None,
        "ema": 0.9,
        **options,
    }
    trained = train(images(), tmp_path, model=TINY, eval_every=0, device="cpu", **options)
    name = options.pop("recipe")
    want, norms, averaged = plain_loop(RECIPES[name].override(**options), 20)
    got = losses(tmp_path)
    assert [step for step, _, _ in got] == list(range(1, 21))
    assert [loss for _, loss, _ in got] == pytest.approx(want, rel=1e-4)
    assert [norm for _, _, norm in got] == pytest.approx(norms, rel=1e-3)
    assert want[-1] < want[0]
    for (key, ours), theirs in zip(trained.model.state_dict().items(), averaged.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=key)


def test_accumulation_equals_the_big_batch(tmp_path) -> None:
    same = {"dropout": 0.0, "drop_path": 0.0, "steps": 12}
    run(tmp_path / "whole", **same)
    run(tmp_path / "parts", **same, accumulate=4, grad_checkpointing=True)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [loss for _, loss, _ in parts] == pytest.approx([loss for _, loss, _ in whole], rel=1e-5)
    assert [norm for _, _, norm in parts] == pytest.approx([norm for _, _, norm in whole], rel=1e-4)


def test_runs_repeat_to_the_bit_and_leave_the_callers_random_numbers(tmp_path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    run(tmp_path / "a", steps=8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    run(tmp_path / "b", steps=8, eval_every=3)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    run(tmp_path / "c", steps=8, seed=1)
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_dropout_goes_where_the_paper_puts_it(tmp_path) -> None:
    config = run(tmp_path, steps=5, dropout=0.25).model.config
    assert (config.proj_drop_rate, config.pos_drop_rate, config.drop_path_rate) == (0.25, 0.25, 0.2)
    assert (config.attn_drop_rate, config.drop_rate, config.patch_drop_rate) == (0.0, 0.0, 0.0)


def test_losses_on_the_kernels_are_those_of_eager(tmp_path) -> None:
    options = {"model": "vit_nano_patch8_32", "recipe": "pretrain", "steps": 12, "batch_size": 16, "warmup_steps": 4}
    options |= {"dropout": 0.0, "crop_scale": None, "lr": 1e-3, "test": None, "device": "cpu"}
    for backend in ("auto", "reference"):
        train("digits", tmp_path / backend, backend=backend, **options)
    fused, eager = losses(tmp_path / "auto"), losses(tmp_path / "reference")
    assert [loss for _, loss, _ in fused] == pytest.approx([loss for _, loss, _ in eager], rel=1e-4)


def test_bfloat16_autocast_trains(tmp_path) -> None:
    run(tmp_path / "float32", steps=16)
    run(tmp_path / "bfloat16", steps=16, dtype="bfloat16")
    want, got = (losses(tmp_path / name)[-1][1] for name in ("float32", "bfloat16"))
    assert got == pytest.approx(want, rel=0.02)
    assert got != want


def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_checkpoint(tmp_path) -> None:
    wild = {"optimizer": "sgd", "lr": 1e6, "clip": 0.0, "warmup_steps": 1, "checkpoint_every": 1, "keep": 1}
    with pytest.raises(
        TrainingError, match=r"the loss is (nan|inf) at step \d+ .*the last checkpoint is .*step-0000\d+"
    ):
        run(tmp_path, **wild, schedule="constant")
    assert not (tmp_path / "model.safetensors").exists()
    rows = read_log(tmp_path / "log.csv")
    assert all(math.isfinite(row["loss"]) for row in rows)
    model = fastvit.training.load_run(tmp_path)
    assert all(p.isfinite().all() for p in model.parameters())


def test_epochs_and_their_warm_up(tmp_path) -> None:
    trained = run(tmp_path / "a", steps=0, epochs=0.5, warmup_steps=2)
    assert trained.steps == 5
    assert read_log(tmp_path / "a" / "log.csv")[-1]["epoch"] == 0.5
    with pytest.raises(TrainingError, match=r"warmup_steps must be below the 5 steps of 0\.5 epochs of 10, got 5"):
        run(tmp_path / "b", steps=0, epochs=0.5, warmup_steps=5)
    assert not (tmp_path / "b").exists()


def test_images_that_cannot_be_trained_on(tmp_path) -> None:
    with pytest.raises(TrainingError, match="batch_size 100 is more than the 80 images"):
        run(tmp_path / "a", batch_size=100)
    with pytest.raises(TrainingError, match="4 classes, the others 3"):
        run(tmp_path / "a", test=images(8, classes=4))
    with pytest.raises(ValueError, match="resume must be one of auto, never, must"):
        run(tmp_path / "a", resume="yes")
    assert not (tmp_path / "a").exists()
    assert HARD["batch_size"] == 8
