"""The benchmark suite; its modules live in the repository's `benchmarks/` and are imported as `fastvit.benchmarks.*`.

A wheel carries that folder as `fastvit/benchmarks/`; a checkout and an editable install have it beside the package.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(folder) for folder in (_here / "benchmarks", _here.parent / "benchmarks") if folder.is_dir()][:1]
