"""Op-level cases of a size that any test can afford."""

import torch

from fastvit.benchmarks import op_cases

CPU = torch.device("cpu")


def tiny(op: str, direction: str = "forward", **changes: object) -> op_cases.OpCase:
    options: dict = {"batch": 3, "tokens": 5, "width": 48, "heads": 3, "hidden": 96, "side": 16, "patch": 8}
    if op == "patch_embed":
        options["tokens"] = (options["side"] // options["patch"]) ** 2 + 1
    return op_cases.OpCase(op, direction=direction, **{**options, **changes})
