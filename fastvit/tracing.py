"""What torch.compile takes as given instead of tracing it."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """Let torch.compile call this function once, while it traces, and keep the answer.

    It is ``torch.compiler.assume_constant_result`` without that decorator's import of Dynamo, which costs a second and
    loads Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
