"""The Triton kernels, importable as ``fastvit.kernels.<op>``.

Their sources live in ``kernels/`` beside the package in a checkout and inside it once installed. This module only
points there; it imports nothing, so ``fastvit.kernels`` is free of Triton until one of its modules is asked for.
"""

from pathlib import Path

_package = Path(__file__).parent
_installed = _package / "kernels"

__path__ = [str(_installed if _installed.is_dir() else _package.parent / "kernels")]
