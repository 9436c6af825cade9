"""What the processes of tests/test_parallel.py do, two of them and then four; in a folder they leave what they saw.

They are started as torchrun starts its own, but forked, for importing torch takes longer than all that they do.
"""

import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch  # noqa: F401  (this one and the compiler would else be imported by each process)
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import fastvit
from fastvit import backends
from fastvit.training import distributed_checkpoints, tensor_parallel  # noqa: F401
from fastvit.training.error import TrainingError
from fastvit.training.parallel import Parallel

MODES = ("ddp", "fsdp", "tp")
STEPS, SAVED_AFTER, BATCH, MAX_NORM = 20, 6, 8, 1.0
SIZE = {"img_size": (12, 8), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {**SIZE, "mlp_ratio": 2.5, "init_values": 0.5},
    "normed": {**SIZE, "mlp_ratio": 1.5, "qk_norm": True, "qkv_bias": False, "reg_tokens": 2, "global_pool": "avg"},
    "relative": {**SIZE, "pos_embed": "relative"},
}
DROPOUTS = {"pos_drop_rate": 0.2, "proj_drop_rate": 0.3, "attn_drop_rate": 0.2, "drop_path_rate": 0.4, "drop_rate": 0.1}
# mode that wrote, mode that reads with other processes
READ = (("ddp", "fsdp"), ("fsdp", "tp"), ("tp", "ddp"), ("none", "tp"))


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, *SIZE["img_size"], generator=g)
    return images, torch.randint(0, SIZE["num_classes"], (BATCH,), generator=g)


def make(folder: Path, kind: str = "plain", **options: Any) -> fastvit.VisionTransformer:
    model = fastvit.VisionTransformer(**{**OPTIONS[kind], **options})
    model.load_state_dict(torch.load(folder / f"{kind}.pt", weights_only=True))
    return model


def optimizer_of(parallel: Parallel, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, **parallel.optimizer_options)


