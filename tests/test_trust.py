"""What no call may do: change the program's state or its inputs, mix up threads, or die in a forked worker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import calls
from harness import random_like

from fastvit import backends

TESTS = Path(__file__).resolve().parent
each_call = pytest.mark.parametrize("call", calls())


def global_state():
    cuda = torch.backends.cuda
    return {
        "random numbers": torch.get_rng_state().tolist(),
        "random numbers of the GPU": [s.tolist() for s in torch.cuda.get_rng_state_all()] if cuda.is_built() else [],
        "default dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision": (torch.get_float32_matmul_precision(), cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "reduced sums": (
            cuda.matmul.allow_fp16_reduced_precision_reduction,
            cuda.matmul.allow_bf16_reduced_precision_reduction,
        ),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark),
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "flush denormal": (torch.tensor(1e-40) * 1).item(),
        "device": torch.cuda.current_device() if torch.cuda.is_available() else None,
        "environment": dict(os.environ),
    }


@each_call
def test_a_call_changes_no_global_state(call):
    tensors = call.tensors()
    call.gradients(tensors, call.run(tensors))  # what is loaded on first use may stay
    before = global_state()
    call.gradients(tensors, call.run(tensors))
    after = global_state()
    assert not [name for name in before if before[name] != after[name]]


@each_call
def test_a_call_writes_to_none_of_its_inputs(call):
    tensors = call.tensors()
    kept = {name: t.detach().clone() for name, t in tensors.items()}
    output = call.run(tensors)
    incoming = random_like(output).to(output)
    result, gradient = output.detach().clone(), incoming.clone()
    output.backward(incoming)
    assert not [name for name, t in tensors.items() if not torch.equal(t, kept[name]) or t._version]
    assert torch.equal(output, result)
    assert torch.equal(incoming, gradient)


@each_call
def test_an_output_is_memory_of_its_own(call):
    tensors = call.tensors()
    output = call.run(tensors)
    memory = {t.untyped_storage().data_ptr() for t in tensors.values()}
    assert output.untyped_storage().data_ptr() not in memory


# Each child process starts from nothing, so that the first call, which imports, compiles and caches, is among them.
THREADS = """
import concurrent.futures, sys, threading
import interpreter
interpreter.install()
import torch
from calls import calls

chosen = [p.values[0] for p in calls() if not p.marks and p.values[0].place.backend == sys.argv[1]]
barrier = threading.Barrier(16)

def work(number):
    barrier.wait()
    found = {}
    for call in chosen[number % len(chosen):] + chosen[: number % len(chosen)]:
        tensors = call.tensors()
        output = call.run(tensors)
        found[str(call)] = [output.detach(), *call.gradients(tensors, output)]
    return found

with concurrent.futures.ThreadPoolExecutor(16) as pool:
    results = list(pool.map(work, range(16)))
for found in results[1:]:
    for name, tensors in found.items():
        assert all(map(torch.equal, tensors, results[0][name])), name
print(len(chosen))
"""

FORK = """
import multiprocessing, sys
import interpreter
interpreter.install()
import torch
from calls import calls

chosen = [p.values[0] for p in calls() if not p.marks and p.values[0].place.backend == sys.argv[1]]

def work(queue=None):
    found = {}
    for call in chosen:
        tensors = call.tensors()
        output = call.run(tensors)
        found[str(call)] = [t.detach().tolist() for t in (output, *call.gradients(tensors, output))]
    return found if queue is None else queue.put(found)

def worker(queue):
    torch.set_num_threads(1)  # as a DataLoader's worker does
    work(queue)

context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
work()  # with every thread, which the fork leaves behind
torch.set_num_threads(1)  # a sum is cut into as many parts as there are threads
here = work()
children = [context.Process(target=worker, args=(queue,)) for _ in range(2)]
for child in children:
    child.start()
assert [queue.get() for _ in children] == [here, here]
for child in children:
    child.join()
    assert child.exitcode == 0
print(len(chosen))
"""


def start(script, backend, cache):
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", script, backend]
    return subprocess.Popen(
        command, cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, backend):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    if out.split()[-1] == "0":
        pytest.skip(backends.why_unavailable(backend))


# Triton's interpreter keeps the running program's number in a global, so interpreted kernels cannot share a process.
@pytest.mark.parametrize("backend", ["reference", "cpu", *(["triton", "cuda"] if torch.cuda.is_available() else [])])
def test_sixteen_threads_make_the_first_call_at_once(backend, tmp_path):
    finish(start(THREADS, backend, tmp_path), backend)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU: nothing is compiled without one")
def test_eight_processes_compile_at_once(tmp_path):
    for process in [start(THREADS, "triton", tmp_path) for _ in range(8)]:
        finish(process, "triton")


# A CUDA device does not survive a fork; nobody expects it to.
@pytest.mark.parametrize("backend", ["reference", "cpu", *([] if torch.cuda.is_available() else ["triton"])])
def test_a_forked_worker_computes_the_same_bits(backend, tmp_path):
    finish(start(FORK, backend, tmp_path), backend)
