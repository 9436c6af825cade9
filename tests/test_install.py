"""The sdist, the wheel, an editable install and a bare checkout, each imported from where a user would stand.

Every case works on a copy of the tree, so that nothing built for development is found by accident.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (
    "fastvit",
    "kernels",
    "csrc",
    "benchmarks",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)

# What a user's process sees: where the package and its two mapped folders come from, and that an op runs.
LOOK = """
import importlib.util, json, torch, fastvit
x = torch.randn(2, 8)
fastvit.ops.layer_norm(x, None, None, 1e-6)
where = {"fastvit": fastvit.__file__, "native": fastvit.backends.why_unavailable("cpu")}
for name in ("fastvit.kernels.layer_norm", "fastvit.kernels._tuning", "fastvit.benchmarks.cases"):
    where[name] = importlib.util.find_spec(name).origin
print(json.dumps(where))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FASTVIT_", "PYTHON"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**env, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def look(python: str | Path, cwd: Path, **environment: str) -> dict[str, str]:
    return json.loads(run(python, "-c", LOOK, cwd=cwd, **environment))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout") / "fastvit"
    copy.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and the wheel built from it by a process that finds no torch, as pip's isolated build does."""
    no_torch = tmp_path_factory.mktemp("no_torch")
    (no_torch / "torch.py").write_text("raise ImportError('no torch in an isolated build')\n")
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ".", cwd=checkout, PYTHONPATH=str(no_torch))
    return dist


def test_the_wheel_has_everything_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl"), "built without torch it is pure Python"
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {
        "fastvit/" + str(p.relative_to(ROOT)) for f in ("kernels", "benchmarks") for p in (ROOT / f).glob("*.py")
    }
    shipped |= {str(p.relative_to(ROOT)) for p in (ROOT / "fastvit").rglob("*.py")}
    assert shipped <= names, shipped - names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastvit"}, "no top-level package but fastvit"
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "fastvit = fastvit.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The python of an empty environment that sees this one's libraries, but not its editable install of fastvit."""
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    Path(purelib, "libraries.pth").write_text("\n".join(libraries) + "\n")
    return python


def pip_install(python: Path, *arguments: str | Path, **variables: str) -> None:
    options = ("-q", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", *options, *arguments, cwd=python.parent, **variables
    )


def test_the_wheel_works_from_another_directory(distributions: Path, environment: Path, tmp_path: Path) -> None:
    pip_install(environment, *distributions.glob("*.whl"))
    where = look(environment, tmp_path)
    assert where.pop("native"), "there is no extension, and the backend says so"
    outside = {name: path for name, path in where.items() if not Path(path).is_relative_to(tmp_path / "env")}
    assert not outside
    assert "bench" in run(environment.with_name("fastvit"), "--help", cwd=tmp_path)


def test_a_checkout_works_uninstalled(checkout: Path, environment: Path) -> None:
    in_the_checkout(look(environment, checkout), checkout)


def test_an_editable_install_works_from_another_directory(checkout: Path, environment: Path, tmp_path: Path) -> None:
    pip_install(environment, "-e", checkout, FASTVIT_BUILD="none")
    in_the_checkout(look(environment, tmp_path), checkout)


def in_the_checkout(where: dict[str, str], checkout: Path) -> None:
    assert Path(where["fastvit"]) == checkout / "fastvit" / "__init__.py"
    assert Path(where["fastvit.kernels.layer_norm"]) == checkout / "kernels" / "layer_norm.py"
    assert Path(where["fastvit.kernels._tuning"]) == checkout / "kernels" / "_tuning.py"
    assert Path(where["fastvit.benchmarks.cases"]) == checkout / "benchmarks" / "cases.py"
