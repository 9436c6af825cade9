"""The command line: `python -m fastvit COMMAND`, also installed as `fastvit`.

Tables and a progress bar in a terminal, plain aligned rows when piped, JSON on request; exit code 0 only on success.
"""

import io
import os
import sys
from typing import NoReturn

try:
    import rich  # noqa: F401
    import typer
except ImportError as missing:
    raise SystemExit(
        f'fastvit: the command line needs typer and rich ({missing}); install them with:  pip install "fastvit[cli]"'
    ) from None

from .commands.attention import attention
from .commands.bench import bench
from .commands.bench_ops import bench_ops
from .commands.classify import classify
from .commands.convert import convert
from .commands.embed import embed
from .commands.evaluate import evaluate
from .commands.figures import figures
from .commands.info import info
from .commands.profile import profile
from .commands.terminal import UsageError, reason
from .commands.train import train

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Fused Vision Transformers.")
for command in (info, classify, attention, figures, embed, convert, train, evaluate, bench, bench_ops, profile):
    app.command()(command)


def main() -> NoReturn:
    """Run the command line and leave with its exit code: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding without the letters of a label prints the others
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (UsageError, OSError) as error:
        _fail(reason(error), 1)
    except ImportError as error:
        if not str(error).startswith("fastvit"):  # what is missing and how to install it
            raise
        _fail(str(error), 1)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a wrong option
            raise
        _fail(error.format_message(), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    for line in message.splitlines() or [""]:
        print(f"fastvit: {line}", file=sys.stderr)
    sys.exit(code)
