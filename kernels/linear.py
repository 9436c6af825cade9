"""Linear layer with bias, activation, LayerScale and residual sum in the epilogue."""

from __future__ import annotations

from . import _device, _matmul


def why_not(x, weight, bias, layer_scale, residual, activation, keep_preact) -> str | None:
    return _device.why_not(x)


def forward(x, weight, bias, layer_scale, residual, activation, keep_preact):
    return _matmul.linear(x, weight, bias, layer_scale, residual, activation, keep_preact)
