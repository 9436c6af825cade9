"""Linear classifiers on frozen features, against scikit-learn's, numpy's least squares and by-hand counts."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from training_runs import TINY, images

import fastvit
from fastvit.training import TrainingError, evaluate, few_shot, linear_probe
from fastvit.training.probes import features, logistic, ridge


def data(n: int = 40, width: int = 7, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    scale = torch.linspace(0.01, 100, width)
    return (torch.randn(n, width, generator=made) + labels[:, None] * 0.7) * scale + 5 * scale, labels


def standardised(x: torch.Tensor) -> np.ndarray:
    wide = x.double().numpy()
    return (wide - wide.mean(0)) / wide.std(0)


@pytest.mark.parametrize("n", [40, 5])  # fewer images than features, too
def test_ridge_is_regularised_least_squares_to_plus_and_minus_one(n: int) -> None:
    x, labels = data(n)
    l2 = 0.3
    targets = np.where(np.arange(3) == labels.numpy()[:, None], 1.0, -1.0)
    layer = ridge(x, labels, 3, l2)
    theirs = Ridge(alpha=l2 * n).fit(standardised(x), targets)
    np.testing.assert_allclose(layer(x).numpy(), theirs.predict(standardised(x)), rtol=1e-8, atol=1e-8)
    # the same as least squares on rows that pull the weights to zero
    rows = np.vstack([standardised(x), np.sqrt(l2 * n) * np.eye(x.shape[1])])
    wanted = np.vstack([targets - targets.mean(0), np.zeros((x.shape[1], 3))])
    solution = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(layer.weight.numpy(), solution, rtol=1e-8, atol=1e-10)


def test_logistic_is_multinomial_regression() -> None:
    x, labels = data()
    l2 = 0.02
    layer = logistic(x, labels, 3, l2)
    theirs = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=5000).fit(standardised(x), labels.numpy())
    got = layer(x).softmax(1).numpy()
    np.testing.assert_allclose(got, theirs.predict_proba(standardised(x)), rtol=1e-3, atol=1e-4)


def test_a_feature_without_spread_and_features_that_are_no_numbers() -> None:
    x, labels = data()
    x[:, 2] = 3.0
    assert ridge(x, labels, 3)(x).isfinite().all()
    assert logistic(x, labels, 3)(x + 1.0).isfinite().all()
    x[3, 1] = torch.nan
    for fit in (ridge, logistic):
        with pytest.raises(ValueError, match="not all finite"):
            fit(x, labels, 3)
        with pytest.raises(ValueError, match="l2 must be positive, got 0"):
            fit(x, labels, 3, 0.0)


def test_features_are_what_the_head_gets() -> None:
    model = fastvit.VisionTransformer(TINY, num_classes=3, drop_rate=0.5, proj_drop_rate=0.5).train()
    source = images(20)
    x, labels = features(model, source, batch_size=7)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = model(source.images)
    torch.testing.assert_close(x @ model.head.weight.detach().T + model.head.bias.detach(), logits)
    assert torch.equal(labels, source.labels)
    with pytest.raises(TrainingError, match="Linear has no forward_features"):
        features(torch.nn.Linear(2, 2), source, size=(32, 32))


def test_few_shots_and_the_linear_probe_tell_bright_from_dark() -> None:
    model, test = fastvit.VisionTransformer(TINY, num_classes=0), images(60, seed=1)
    probed = linear_probe(model, images(), test)
    assert (probed.images, probed.top5) == (60, 1.0)
    assert probed.top1 > 0.9
    few = few_shot(model, images(), test, shots=4)
    assert few.top1 > 0.6
    assert few != few_shot(model, images(), test, shots=4, seed=1)
    assert few == few_shot(model, images(), test, shots=4)
    with pytest.raises(TrainingError, match=r"shots, but 'class \d' has \d+ images"):
        few_shot(model, images(), test, shots=40)
    with pytest.raises(ValueError, match="shots must be an integer >= 1, got 0"):
        few_shot(model, images(), test, shots=0)
    with pytest.raises(TrainingError, match="the same classes"):
        linear_probe(model, images(), images(8, classes=4))


def test_top1_and_top5_are_counted() -> None:
    source = images(30, classes=8)
    made = torch.Generator().manual_seed(2)
    table = torch.randn(30, 8, generator=made)
    rank = (table > table.gather(1, source.labels[:, None])).sum(1)
    position = 0

    def model(x: torch.Tensor) -> torch.Tensor:
        nonlocal position
        assert torch.equal(x, source.images[position : position + len(x)])
        position += len(x)
        return table[position - len(x) : position]

    found = evaluate(model, source, size=(32, 32), batch_size=7)
    assert found.images == 30
    assert found.top1 == pytest.approx((rank == 0).double().mean().item())
    assert found.top5 == pytest.approx((rank < 5).double().mean().item())
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(table, source.labels).item(), rel=1e-6)


def test_models_that_cannot_be_evaluated() -> None:
    with pytest.raises(TrainingError, match="function does not say its images' size"):
        evaluate(lambda x: x, images(4))
    with pytest.raises(TrainingError, match=r"must give logits \(B, K\), got \(4, 3, 32, 32\)"):
        evaluate(lambda x: x, images(4), size=(32, 32))
    with pytest.raises(TrainingError, match="label 2, but the model has 2 classes"):
        evaluate(fastvit.VisionTransformer(TINY, num_classes=2), images(30))
