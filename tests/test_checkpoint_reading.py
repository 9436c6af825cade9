"""How a checkpoint is read: mapped, from any byte on, and without waiting for what loading does not need."""

import os
import struct
import subprocess
import sys

import jax_vit
import numpy
import pytest
import safetensors.torch
import torch
from checkpoint_models import hf, save_hf, vit_hf
from models import SMALL, randomize

from fastvit import CheckpointError, VisionTransformer, load_checkpoint
from fastvit.checkpoints.files import open_checkpoint


def vit(seed=3):
    return randomize(VisionTransformer(**{**SMALL, "depth": 1}), seed=seed)


def test_headers_are_translated_without_importing_a_compiler(tmp_path):
    """torch.cat of meta tensors imports torch._dynamo: two seconds before the first number is read."""
    save_hf(hf("Dinov2WithRegistersModel"), tmp_path / "registers")
    save_hf(vit_hf(), tmp_path / "vit")
    numpy.savez(tmp_path / "vit.npz", **jax_vit.weights(classes=5))
    program = f"""import sys, fastvit
from fastvit.checkpoints.convert import convert_state_dict
from fastvit.checkpoints.files import open_checkpoint
for name in ("registers", "vit", "vit.npz"):
    source = open_checkpoint({str(tmp_path)!r} + "/" + name)
    for state in (source.headers(), source.read(source.entries)):
        convert_state_dict(state, dst="transformers")
assert "torch._dynamo" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_data_that_begins_at_any_byte(tmp_path):
    """safetensors pads its header to 8 bytes; other writers do not."""
    state = vit(seed=4).state_dict()
    blob = safetensors.torch.save(state)
    length = struct.unpack("<Q", blob[:8])[0]
    for pad in (1, 2, 3):
        text = blob[8 : 8 + length] + b" " * pad
        (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", length + pad) + text + blob[8 + length :])
        loaded = load_checkpoint(vit(), tmp_path / "odd.safetensors").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    """A mapped file that ends early would take the process down."""
    path = tmp_path / "short.safetensors"
    safetensors.torch.save_file(vit(seed=4).state_dict(), path)
    source = open_checkpoint(path)
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(CheckpointError, match=r"short.safetensors had \d+ bytes and now has \d+"):
        source.read(source.entries)
