"""What a measurement was made on: versions, commit, processor, GPU. Read-only, and cheap but for one call of git."""

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)


def version(package: str) -> str:
    """The installed version of a distribution, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def fastvit_version() -> str:
    """The version of the package, also in a checkout that is not installed."""
    import fastvit

    return getattr(fastvit, "__version__", "") or version("fastvit") or "unknown"


def commit() -> str:
    """The commit of the checkout these benchmarks lie in, with "+" after it when files were changed, or "unknown"."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return head + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    """The processor's model name."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def cpu_vendor() -> str:
    """Who made the processor, as it says itself: "AuthenticAMD", "GenuineIntel"; empty where it does not say."""
    found = re.search(r"^vendor_id\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else ""


def cpu_cache_bytes() -> int:
    """The largest cache of the processor, in bytes; 0 where Linux does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) * 1024 ** " KMG".index(unit or " "))
    return max(sizes)


def cpu_features() -> list[str]:
    """Those of the instruction sets that matter to the kernels which this processor has."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [feature for feature in _FEATURES if feature in flags]


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def gpus() -> list[dict[str, object]]:
    """Name, compute capability, memory and multiprocessors of every CUDA device."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def device_name(device: torch.device) -> str:
    """The name that stands in a row's key: the GPU, or the processor with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def stamp(device: torch.device) -> dict[str, object]:
    """The columns every row carries about when, where and with which versions it was measured."""
    return {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "threads": torch.get_num_threads(),
        "fastvit": fastvit_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "timm": version("timm"),
        "python": platform.python_version(),
        "commit": commit(),
    }


def describe() -> dict[str, object]:
    """Everything `fastvit info` says about the machine, apart from the backends."""
    packages = (
        "torch",
        "triton",
        "timm",
        "torchvision",
        "transformers",
        "numpy",
        "pillow",
        "scikit-learn",
        "matplotlib",
    )
    return {
        "versions": {
            "fastvit": fastvit_version(),
            "commit": commit(),
            "python": platform.python_version(),
            **{package: version(package) or None for package in packages},
            "cuda": torch.version.cuda,
        },
        "system": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "features": cpu_features(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "gpus": gpus(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTVIT_")},
    }
