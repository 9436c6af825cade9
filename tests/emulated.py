"""The CUDA kernels and their glue without a GPU: csrc/cuda compiled by the C++ compiler against tests/emulation.

``use(monkeypatch)`` puts them in the place of the cuda backend, on CPU tensors.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.library import Library

from fastvit import backends, native, native_cuda

ROOT = Path(__file__).resolve().parent.parent
CXX = shutil.which(os.environ.get("CXX", "c++"))
NAMESPACE = "fastvit_emulated"
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-w", "-fno-math-errno", "-DTORCH_TARGET_VERSION=0x020a000000000000")


def why_not() -> str | None:
    """Why the kernels cannot be emulated here, or None."""
    if CXX is None:
        return "there is no C++ compiler"
    return native.why_unavailable("cpu")  # it has the schemas


def build() -> Path:
    """The shared library, built once for what the sources say."""
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.c*")), ROOT / "tests/emulation/emulation.cpp"]
    sources = [source for source in sources if source.suffix in (".cpp", ".cu")]
    folders = ("csrc/common", "csrc/cuda", "tests/emulation")
    read = [path for name in folders for path in sorted((ROOT / name).rglob("*")) if path.is_file()]
    digest = hashlib.sha256(repr((FLAGS, torch.__version__)).encode())
    for path in read:
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "emulation"
    library = folder / f"emulated-{digest.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of a test run share it
        if library.exists():
            return library
        for old in folder.glob("*.*o"):
            old.unlink()
        torch_root = Path(torch.__path__[0])
        paths = [f"-I{p}" for p in (ROOT / "tests/emulation", ROOT / "csrc", torch_root / "include")]

        def compile_one(source: Path) -> Path:
            target = folder / f"{source.name}.o"
            subprocess.run([str(CXX), *FLAGS, *paths, "-x", "c++", "-c", source, "-o", target], check=True)
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, sources))
        parts = [*objects, f"-L{torch_root}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
        subprocess.run([str(CXX), "-shared", "-o", library.with_suffix(".part"), *parts], check=True)
        library.with_suffix(".part").rename(library)
    return library


@cache
def library() -> ctypes.CDLL:
    """The loaded library; its ops are defined as those of the extension are."""
    native._require()
    definitions = Library(NAMESPACE, "DEF")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("fastvit_native::"):
            packet = getattr(torch.ops.fastvit_native, name.removeprefix("fastvit_native::"))
            definitions.define(str(packet.default._schema).removeprefix("fastvit_native::"))
    loaded = ctypes.CDLL(str(build()))
    loaded.definitions = definitions  # the ops live as long as this object
    return loaded


@contextmanager
def device(processors: int = 132, shared: int = 227 * 1024) -> Iterator[None]:
    """An emulated device with so many multiprocessors, and so many bytes of shared memory for a block."""
    library().emulated_device(processors, shared)
    try:
        yield
    finally:
        library().emulated_device(132, 227 * 1024)


@cache
def launchers() -> SimpleNamespace:
    """The cuda backend's launchers on CPU tensors."""
    library()
    return native_cuda.launchers(NAMESPACE, "cpu")


def use(monkeypatch) -> None:
    """Let ``backend("cuda")`` mean the emulated kernels."""
    for op, launcher in vars(launchers()).items():
        monkeypatch.setattr(backends.Loaded, f"cuda_{op}", launcher, raising=False)
    missing = backends.why_unavailable
    monkeypatch.setattr(backends, "why_unavailable", lambda name: None if name == "cuda" else missing(name))
