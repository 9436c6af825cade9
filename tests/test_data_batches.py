"""Batches: a function of seed, epoch, step and rank, whoever decodes and wherever they start; augmented as said."""

import gc
import math
import pickle
import random
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from fastvit.data import Augmentation, Batches, DataError, InMemory
from fastvit.data.augment import RATIO, crop_box

PLAIN = Augmentation()
ALL = Augmentation(crop_scale=(0.3, 1.0), flip=True, shift=2, mixup=0.4, cutmix=0.7)


# bicubic stays within 0 .. 255, where torch and pillow clip it between one direction and the other in different orders
GREYISH = (80, 176)


class Listed:
    """Images of any size by number, as a folder gives them; `broken` cannot be read."""

    def __init__(self, count=20, classes=5, broken=-1, sizes=((9, 7), (6, 6), (5, 11)), pixels=(0, 256)):
        rng = np.random.default_rng(0)
        self.name, self.classes, self.broken = "listed", [str(n) for n in range(classes)], broken
        self.images = [
            torch.from_numpy(rng.integers(*pixels, (3, *sizes[n % len(sizes)]), dtype=np.uint8)) for n in range(count)
        ]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == self.broken:
            raise DataError(f"image-{index}.png: unreadable")
        return self.images[index], index % len(self.classes)


def in_memory(count=20, size=(8, 8), classes=5):
    """Pixels follow from a seed; the first pixel of each image is its number."""
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    images[:, :, 0, 0] = torch.arange(count, dtype=torch.uint8)[:, None]
    return InMemory("pixels", [str(n) for n in range(classes)], images, torch.arange(count) % classes)


def batches(source, batch_size=4, size=(8, 8), train=True, augmentation=PLAIN, **options):
    return Batches(source, batch_size, size=size, train=train, augmentation=augmentation, **options)


def assert_same(actual, expected):
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    for (image, target), (wanted, of_wanted) in zip(actual, expected, strict=True):
        assert image.dtype == torch.uint8 and image.is_contiguous()
        assert torch.equal(image, wanted) and torch.equal(target, of_wanted)


# forking many threads is safe here: a worker computes with one thread and never on a GPU
@pytest.mark.parametrize("source", [Listed(), in_memory()], ids=["listed", "in_memory"])
@pytest.mark.parametrize("augmentation", [PLAIN, ALL], ids=["plain", "augmented"])
def test_workers_and_starts_make_no_difference(source, augmentation):
    torch.randn(256, 256) @ torch.randn(256, 256)  # torch's threads have run before the fork
    alone, helped = (batches(source, augmentation=augmentation, seed=5, workers=workers) for workers in (0, 2))
    whole = {epoch: list(alone.epoch(epoch)) for epoch in (0, 1)}
    for epoch, start in ((0, 0), (1, 0), (1, 3), (0, 2), (0, 5)):
        assert_same(helped.epoch(epoch, start), whole[epoch][start:])
        assert_same(alone.epoch(epoch, start), whole[epoch][start:])
    abandoned = helped.epoch(0)
    assert_same([next(abandoned)], whole[0][:1])
    assert_same(helped.epoch(1), whole[1])
    assert_same(batches(source, augmentation=augmentation, seed=5).epoch(1), whole[1])


@pytest.mark.parametrize("augmentation", [PLAIN, replace(ALL, mixup=0, cutmix=0)], ids=["plain", "augmented"])
@pytest.mark.parametrize("source", [Listed(23), in_memory(23)], ids=["listed", "in_memory"])
def test_ranks_share_what_one_process_sees(source, augmentation):
    one = list(batches(source, 6, augmentation=augmentation).epoch(2))
    ranks = [list(batches(source, 2, augmentation=augmentation, rank=r, world=3).epoch(2)) for r in range(3)]
    assert len(one) == 3
    for step, whole in enumerate(one):
        parts = [rank[step] for rank in ranks]
        assert_same([(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))], [whole])


def test_every_image_once_in_an_order_of_its_own():
    source = in_memory(40)
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        orders[seed, epoch] = torch.cat([x[:, 0, 0, 0] for x, _ in batches(source, seed=seed).epoch(epoch)]).tolist()
        assert sorted(orders[seed, epoch]) == list(range(40))
    assert len({tuple(order) for order in orders.values()}) == 4
    firsts = [next(batches(source, 1, seed=s).epoch(0))[0][0, 0, 0, 0].item() for s in range(200)]
    assert len(set(firsts)) > 35  # of 40, any of which comes first with the same chance


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("source", [Listed(11), in_memory(11)], ids=["listed", "in_memory"])
def test_evaluation_covers_every_image_once_and_in_order(source, world):
    ranks = [
        list(batches(source, 2, train=False, augmentation=ALL, rank=r, world=world).epoch(0)) for r in range(world)
    ]
    steps = math.ceil(11 / (2 * world))
    assert [len(rank) for rank in ranks] == [steps] * world
    labels = [label for step in range(steps) for rank in ranks for label in rank[step][1].tolist()]
    assert labels == [n % 5 for n in range(11)]
    for image, label in (batch for rank in ranks for batch in rank):
        assert image.shape == (len(label), 3, 8, 8) and image.dtype == torch.uint8 and label.dtype == torch.int64
    assert_same(batches(source, 2, train=False, seed=9).epoch(7), batches(source, 2, train=False).epoch(0))


