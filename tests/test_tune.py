"""The tuner: what it may try, that it finds the fastest, and that a wrong or broken choice never wins."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from fastvit.benchmarks import choices, op_cases, tune
from fastvit.kernels import _candidates, _tuning

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHIP = "sm_90"


@dataclass(frozen=True)
class Tile:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    ONE_PASS: bool
    num_warps: int
    num_stages: int


TILE = Tile(64, 64, 32, True, num_warps=4, num_stages=3)


def case(op: str = "layer_norm", direction: str = "forward", dtype: str = "float32") -> op_cases.OpCase:
    return op_cases.OpCase(op, 2, 5, 96, 3, 64, dtype, direction, side=16, patch=8)


def clock(seconds: Callable[[], float]) -> tune.Clock:
    """Runs the call, and says that it took what `seconds` makes of the choices in force."""

    def timed(call: Callable[[], object]) -> float:
        call()
        return seconds()

    return timed


def test_neighbours_are_one_step_away_and_keep_what_the_shape_fixes() -> None:
    near = list(_candidates.neighbours(TILE, {}))
    assert len(near) == len(set(near))
    assert TILE not in near
    for one in near:
        assert one.ONE_PASS
        changed = {name for name in vars(TILE) if getattr(one, name) != getattr(TILE, name)}
        assert len(changed) == 1 or (len(changed) == 2 and "num_warps" in changed)
    assert Tile(128, 64, 32, True, 8, 3) in near
    assert Tile(64, 64, 32, True, 4, 4) in near
    assert Tile(64, 64, 32, True, 8, 3) in near
    assert not [one for one in _candidates.neighbours(Tile(1, 1, 1, True, 1, 1), {}) if min(vars(one).values()) < 1]


def test_an_attentions_keys_are_cut_into_other_pieces_that_hold_as_many() -> None:
    @dataclass(frozen=True)
    class Scores:
        BLOCK_M: int
        ROW_TILES: int
        PIECES: tuple[int, ...]
        FULL: int
        WIDTHS: tuple[int, ...]
        ONE_PASS: bool
        num_warps: int

    one = Scores(64, 4, (128, 64, 16), 2, (64,), True, num_warps=8)
    near = set(_candidates.neighbours(one, {}))
    cuts = {(config.PIECES, config.FULL) for config in near if config.PIECES != one.PIECES}
    assert cuts == {((128, 128), 1)}
    assert Scores(128, 2, (128, 64, 16), 2, (64,), True, num_warps=8) in near
    assert {(config.PIECES, config.FULL) for config in near if config.PIECES == one.PIECES} == {(one.PIECES, 2)}
    (merged,) = (config for config in near if config.PIECES == (128, 128))
    cuts = {config.PIECES for config in _candidates.neighbours(merged, {})}
    assert cuts >= {(256,), (128, 64, 64)}
    assert "registers" in str(_candidates.legal(Scores(256, 1, (256,), 0, (64,), True, num_warps=4), CHIP, 2))


def test_neighbours_of_a_tuple_change_one_part() -> None:
    near = list(_candidates.neighbours((TILE, 3), {}))
    assert (TILE, 1) in near
    assert (TILE, 6) in near
    assert all((one[0] == TILE) != (one[1] == 3) for one in near)
    assert list(_candidates.neighbours(1, {})) == [2]
    assert list(_candidates.neighbours(True, {})) == []


@pytest.mark.parametrize(
    ("choice", "chip", "word"),
    [
        (Tile(256, 256, 32, True, 4, 2), CHIP, "registers"),
        (Tile(128, 128, 128, True, 8, 4), CHIP, "shared"),
        (Tile(128, 128, 64, True, 8, 3), "hip", "shared"),
        (Tile(8, 64, 32, True, 4, 2), CHIP, "at least 16"),
        ((TILE, 4), CHIP, None),
        (Tile(128, 128, 64, True, 8, 3), CHIP, None),
        (_tuning.rows(768), CHIP, None),
    ],
)
def test_legal_says_what_does_not_fit(choice: object, chip: str, word: str | None) -> None:
    reason = _candidates.legal(choice, chip, 2)
    assert (reason is None) == (word is None)
    assert word is None or word in str(reason)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "hip"])
def test_what_is_chosen_is_legal(chip: str, itemsize: int) -> None:
    whole = {"ragged": False, "norm": False, "costly": False}
    calls = [SimpleNamespace(rows=n, keys=n, heads=768, cores=132, **whole) for n in (5, 197, 512, 577)]
    for choice in (
        *(_tuning.matmul(chip, itemsize, rows, 768, 3072, aligned) for rows in (1, 50000) for aligned in (True, False)),
        *(
            _tuning.matmul_weight(chip, itemsize, rows, 768, 3072, aligned)
            for rows in (1, 50000)
            for aligned in (True, False)
        ),
        *(_tuning.scores(chip, itemsize, 64, call) for call in calls),
        *(_tuning.score_gradients(chip, itemsize, 64, call) for call in calls),
        *(_tuning.score_gradients_of_queries(chip, itemsize, 64, call) for call in calls),
    ):
        assert _candidates.legal(choice, chip, itemsize) is None, choice


def test_questions_are_seen_and_answered_only_inside() -> None:
    before = {name: value for name, value in vars(_tuning).items() if callable(value)}
    question = choices.Key("rows", tuple(_signature_defaults("rows", width=96)))
    other = _tuning.rows(768)
    asked: dict = {}
    with choices.answering({question: other}, asked):
        assert _tuning.rows(96) == other
        assert _tuning.rows(width=96) == other
        assert _tuning.rows(100) != other
    assert asked[question] == other
    assert len(asked) == 2
    assert {name: value for name, value in vars(_tuning).items() if callable(value)} == before


def _signature_defaults(chooser: str, **given: object) -> list[object]:
    import inspect

    bound = inspect.signature(getattr(_tuning, chooser)).bind(**given)
    bound.apply_defaults()
    return list(bound.arguments.values())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", ["attention", "linear_fc1", "layer_norm"])
def test_every_op_asks_something(op: str, direction: str) -> None:
    questions = tune.Bench(case(op, direction), DEVICE).questions()
    if direction == "forward":
        assert questions
    for key, choice in questions.items():
        assert key.chooser in choices.choosers()
        assert choices.legal_neighbours(key, choice, 4, {}), f"{key} leaves nothing to try"


def climb(seconds: Callable[[], float], monkeypatch: pytest.MonkeyPatch, tried: list[object]) -> tune.Finding:
    """Tune layer_norm's tile with the given candidates and clock, everything else as it is."""
    monkeypatch.setattr(_candidates, "neighbours", lambda choice, asked: iter(tried))
    report = tune.search([case()], DEVICE, clock(seconds), 60.0, jobs=0)
    assert not report.skipped
    (finding,) = report.findings
    return finding


