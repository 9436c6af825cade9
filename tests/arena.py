"""Tensors that show what a kernel reads and writes beyond them: NaN around inputs, guard bands around outputs."""

import contextlib
import math

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BAND = 64

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def arena(tensor, device=DEVICE):
    """The same values inside a larger buffer of NaN: padded rows, and a start off every 16-byte boundary."""
    *outer, width = tensor.shape
    rows = math.prod(outer)
    filler = math.nan if tensor.is_floating_point() else 1
    buffer = torch.full((BAND + rows * (width + 5) + BAND,), filler, dtype=tensor.dtype, device=device)
    view = buffer[BAND + 3 :][: rows * (width + 5)].view(*outer, width + 5)[..., :width]
    return view.copy_(tensor)


def random(*shape, dtype, scale=1.0):
    return arena((torch.randn(shape) * scale).to(dtype))


def outside(*tensors):
    """The same numbers among zeros, for the yardstick: oneDNN reads beyond rows of an odd length, NaN and all (AMX)."""
    return tuple(
        None if t is None else t.new_zeros(t.numel() + 256)[: t.numel()].view(t.shape).copy_(t) for t in tensors
    )


def double(*tensors):
    return [tensor if tensor is None else tensor.double() for tensor in tensors]


@contextlib.contextmanager
def guarded_outputs():
    """Outputs are allocated full of NaN between bands of NaN, which must still be there afterwards."""
    buffers = []
    empty, empty_like = torch.empty, torch.empty_like

    def guarded(size, **options):
        size = (size,) if isinstance(size, int) else size
        count = math.prod(size)
        buffers.append((torch.full((count + 2 * BAND,), math.nan, **options), count))
        return buffers[-1][0][BAND : BAND + count].view(size)

    torch.empty = guarded
    torch.empty_like = lambda x: guarded(tuple(x.shape), dtype=x.dtype, device=x.device)
    try:
        yield buffers
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    for buffer, count in buffers:
        assert buffer[:BAND].isnan().all(), "written before the start of an output"
        assert buffer[BAND + count :].isnan().all(), "written beyond the end of an output"


def run(launcher, *arguments, entry="forward"):
    """What a launcher's forward (or backward) returns, after checking that it stayed inside its tensors."""
    if entry == "forward":
        assert launcher.why_not(*arguments) is None
    with guarded_outputs() as buffers:
        result = getattr(launcher, entry)(*arguments)
    assert buffers or entry != "forward"  # a backward may write into what it is given
    return result