def test_the_global_generators_are_neither_read_nor_changed():
    source = Listed()
    for workers in (0, 2):
        seen = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
            seen.append(list(batches(source, augmentation=ALL, workers=workers).epoch(0)))
            after = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
            assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
        assert_same(*seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read(workers):
    made = batches(Listed(broken=9), train=False, workers=workers)
    found = made.epoch(0)
    next(found), next(found)
    with pytest.raises(DataError, match=r"^image-9.png: unreadable$"):
        next(found)
    assert_same(made.epoch(0, start=3), batches(Listed(), train=False).epoch(0, start=3))


def test_the_error_does_not_hold_itself():
    """What only a garbage collection frees, workers among it, is waited for."""
    gc.disable()
    try:
        next(batches(Listed(broken=0), train=False).epoch(0))
    except DataError as error:
        held = weakref.ref(error)
    finally:
        gc.enable()
    assert held() is None


def test_a_label_without_a_class_and_an_image_too_elongated():
    source = Listed()
    source.classes = ["0", "1"]
    source.__class__ = type("Wrong", (Listed,), {"__getitem__": lambda self, index: (self.images[index], index)})
    with pytest.raises(DataError, match="listed: image 2 has label 2, expected 0 to 1"):
        list(batches(source, train=False).epoch(0))
    with pytest.raises(DataError, match="listed: image 0: 600000 x 1 pixels are too elongated"):
        list(batches(Listed(sizes=((1, 600000),)), train=False, size=(16, 16)).epoch(0))


def test_flips_and_shifts_are_what_they_say():
    source, size = in_memory(400, (6, 5)), (6, 5)
    assert len(source.images[:, 0].flatten(1).unique(dim=0)) == 400
    plain = torch.cat([x for x, _ in batches(source, 50, size).epoch(3)])
    flipped = torch.cat([x for x, _ in batches(source, 50, size, augmentation=Augmentation(flip=True)).epoch(3)])
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and 160 < sum(mirrored) < 240
    moved = torch.cat([x for x, _ in batches(source, 50, size, augmentation=Augmentation(shift=2)).epoch(3)])
    found = []
    for image, window in zip(functional.pad(plain, (2, 2, 2, 2)), moved, strict=True):
        at = [(y, x) for y in range(5) for x in range(5) if torch.equal(image[:, y : y + 6, x : x + 5], window)]
        assert len(at) == 1
        found += at
    counts = torch.zeros(5, 5)
    for y, x in found:
        counts[y, x] += 1
    assert counts.min() >= 4 and counts.max() <= 36  # 16 of each place are expected
    again = torch.cat([x for x, _ in batches(source, 50, size, augmentation=Augmentation(shift=2)).epoch(4)])
    assert not torch.equal(again.sort(0).values, moved.sort(0).values)


@pytest.mark.parity
def test_crops_are_distributed_as_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    for height, width, scale in (
        (40, 60, (0.08, 1.0)),
        (30, 30, (0.5, 0.9)),
        (10, 100, (0.2, 1.0)),
        (90, 9, (0.9, 1.0)),
    ):
        rng, image = np.random.default_rng(1), torch.empty(3, height, width)
        ours = torch.tensor([crop_box(height, width, scale, rng) for _ in range(600)]).double()
        theirs = torch.tensor(
            [transforms.RandomResizedCrop.get_params(image, scale, RATIO) for _ in range(600)]
        ).double()
        assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
        assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
        for of_ours, of_theirs in zip(ours.T, theirs.T, strict=True):
            deviation = max(of_theirs.std(), of_ours.std()) / 600**0.5
            assert abs(of_ours.mean() - of_theirs.mean()) <= 5 * 2**0.5 * deviation
            assert abs(of_ours.std() - of_theirs.std()) <= 5 * 2**0.5 * deviation


def test_a_crops_aspect_ratio_is_log_uniform():
    rng = np.random.default_rng(0)
    boxes = torch.tensor([crop_box(1000, 1000, (0.2, 0.4), rng) for _ in range(3000)]).double()
    logarithms = (boxes[:, 3] / boxes[:, 2]).log() / math.log(4 / 3)  # uniform in -1 .. 1
    assert abs(logarithms.mean()) < 5 * (1 / 3) ** 0.5 / 3000**0.5
    assert abs(logarithms.std() - (1 / 3) ** 0.5) < 0.02


def test_a_crop_is_resized_as_pillow_does():
    """Of an image whose rows and columns tell where a crop lies, and its crop cut and resized by pillow."""
    source = Listed(200, sizes=((40, 52),), pixels=GREYISH)
    made = batches(source, 4, (16, 16), augmentation=Augmentation(crop_scale=(0.2, 0.8)), seed=3)
    order = np.random.default_rng((3, 1, 0)).permutation(200)
    images = torch.cat([x for x, _ in made.epoch(1)])
    differences = []
    for image, index in zip(images[:40], order, strict=False):
        top, left, high, wide = crop_box(40, 52, (0.2, 0.8), np.random.default_rng((3, 1, 2, index)))
        whole = Image.fromarray(source.images[index].permute(1, 2, 0).numpy())
        crop = whole.crop((left, top, left + wide, top + high)).resize((16, 16), Image.Resampling.BICUBIC)
        differences.append(np.abs(np.asarray(crop).astype(int) - image.permute(1, 2, 0).numpy()).max())
    assert max(differences) <= 1


@pytest.mark.parity
@pytest.mark.parametrize(
    ("size", "crop_pct", "resample"),
    [((24, 24), 1.0, "bicubic"), ((24, 24), 0.875, "bilinear"), ((17, 17), 0.9, "bicubic"), ((20, 32), 0.8, "bicubic")],
)
def test_evaluation_is_timms(size, crop_pct, resample):
    create = pytest.importorskip("timm.data").create_transform
    source = Listed(6, sizes=((40, 52), (33, 33), (61, 25), (18, 90)), pixels=GREYISH)
    theirs = create(
        (3, *size), is_training=False, interpolation=resample, crop_pct=crop_pct, mean=(0, 0, 0), std=(1, 1, 1)
    )
    made = batches(source, 6, size, train=False, resample=resample, crop_pct=crop_pct)
    for ours, image in zip(next(made.epoch(0))[0], source.images, strict=True):
        wanted = (theirs(Image.fromarray(image.permute(1, 2, 0).numpy())) * 255).round()
        assert (ours.float() - wanted).abs().max() <= 1


def test_images_of_the_size_stay_as_they_are_and_both_kinds_of_source_agree():
    source = in_memory(12, (8, 8))
    slow = Listed(12)
    slow.images = list(source.images)
    for size in ((8, 8), (12, 12), (6, 9)):
        assert_same(*(batches(s, 5, size, train=False, crop_pct=0.9).epoch(0) for s in (source, slow)))
        for changed in (PLAIN, replace(ALL, crop_scale=None), ALL):
            assert_same(*(batches(s, 5, size, augmentation=changed).epoch(1) for s in (source, slow)))
    kept = torch.cat([x for x, _ in batches(source, 5, train=False, crop_pct=0.5).epoch(0)])
    assert torch.equal(kept, source.images)


def mixed_and_plain(augmentation, batch_size, steps, size=(8, 6), **options):
    source = in_memory(batch_size * steps, size, 7)
    return zip(
        batches(source, batch_size, size, augmentation=augmentation, **options).epoch(0),
        batches(source, batch_size, size, **options).epoch(0),
        strict=True,
    )


@pytest.mark.parametrize("batch_size", [5, 6])
def test_mixup_is_its_equation(batch_size):
    lambdas = []
    for (images, targets), (plain, labels) in mixed_and_plain(Augmentation(mixup=0.8), batch_size, 40):
        one_hot = functional.one_hot(labels, 7).double()
        pairs = [n for n in range(batch_size) if labels[n] != labels[batch_size - 1 - n]]
        if not pairs:
            continue
        assert targets.dtype == torch.float32 and targets.shape == (batch_size, 7)
        lam = float(targets[pairs[0], labels[pairs[0]]])  # what the targets say, the images must have done
        lambdas.append(lam)
        torch.testing.assert_close(targets.double(), lam * one_hot + (1 - lam) * one_hot.flip(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(targets.sum(1), torch.ones(batch_size), atol=1e-6, rtol=0)
        exact = lam * plain.double() + (1 - lam) * plain.double().flip(0)
        assert images.dtype == torch.uint8 and (images.double() - exact).abs().max() <= 0.5 + 1e-4
    lambdas = torch.tensor(lambdas)
    assert len(lambdas.unique()) == len(lambdas) > 35
    assert abs(lambdas.mean() - 0.5) < 0.2 and abs(lambdas.std() - (0.25 / 2.6) ** 0.5) < 0.1  # of Beta(0.8, 0.8)


def test_cutmix_is_its_equation():
    shares = []
    for (images, targets), (plain, labels) in mixed_and_plain(Augmentation(cutmix=1.0), 6, 60, (12, 10)):
        partner, one_hot = plain.flip(0), functional.one_hot(labels, 7).float()
        inside = ((images == partner) & (images != plain)).any(1).any(0)  # where a pixel shows that it came from there
        assert ((images == plain) | (images == partner)).all()
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        box = torch.zeros_like(inside)
        if len(rows):
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        assert torch.equal(images, torch.where(box, partner, plain))
        lam = 1 - float(box.double().mean())
        torch.testing.assert_close(targets, lam * one_hot + (1 - lam) * one_hot.flip(0), atol=1e-6, rtol=0)
        shares.append(lam)
    assert (
        len(set(shares)) > 20 and 0.5 < np.mean(shares) < 0.85
    )  # borders cut boxes: more than Beta(1, 1)'s half is left


@pytest.mark.parity
def test_mixing_is_timms(monkeypatch):
    """timm's collate with the same λ and the same box."""
    collate = pytest.importorskip("timm.data.mixup")
    from fastvit.data.mix import Mix

    source = in_memory(6, (12, 10), 7)
    for lam, box in ((0.3, None), (0.75, None), (1.0, None), (0.9, (3, 6, 0, 4))):
        mixup = collate.FastCollateMixup(label_smoothing=0.0, num_classes=7)
        monkeypatch.setattr(mixup, "_params_per_batch", lambda lam=lam, box=box: (lam, box is not None))
        monkeypatch.setattr(collate, "cutmix_bbox_and_lam", lambda *_, lam=lam, box=box, **__: (box, lam))
        images, targets = mixup([(source.images[n].numpy(), int(source.labels[n])) for n in range(6)])
        ours, of_ours = Mix(lam, box)(source.images, source.labels, 7)
        assert torch.equal(ours, images)
        torch.testing.assert_close(of_ours, targets)


def test_ranks_mix_alike_and_within_themselves():
    source, both = in_memory(96, classes=96), Augmentation(mixup=1.0, cutmix=1.0)
    plain, mixed = (
        [batches(source, 4, augmentation=a, rank=r, world=2).epoch(0) for r in (0, 1)] for a in (PLAIN, both)
    )
    seen = set()
    for first, second, (of_first, _), (of_second, _) in zip(*mixed, *plain, strict=True):
        assert torch.equal(first[1].sort(1).values, second[1].sort(1).values)  # one λ for both
        assert not {*first[1].nonzero()[:, 1].tolist()} & {*second[1].nonzero()[:, 1].tolist()}
        cut = [
            bool(((mixed == whole) | (mixed == whole.flip(0))).all())
            for mixed, whole in ((first[0], of_first), (second[0], of_second))
        ]
        assert cut[0] == cut[1]
        seen.add(cut[0])
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"size": (8, 0)}, "width must be a whole number of at least 1"),
        ({"workers": -1}, "workers must be"),
        ({"seed": -1}, "seed must be"),
        ({"rank": 2, "world": 2}, "rank must be below world, got rank 2 of 2"),
        ({"resample": "nearest"}, r"resample must be one of \('bilinear', 'bicubic'\), got 'nearest'"),
        ({"crop_pct": 0.0}, "crop_pct must be"),
    ],
)
def test_arguments_refused(changed, message):
    with pytest.raises(ValueError, match=f"^fastvit.data: {message}"):
        batches(in_memory(), **changed)


def test_augmentations_and_epochs_refused():
    for wrong in (
        {"crop_scale": (0.5, 0.2)},
        {"crop_scale": (0.0, 1.0)},
        {"shift": -1},
        {"mixup": -0.1},
        {"cutmix": math.inf},
    ):
        with pytest.raises(ValueError, match=f"^fastvit.data: {next(iter(wrong))} must be"):
            Augmentation(**wrong)
    made = batches(in_memory())
    assert made.steps == 5 and not list(made.epoch(0, start=5))
    for epoch, start in ((-1, 0), (0, -1), (0, 6)):
        with pytest.raises(ValueError, match=r"^fastvit.data: (epoch|start) must be"):
            made.epoch(epoch, start)
    with pytest.raises(DataError, match="pixels: 20 images, but one global batch has 24"):
        batches(in_memory(), 8, world=3)
    with pytest.raises(DataError, match="pixels: 0 images"):
        batches(in_memory(0), train=False)
