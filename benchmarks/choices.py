"""The questions kernels ask `kernels/_tuning.py`, other answers to them, and processes in which those are tried."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import op_calls, op_cases, op_suite, suite

BACKEND = "triton"


@dataclass(frozen=True)
class Key:
    """A question that a kernel asks `_tuning`: the chooser's name and its arguments."""

    chooser: str
    arguments: tuple

    def __str__(self) -> str:
        return repr((self.chooser, *self.arguments))


def _modules() -> list[Any]:
    """`kernels/_tuning.py` and, where its tables outgrow one file, those named after it."""
    kernels = importlib.import_module("fastvit.kernels")
    names = sorted(path.stem for path in Path(kernels.__path__[0]).glob("_tuning*.py"))
    return [importlib.import_module(f"fastvit.kernels.{name}") for name in names]


def choosers() -> dict[str, Callable]:
    """The functions of `_tuning` that kernels may ask, by name."""
    return {
        name: value
        for module in _modules()
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def _candidates() -> Any:
    return importlib.import_module("fastvit.kernels._candidates")


def _configures(choice: Any) -> bool:
    parts = choice if isinstance(choice, tuple) else (choice,)
    return any(dataclasses.is_dataclass(part) and not isinstance(part, type) for part in parts)


@contextlib.contextmanager
def answering(answers: Mapping[Key, Any], asked: dict[Key, Any] | None = None) -> Iterator[None]:
    """Let the choosers of `_tuning` give these answers to these questions, and note what is asked and answered."""
    originals = choosers()

    def chooser(name: str) -> Callable:
        signature = inspect.signature(originals[name])

        @functools.wraps(originals[name])
        def answer(*args: Any, **options: Any) -> Any:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            key = Key(name, tuple(bound.arguments.values()))
            choice = answers[key] if key in answers else originals[name](*args, **options)
            if asked is not None and _configures(choice):
                asked[key] = choice
            return choice

        return answer

    places = [
        (module, name) for module in _modules() for name in originals if vars(module).get(name) is originals[name]
    ]
    wrapped = {name: chooser(name) for name in originals}  # one for all modules that name it: scopes may be nested
    for module, name in places:
        setattr(module, name, wrapped[name])
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, originals[name])


def legal_neighbours(key: Key, choice: Any, itemsize: int, refused: dict[str, str]) -> list[Any]:
    """What lies one step from a choice and fits the chip; the others are added to refused, with the reason."""
    named = inspect.signature(choosers()[key.chooser]).parameters
    asked = dict(zip(named, key.arguments, strict=True))
    found = []
    for neighbour in dict.fromkeys(_candidates().neighbours(choice, asked)):
        reason = _candidates().legal(neighbour, asked.get("chip", "sm_90"), asked.get("itemsize", itemsize))
        if reason is None:
            found.append(neighbour)
        else:
            refused[repr(neighbour)] = reason
    return found


class Workers:
    """Processes in which a choice is compiled and run first; the compiled kernels stay in Triton's cache."""

    def __init__(self, jobs: int) -> None:
        self._jobs, self._pool = jobs, None

    def why_broken(self, case: op_cases.OpCase, choices: Sequence[Mapping[Key, Any]]) -> list[str | None]:
        """For each choice None, or how it ends a process that tries it."""
        if not self._jobs:
            return [None] * len(choices)
        reasons: list[str | None] = []
        pool = self._started()
        waiting = [pool.submit(try_once, case, dict(answers)) for answers in choices]
        for answers, future in zip(choices, waiting, strict=True):
            try:
                reasons.append(future.result())
            except BrokenProcessPool:  # by this choice or by one that ran beside it: alone it shows
                if self._pool is pool:
                    self.close()
                reasons.append(self._alone(case, answers))
        return reasons

    def _alone(self, case: op_cases.OpCase, answers: Mapping[Key, Any]) -> str | None:
        try:
            return self._started().submit(try_once, case, dict(answers)).result()
        except BrokenProcessPool:
            self.close()
            return "it ends the process"

    def _started(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")  # a fork would inherit CUDA's context
            self._pool = concurrent.futures.ProcessPoolExecutor(self._jobs, mp_context=spawn)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


@functools.lru_cache(maxsize=1)
def _prepared(case: op_cases.OpCase) -> tuple[op_calls.Tensors, torch.Tensor | None]:
    given = op_calls.tensors(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if case.direction == "forward":
        return given, None
    with torch.no_grad():
        return given, op_calls.upstream(op_calls.call(case).eager(**given))


@contextlib.contextmanager
def watching_spills(seen: list[int]) -> Iterator[None]:
    """Note how many registers of each launched kernel the compiler put into memory."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    @functools.wraps(launch)
    def watched(*args: Any, **options: Any) -> Any:
        compiled = launch(*args, **options)
        seen.append(getattr(compiled, "n_spills", 0) or 0)
        return compiled

    JITFunction.run = watched
    try:
        yield
    finally:
        JITFunction.run = launch


def _spills(case: op_cases.OpCase, answers: Mapping[Key, Any]) -> int:
    """Run a case; the most registers that one of its kernels puts into memory."""
    import fastvit

    seen: list[int] = []
    given, dy = _prepared(case)
    with fastvit.backend(BACKEND), answering(answers), watching_spills(seen):
        op_suite.prepare(case, op_calls.call(case).fused, [given], dy)()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return max(seen, default=0)


@functools.lru_cache(maxsize=1)
def _own_spills(case: op_cases.OpCase) -> int:
    return _spills(case, {})


def try_once(case: op_cases.OpCase, answers: dict[Key, Any]) -> str | None:
    """Compile and run a case once, in a worker; whether its result is right is checked elsewhere.

    A new choice may not spill, `tests/test_aot.py` would not let it in, unless older compilers spill there anyway.
    """
    try:
        most = _own_spills(case)
        spills = _spills(case, answers) if answers else most
    except Exception as error:
        if "[CUDA]" in str(error) or "CUDA error" in str(error):  # the context is spoilt, and with it the process
            os._exit(1)
        return suite.one_line(error)
    return f"spills {spills} registers" if spills > most else None
