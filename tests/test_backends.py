"""The registry: selection, explanation, override, environment; fallbacks that speak once and never after a demand."""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

import fastvit
from fastvit import backends, ops

X = torch.randn(3, 16)


def backend_name(name: str) -> None:
    with fastvit.backend(name):
        pass


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FASTVIT_", "TRITON_INTERPRET"))}
    return subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True, timeout=120
    )


class Fake:
    """A backend that can or cannot, and counts."""

    def __init__(self, reason=None):
        self.reason, self.calls = reason, 0

    def why_not(self, *args):
        return self.reason

    def forward(self, x, residual, layer_scale, weight, bias, eps, sample_scale):
        self.calls += 1
        y, z = ops._PUBLIC["layer_norm"][1].__globals__["reference"](
            x, residual, layer_scale, weight, bias, eps, sample_scale
        )
        statistics = x.new_zeros(x.shape[0])
        return y, z if residual is not None else x.new_empty(0), statistics, statistics.clone()


@pytest.fixture
def fake(monkeypatch):
    def install(reason=None, backend="cpu"):
        implementation = Fake(reason)
        monkeypatch.setattr(backends.Loaded, f"{backend}_layer_norm", implementation, raising=False)
        monkeypatch.setattr(backends, "_reported", set())
        return implementation

    return install


def test_auto_takes_the_first_that_can(fake):
    good = fake()
    ops.layer_norm(X)
    assert good.calls == 1


def test_fallback_says_why_once(fake, caplog):
    refusing = fake("it is Friday")
    with caplog.at_level(logging.WARNING, logger="fastvit"):
        for _ in range(3):
            assert torch.allclose(ops.layer_norm(X), torch.nn.functional.layer_norm(X, (16,), eps=1e-6))
    assert refusing.calls == 0
    assert [r.getMessage() for r in caplog.records] == ["fastvit.layer_norm: cpu is skipped because it is Friday"]


def test_a_demand_never_falls_back(fake):
    fake("it is Friday")
    with (
        fastvit.backend("cpu"),
        pytest.raises(fastvit.BackendError, match=r"layer_norm: backend 'cpu' was requested but it is Friday"),
    ):
        ops.layer_norm(X)


def test_strict_raises_where_auto_would_fall_back(fake, monkeypatch):
    fake("it is Friday")
    monkeypatch.setattr(backends, "SETTINGS", type(backends.SETTINGS)(strict=True))
    with pytest.raises(fastvit.BackendError, match=r"it is Friday \(FASTVIT_STRICT is set\)"):
        ops.layer_norm(X)


def test_disable_leaves_everything_to_the_reference(fake, monkeypatch):
    counting = fake()
    monkeypatch.setattr(backends, "SETTINGS", type(backends.SETTINGS)(disable=True))
    ops.layer_norm(X)
    assert counting.calls == 0


def test_override_nests_and_ends(fake):
    counting = fake()
    with fastvit.backend("reference"):
        ops.layer_norm(X)
        with fastvit.backend("cpu"):
            ops.layer_norm(X)
        ops.layer_norm(X)
        assert backends.requested() == "reference"
    assert counting.calls == 1
    assert backends.requested() == backends._default
    with pytest.raises(RuntimeError, match="boom"), fastvit.backend("reference"):
        raise RuntimeError("boom")
    assert backends.requested() == backends._default


def test_override_is_of_one_thread():
    seen = []
    with fastvit.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested()))
        thread.start()
        thread.join()
    assert seen == [backends._default]


def test_missing_backward_uses_the_references(fake):
    counting = fake()
    x = X.clone().requires_grad_()
    with fastvit.backend("cpu"):
        ops.layer_norm(x).sum().backward()
    assert counting.calls == 1
    assert x.grad is not None


def test_why_not_answers_for_all():
    answers = fastvit.why_not("layer_norm", X)
    assert set(answers) == set(backends.BACKENDS)
    assert answers["reference"] is None
    assert "cuda" in answers["cuda"]
    assert fastvit.why_not("encoder", torch.randn(1, 4, 48), [], 1, backend="triton") == "triton has no encoder kernel"
    with pytest.raises(TypeError, match="int64"):
        fastvit.why_not("layer_norm", X.long())


def test_every_reason_is_one_sentence():
    for name in backends.BACKENDS:
        reason = backends.why_unavailable(name)
        assert reason is None or (reason and "\n" not in reason)
    for op, args in {"layer_norm": (X,), "linear": (X, torch.randn(4, 16))}.items():
        for reason in fastvit.why_not(op, *args).values():
            assert reason is None or "\n" not in reason


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("expected one of auto, reference, triton, cuda, cpu. Did you mean 'cuda'", lambda: backend_name("cudda")),
        ("unknown backend 'mps'", lambda: fastvit.is_available("mps")),
        ("unknown op 'atention'.* Did you mean 'attention'", lambda: fastvit.why_not("atention", X)),
        ("unknown backend 'gpu'", lambda: fastvit.why_not("layer_norm", X, backend="gpu")),
    ],
)
def test_unknown_names_list_the_valid_ones(words, call):
    with pytest.raises(ValueError, match=words):
        call()


PROBE = "import torch, fastvit; from fastvit import backends; print(backends.requested(), backends.SETTINGS.strict)"


def test_environment():
    assert run(PROBE, FASTVIT_BACKEND="reference", FASTVIT_STRICT="1").stdout.split() == ["reference", "True"]
    assert run(PROBE, FASTVIT_STRICT="0").stdout.split() == ["auto", "False"]
    wrong = run(PROBE, FASTVIT_BACKEND="tritn")
    assert wrong.returncode != 0
    assert "unknown backend 'tritn'; expected one of auto, reference" in wrong.stderr
    demand = run("import torch, fastvit; fastvit.ops.layer_norm(torch.ones(2, 4))", FASTVIT_BACKEND="cuda")
    assert "BackendError: fastvit.layer_norm: backend 'cuda' was requested but" in demand.stderr


def test_works_without_triton_and_extension():
    code = """
import sys
sys.modules["triton"] = None
sys.modules["fastvit._C"] = None
import torch, fastvit
model = fastvit.create_model("vit_tiny_patch16_224", depth=1).eval()
print(tuple(model(torch.zeros(1, 3, 224, 224)).shape))
for name in ("triton", "cpu"):
    print(name, fastvit.is_available(name), fastvit.backends.why_unavailable(name))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("(1, 1000)\ntriton False")
    assert "cpu False" in result.stdout
    assert result.stderr.count("patch_embed: cpu is skipped because") == 1


def test_a_call_changes_no_global_state():
    def state():
        return (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.random.get_rng_state().sum().item(),
            torch.is_grad_enabled(),
        )

    before = state()
    model = fastvit.create_model("vit_tiny_patch16_224", depth=1, weight_init="skip", device="meta")
    ops.layer_norm(X)
    assert state() == before
    del model


def test_auto_passes_over_what_nobody_measured(caplog, monkeypatch):
    monkeypatch.setitem(backends._AUTO, "cpu", {"layer_norm": ("triton",)})
    monkeypatch.setattr(backends, "_reported", set())
    assert backends.select("layer_norm", X, None, None, None, None, 1e-6, None) == "reference"
    assert "triton is skipped because it has not been measured on a GPU yet" in caplog.text