def test_the_fastest_right_candidate_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    key, start = next(iter(tune.Bench(case(), DEVICE).questions().items()))
    slow, fast = (type(start)(**{**vars(start), "num_warps": warps}) for warps in (8, 16))
    # Half a row in one tile is the fastest of all, and wrong.
    wrong = type(start)(**{**vars(start), "BLOCK_D": 64})
    costs = {start: 3e-6, slow: 5e-6, fast: 1e-6, wrong: 1e-7}

    def seconds() -> float:
        return costs[getattr(_tuning, key.chooser)(*key.arguments)]

    finding = climb(seconds, monkeypatch, [slow, wrong, fast])
    assert (finding.before, finding.after) == (start, fast)
    assert (finding.before_s, finding.after_s) == (3e-6, 1e-6)
    assert finding.tried == 2
    assert "output" in finding.refused[repr(wrong)]
    text = finding.line()
    assert "1.0 us" in text
    assert "was 3.0 us, best of 3" in text
    literal = text.splitlines()[1]
    names = {type(fast).__name__: type(fast)}
    assert eval(f"{{{literal}}}", names) == {(key.chooser, *key.arguments): fast}
    told = json.loads(tune.as_json(tune.Report([finding]), DEVICE))
    assert told["findings"][0]["after"] == repr(fast)
    assert told["torch"] == torch.__version__