def loss_of(parallel: Parallel, model: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    images, targets = (t.chunk(parallel.data_world)[parallel.data_rank][part] for t in batch(step))
    return F.cross_entropy(model(images), targets)


def gradients(parallel: Parallel, model: nn.Module) -> dict[str, Tensor]:
    return parallel.full_state(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def steps(parallel: Parallel, model: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> list[list[float]]:
    """(loss over all data, norm of all gradients) of each step."""
    seen = []
    for step in which:
        optimizer.zero_grad()
        loss = loss_of(parallel, model, step)
        loss.backward()
        norm = parallel.clip(model, MAX_NORM)
        optimizer.step()
        seen.append([parallel.mean(loss).item(), norm.item()])
    return seen


def averages_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: 2 * p.detach() for name, p in model.named_parameters()}


def train_and_save(parallel: Parallel, folder: Path) -> dict[str, Any]:
    model = parallel.wrap(make(folder))
    optimizer = optimizer_of(parallel, model)
    seen = steps(parallel, model, optimizer, range(SAVED_AFTER))
    parallel.save(folder / parallel.mode, model, optimizer, averages_of(model))
    saved = parallel.full_state(model)
    with torch.no_grad():  # between steps: what evaluation keeps must not survive them
        model.eval()(batch(99)[0])
    seen += steps(parallel, model.train(), optimizer, range(SAVED_AFTER, STEPS))
    with torch.no_grad():
        own = list(model.parameters())  # as an average of the weights has them
        logits = model.eval()(batch(99)[0])
        for p in own:
            p.mul_(0.5)
        halved = model(batch(99)[0])
    return {"steps": seen, "logits": logits, "halved": halved, "saved": saved}


def slopes(parallel: Parallel, folder: Path) -> dict[str, Any]:
    """Gradients of the first batch in several ways."""
    found: dict[str, Any] = {}
    for way in ("once", "recomputed", "normed", "relative", "accumulated"):
        bare = make(folder, way if way in OPTIONS else "plain")
        bare.set_grad_checkpointing(way == "recomputed")
        model = parallel.wrap(bare)
        if way != "accumulated":
            loss_of(parallel, model, 0).backward()
        else:
            half = BATCH // parallel.data_world // 2
            for part, last in ((slice(half), False), (slice(half, None), True)):
                with parallel.accumulating(model, last=last):
                    (loss_of(parallel, model, 0, part) / 2).backward()
                if not last and parallel.mode == "ddp":
                    found["unexchanged"] = bare.get_parameter("head.bias").grad.clone()
        found[way] = gradients(parallel, model)
    return found


def with_dropout(parallel: Parallel, folder: Path) -> dict[str, Tensor]:
    """This process's own gradients of what is not sharded."""
    model = parallel.wrap(make(folder, **DROPOUTS))
    parallel.seed(3)
    loss_of(parallel, model, 0).backward()
    return {n: p.grad for n, p in model.named_parameters() if type(p) is nn.Parameter and p.grad is not None}


def ops_used(parallel: Parallel, folder: Path) -> list[str]:
    calls: Counter = Counter()
    found = backends.implementation

    def spy(op: str, backend: str) -> Any:
        calls[f"{op} {backend}"] += 1
        return found(op, backend)

    model = parallel.wrap(make(folder))
    backends.implementation = spy
    try:
        loss_of(parallel, model, 0).backward()
    finally:
        backends.implementation = found
    return sorted(calls)


def placed(parallel: Parallel, folder: Path) -> bool:
    """Whether whole tensors become what the wrapped model, of which the head alone trains, has of them."""
    bare = make(folder, "normed").requires_grad_(False)
    bare.head.requires_grad_(True)
    model = parallel.wrap(bare)
    local = parallel.local_tensors(model, torch.load(folder / "normed.pt", weights_only=True))
    own = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    pairs = [[getattr(t, "_local_tensor", t) for t in (local[name], own[name])] for name in own]
    loss_of(parallel, model, 0).backward()
    slopes = gradients(parallel, model)
    trained = not parallel.is_main or slopes["head.bias"].abs().max() > 0
    return bool(trained) and local.keys() == own.keys() and all(torch.equal(*pair) for pair in pairs)


def message(call: Any) -> str:
    try:
        call()
    except (TrainingError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def failures(parallel: Parallel, folder: Path) -> dict[str, str]:
    """What each process is told when one of them fails, and when the model cannot be dealt out."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    model = parallel.wrap(make(folder))
    write = HuggingFaceStorageWriter.write_data
    if parallel.rank == 1:
        HuggingFaceStorageWriter.write_data = full
    told = message(lambda: parallel.save(folder / "full", model))
    HuggingFaceStorageWriter.write_data = write
    elsewhere = folder / ("ddp" if parallel.rank == 0 else "nowhere")
    unread = message(lambda: parallel.load(elsewhere, model))
    odd = fastvit.VisionTransformer(**{**OPTIONS["plain"], "num_heads": 1})
    alone = message(lambda: Parallel.start("none"))
    return {"full": told, "unread": unread, "odd": message(lambda: parallel.wrap(odd)), "none": alone}


def read(parallel: Parallel, folder: Path, writer: str) -> dict[str, Any]:
    """The next steps from another mode's checkpoint, in a model that had other weights."""
    model = parallel.wrap(make(folder))
    optimizer = optimizer_of(parallel, model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    averages = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    parallel.load(folder / writer, model, optimizer, averages)
    averaged, state = parallel.full_state(model, averages), parallel.full_state(model)
    return {
        "averaged": averaged,
        "state": state,
        "steps": steps(parallel, model, optimizer, range(SAVED_AFTER, SAVED_AFTER + 3)),
    }


@record
def main(folder: Path) -> None:
    warnings.simplefilter("error")
    first = Parallel.start("auto", "cpu")
    seen: dict[str, Any] = {"place": [first.mode, first.rank, first.world, first.is_main]}
    if first.world == 2:
        for mode in MODES:
            parallel = Parallel.start(mode, "cpu")
            seen[mode] = train_and_save(parallel, folder) | {"data": [parallel.data_rank, parallel.data_world]}
            seen[mode] |= {"slopes": slopes(parallel, folder), "ops": ops_used(parallel, folder)}
            seen[mode] |= {"placed": placed(parallel, folder)}
            parallel.stop()
        tensor = Parallel.start("tp", "cpu")
        seen["dropout"] = with_dropout(tensor, folder)
        seen["failures"] = failures(tensor, folder)
        first.barrier()
    else:
        for writer, mode in READ:
            seen[f"{writer} {mode}"] = read(Parallel.start(mode, "cpu"), folder, writer)
    torch.save(seen, folder / f"{first.world}-{first.rank}.pt")
    first.stop()


def launch(folder: Path, processes: int) -> None:
    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(processes)}
    nodes = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": processes, "max_restarts": 0}
    elastic_launch(LaunchConfig(**where, **nodes, start_method="fork", monitor_interval=0.1), main)(folder)


if __name__ == "__main__":
    with fastvit.backend("cpu"):
        for number in (2, 4):
            launch(Path(sys.argv[1]), number)
