"""Linear layer with bias, activation, LayerScale, stochastic depth and residual sum in the epilogue."""

from __future__ import annotations

from . import _device, _matmul


def why_not(x, weight, bias, layer_scale, residual, activation, keep_preact, sample_scale) -> str | None:
    return _device.why_not(x)


def forward(x, weight, bias, layer_scale, residual, activation, keep_preact, sample_scale):
    return _matmul.linear(x, weight, bias, layer_scale, residual, activation, keep_preact, sample_scale)
