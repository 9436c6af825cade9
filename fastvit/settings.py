"""Every environment variable the package reads, in one place. They are read once, when fastvit is imported."""

import os
from dataclasses import dataclass


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    backend: FASTVIT_BACKEND, the backend every op uses unless a ``with fastvit.backend(...)`` says otherwise.
    disable: FASTVIT_DISABLE, leaves everything to the reference backend and makes ``accelerate`` do nothing.
    strict: FASTVIT_STRICT, raises where an op would fall back to the reference backend.
    log: FASTVIT_LOG, the level of the ``fastvit`` logger (DEBUG, INFO, WARNING, ERROR).
    cpu: FASTVIT_CPU, the CPU kernels' instruction set (amx, avx512_bf16, avx512, avx2, portable), else the best here.
    """

    backend: str = "auto"
    disable: bool = False
    strict: bool = False
    log: str = ""
    cpu: str = ""


def read() -> Settings:
    """The settings of this process's environment."""
    return Settings(
        backend=os.environ.get("FASTVIT_BACKEND", "").strip().lower() or "auto",
        disable=_flag("FASTVIT_DISABLE"),
        strict=_flag("FASTVIT_STRICT"),
        log=os.environ.get("FASTVIT_LOG", "").strip().upper(),
        cpu=os.environ.get("FASTVIT_CPU", "").strip().lower(),
    )


SETTINGS = read()
