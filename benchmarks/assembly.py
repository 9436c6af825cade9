"""What a compiled Triton kernel's texts and binary say about it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path


def widest_load(text: str) -> str:
    """The widest read of device memory in PTX or AMD's assembly."""
    if re.search(r"cp\.async\.bulk\.tensor\S*shared\S*global", text):
        return "TMA"
    widths = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global\S* \[.*?\], \[.*?\], (\w+)", text)]
    for lanes, bits in re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)", text):
        widths.append(int(lanes or 1) * int(bits) // 8)
    for words in re.findall(r"\b(?:global|buffer)_load_dword(?:x(\d))?\b", text):
        widths.append(int(words or 1) * 4)
    return str(max(widths, default=0))


def resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def overwritten_operands(ttgir: str) -> str:
    """The buffers, if any, that a copy may overwrite while an asynchronous wgmma still reads them; empty if none.

    Triton 3.6 and 3.7 pipeline a loop whose last wgmma is still under way (`pendings = 1`) when the next tile is
    fetched. Each operand then needs one buffer more than there are tiles on their way, but a tile that is also read
    into registers, to be summed say, does not get it.
    """
    if not re.search(r"pendings = [1-9]", ttgir):
        return ""
    depth = {
        name: int(n) for name, n in re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x", ttgir)
    }
    slot = dict(re.findall(r"(%\w+) = ttg\.memdesc_index (%\w+)\[", ttgir))
    view = dict(re.findall(r"(%\w+) = ttg\.memdesc_(?:trans|reinterpret|subslice) (%\w+)", ttgir))
    in_registers = set(re.findall(r"ttg\.local_load (%\w+)", ttgir))
    read: dict[str, bool] = {}  # buffer of an operand: whether it is also loaded
    for operands in re.findall(r"warp_group_dot (%\w+)(?:#\d+)?, (%\w+)(?:#\d+)?, .*isAsync = true", ttgir):
        for name in operands:
            while name in view:
                name = view[name]
            if slot.get(name) in depth:
                read[slot[name]] = read.get(slot[name], False) or name in in_registers
    deepest = max((depth[name] for name in read), default=0)
    return ", ".join(sorted(name for name in read if read[name] or depth[name] < deepest))