def test_noise_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    key, start = next(iter(tune.Bench(case(), DEVICE).questions().items()))
    other = type(start)(**{**vars(start), "num_warps": 8})

    def seconds() -> float:
        return 0.99e-6 if getattr(_tuning, key.chooser)(*key.arguments) == other else 1e-6

    finding = climb(seconds, monkeypatch, [other])
    assert finding.after == finding.before == start
    assert "as it was" in finding.line()


def test_a_candidate_that_raises_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    start = next(iter(tune.Bench(case(), DEVICE).questions().values()))
    broken = type(start)(**{**vars(start), "BLOCK_D": 3})  # tl.arange takes powers of two
    finding = climb(lambda: 1e-6, monkeypatch, [broken])
    assert finding.tried == 0
    assert finding.refused[repr(broken)]
    assert finding.after == start


def test_no_time_means_no_search() -> None:
    report = tune.search([case()], DEVICE, clock(lambda: 1.0), 0.0, jobs=0)
    assert report.findings == []
    assert list(report.skipped.values()) == [tune.OUT_OF_TIME]


def test_a_kernel_that_is_wrong_as_it_stands_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    start = next(iter(tune.Bench(case(), DEVICE).questions().values()))
    monkeypatch.setattr(_tuning, "rows", lambda *_: type(start)(**{**vars(start), "BLOCK_D": 64}))
    told: list[str] = []
    report = tune.search([case()], DEVICE, clock(lambda: 1.0), 60.0, jobs=0, tell=told.append)
    assert report.findings == []
    assert "output" in told[0]


def test_spills_of_every_launch_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    class Compiled:
        def __init__(self, n_spills: int) -> None:
            self.n_spills = n_spills

    def launch(kernel: object, n: int) -> Compiled:
        return Compiled(n)

    monkeypatch.setattr(JITFunction, "run", launch)
    seen: list[int] = []
    with choices.watching_spills(seen):
        assert JITFunction.run(None, 3).n_spills == 3
        JITFunction.run(None, 12)
    assert seen == [3, 12]
    assert JITFunction.run is launch


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_worker_says_what_is_wrong_with_a_choice(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(direction=direction)
    key, start = next(iter(tune.Bench(case(), DEVICE).questions().items()))
    fine, broken = (type(start)(**{**vars(start), "BLOCK_D": width}) for width in (128, 3))
    assert choices.try_once(one, {}) is None
    assert choices.try_once(one, {key: fine}) is None
    assert choices.try_once(one, {key: broken})
    monkeypatch.setattr(choices, "_spills", lambda case, answers: 7 if answers else 5)
    choices._own_spills.cache_clear()
    assert choices.try_once(one, {key: fine}) == "spills 7 registers"
    choices._own_spills.cache_clear()


def test_a_spoilt_context_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(case: op_cases.OpCase) -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(choices, "_own_spills", fault)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended):
        choices.try_once(case(), {})


def end_the_process(case: op_cases.OpCase, answers: dict) -> str | None:
    """Stands in for `choices.try_once` in a worker."""
    if answers["choice"] == "crashes":
        os._exit(1)
    return None if answers["choice"] == "works" else "refused"


@pytest.mark.slow
def test_a_crash_costs_one_candidate_and_not_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "try_once", end_the_process)
    workers = choices.Workers(1)
    try:
        reasons = workers.why_broken(case(), [{"choice": name} for name in ("crashes", "no", "works")])
    finally:
        workers.close()
    assert reasons == ["it ends the process", "refused", None]


def test_without_a_gpu_one_line_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--op", "attention"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "triton" in err
