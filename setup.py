"""What pyproject.toml cannot say: where the packages lie and how the C++ extension is built. See CONTRIBUTING.md."""

import os
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC, REQUESTED = Path("csrc"), os.environ.get("FASTVIT_BUILD", "").strip().lower()
CXX = shutil.which(os.environ.get("CXX", "c++"))
NVCC = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which("nvcc")
# One binary for torch 2.10 and newer: the sources use no more than the stable ABI of that release.
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -Wall -DTORCH_TARGET_VERSION=0x020a000000000000"
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -Xptxas=-v --threads=0"


def choose_build() -> tuple[str, str]:
    try:
        import pybind11  # noqa: F401
        import torch
    except ImportError as error:
        return "none", f"{error.name} is missing where the build runs (try pip install --no-build-isolation)"
    if not CXX or (REQUESTED == "cuda" and not NVCC):
        return "none", "nvcc was not found (set CUDA_HOME)" if CXX else "there is no C++ compiler"
    return ("cuda" if REQUESTED == "cuda" or (not REQUESTED and NVCC and torch.version.cuda) else "cpu"), ""


def cuda_architectures(cuda) -> dict[str, str]:
    """nvcc's flags: for TORCH_CUDA_ARCH_LIST, else for the GPUs that are here, else for all that this nvcc knows."""
    known = subprocess.run([str(NVCC), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    here = sorted({cuda.get_device_capability(i) for i in range(cuda.device_count())})
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or " ".join(f"{x}.{y}{'a' * (x in (9, 10))}" for x, y in here)
    flags = {}
    for arch in (wanted or "8.0+PTX 8.6 8.9 9.0a 10.0a 12.0").replace(";", " ").split():
        number = arch.removesuffix("+PTX").replace(".", "")
        for code in (f"sm_{number}", f"compute_{number}")[: 1 + arch.endswith("+PTX")]:
            if wanted or f"compute_{number.rstrip('af')}" in known:
                flags[code] = f"-gencode=arch=compute_{number},code={code}"
    return flags


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stderr


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        (temp := Path(self.build_temp)).mkdir(parents=True, exist_ok=True)
        gencode = cuda_architectures(torch.cuda) if BUILD == "cuda" else {}
        # torch's own pybind11 refuses to be compiled with the stable ABI: the installed one first.
        paths = (CSRC, pybind11.get_include(), f"{torch.__path__[0]}/include", *self.include_dirs)
        defines = [f'-DFASTVIT_VERSION="{self.distribution.get_version()}"', f'-DFASTVIT_CUDA="{" ".join(gencode)}"']
        cxx = [CXX, *f"{FLAGS} {os.environ.get('FASTVIT_CXXFLAGS', '')}".split(), *defines, *(f"-I{p}" for p in paths)]
        nvcc = [NVCC, *NVCC_FLAGS.split(), f"-I{CSRC}", *gencode.values()]
        stamp = zlib.crc32(f"{cxx}{nvcc}{torch.__version__}".encode())
        newest_header = max(p.stat().st_mtime for p in (Path("setup.py"), *CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")))

        def compile_one(source: str) -> Path:
            target = temp / f"{source.replace('/', '_')}.{stamp:08x}.o"
            if not target.exists() or target.stat().st_mtime < max(newest_header, Path(source).stat().st_mtime):
                report = run(*(nvcc if source.endswith(".cu") else cxx), "-c", source, "-o", target)
                target.with_suffix(".txt").write_text(report)  # warnings; of CUDA sources also registers and spills
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        (output := Path(self.get_ext_fullpath(ext.name))).parent.mkdir(parents=True, exist_ok=True)
        # libtorch.so is needed though nothing refers to it: it brings libtorch_cuda, where the current stream is.
        libraries = ["-Xlinker", "--no-as-needed", f"-L{torch.__path__[0]}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
        run(*([NVCC] if BUILD == "cuda" else cxx), "-shared", "-o", output, *objects, *libraries)


BUILD, REASON = ("none", "FASTVIT_BUILD=none") if REQUESTED == "none" else choose_build()
if REQUESTED not in ("", BUILD):
    raise SystemExit(f"fastvit: FASTVIT_BUILD={REQUESTED} cannot be served: {REASON or 'choose cuda, cpu or none'}")
if BUILD == "none":
    print(f"fastvit: pure-Python install without the C++ extension: {REASON}")
sources = [str(p) for kind in ("*.cpp", "*.cu") for p in CSRC.rglob(kind) if BUILD == "cuda" or p.parent.name != "cuda"]
# An install survives a compilation that fails, with a warning; who asks for the extension by name hears the error.
extension = Extension("fastvit._C", sorted(sources), optional=not REQUESTED and "build_ext" not in sys.argv)
setup(
    packages=[*find_packages(include=["fastvit*"]), "fastvit.kernels", "fastvit.benchmarks"],
    package_data={"fastvit": ["py.typed"]},
    package_dir={"fastvit.kernels": "kernels", "fastvit.benchmarks": "benchmarks"},
    ext_modules=[extension] if BUILD != "none" else [],
    cmdclass={"build_ext": BuildExtension},
)
