"""The least work an op holds, by closed formulas: what its time is judged by, in benchmark rows and launch cases alike.

FLOPs are two for each multiply-add of a matrix product and none for the rest. Traffic reads every input once and writes
every output once. A forward that keeps something for its backward (keep) writes it as well; a backward reads it, the
output's gradient and the inputs it needs, and writes one gradient per input.

Letters: B images, H heads, N queries and S keys of E numbers each; M rows of D numbers; F hidden numbers; K summed
numbers and C results of a product.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """flops; numbers moved in the tensors' own dtype; statistics moved in fp32."""

    flops: int
    numbers: int
    statistics: int = 0

    def bytes(self, itemsize: int) -> int:
        """Bytes moved where one of the numbers takes itemsize of them."""
        return self.numbers * itemsize + 4 * self.statistics

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.numbers + other.numbers, self.statistics + other.statistics)


def attention(B: int, H: int, N: int, S: int, E: int, keep: bool = False) -> Work:
    """Two products, 4 B H N S E; q and the output, k and v. Kept: the log-sum-exp of each query."""
    return Work(4 * B * H * N * S * E, 2 * B * H * E * (N + S), B * H * N * keep)


def attention_backward(B: int, H: int, N: int, S: int, E: int) -> Work:
    """Five products: S and dP again, dV, dQ, dK; q, output, dy and dq over N, k, v, dk and dv over S."""
    return Work(10 * B * H * N * S * E, 4 * B * H * E * (N + S), B * H * N)


def layer_norm(M: int, D: int, residual: bool = False, keep: bool = False) -> Work:
    """x in, y out, and with a residual that in and the sum out. Kept: mean and 1/σ of each row."""
    return Work(0, (4 if residual else 2) * M * D + 2 * D, 2 * M * keep)


def layer_norm_backward(M: int, D: int, residual: bool = False, scaled: bool = False) -> Work:
    """dy and x in, dx out, and with a residual the sum's gradient in; weight in, two gradients out.

    LayerScale: the branch in, its gradient and the residual's out; the scale in, its gradient out.
    """
    return Work(0, (3 + residual + 2 * scaled) * M * D + (3 + 2 * scaled) * D, 2 * M)


def group_norm(B: int, C: int, positions: int, groups: int, keep: bool = False) -> Work:
    """x in, y out, whether it passes a ReLU or not; weight and bias. Kept: mean and 1/σ of each group."""
    return Work(0, 2 * B * C * positions + 2 * C, 2 * B * groups * keep)


def group_norm_backward(B: int, C: int, positions: int, groups: int) -> Work:
    """dy and x in, dx out; weight and bias in, which the ReLU's sign takes, two gradients out."""
    return Work(0, 3 * B * C * positions + 4 * C, 2 * B * groups)


def linear(M: int, K: int, C: int, activation: bool = False, residual: bool = False, keep: bool = False) -> Work:
    """2 M K C; x, weight, bias, result, residual. Kept: what went into the activation."""
    return Work(2 * M * K * C, M * K + K * C + C + M * C * (1 + residual + (activation and keep)))


def linear_backward(M: int, K: int, C: int, activation: bool = False) -> Work:
    """Two products; dy, x, weight and what went into the activation in, their gradients and the bias's out."""
    return Work(4 * M * K * C, M * C * (1 + activation) + 2 * M * K + 2 * K * C + C)


def norm_mlp(M: int, D: int, F: int, keep: bool = False) -> Work:
    """Two products; x (which is the residual too), the result, weights. Kept: fc1's result, each row's statistics."""
    return Work(4 * M * D * F, 2 * M * D + 2 * D * F + F + 3 * D + M * F * keep, 2 * M * keep)


def norm_mlp_backward(M: int, D: int, F: int) -> Work:
    """Four products; dy, x and fc1's result in, dx out; weights and the norm's vectors in, six gradients out."""
    return Work(8 * M * D * F, 3 * M * D + M * F + 4 * D * F + F + 5 * D, 2 * M)


def block(B: int, H: int, N: int, E: int, F: int, keep: bool = False) -> Work:
    """The products of its ops; x, the result, every parameter once, and nothing between them.

    Kept: qkv, the heads' output, the sum after attention and fc1's result, the log-sum-exp of each query, each row's
    statistics of both norms. What a norm gives is computed again.
    """
    M, D = B * N, H * E
    parts = (linear(M, D, 3 * D), attention(B, H, N, N, E), linear(M, D, D), norm_mlp(M, D, F))
    parameters = 4 * D * D + 2 * D * F + F + 9 * D
    return Work(
        sum(part.flops for part in parts), 2 * M * D + parameters + _kept(M, D, F) * keep, _statistics(B, H, N) * keep
    )


def block_backward(B: int, H: int, N: int, E: int, F: int) -> Work:
    """The products of its ops' backwards; dy, x and what was kept in, dx out; parameters in, gradients out."""
    M, D = B * N, H * E
    parts = (
        linear_backward(M, D, 3 * D),
        attention_backward(B, H, N, N, E),
        linear_backward(M, D, D),
        norm_mlp_backward(M, D, F),
    )
    parameters = 8 * D * D + 4 * D * F + F + 13 * D
    return Work(sum(part.flops for part in parts), 3 * M * D + parameters + _kept(M, D, F), _statistics(B, H, N))


def _kept(M: int, D: int, F: int) -> int:
    return M * (5 * D + F)


def _statistics(B: int, H: int, N: int) -> int:
    return B * N * (H + 4)


def patch_embed(B: int, patches: int, values: int, D: int, prefix: int) -> Work:
    """One product over the values of each patch; image, weight, bias, positions and prefix in, tokens out."""
    positions = patches + prefix
    vectors = 1 + positions + prefix + B * positions
    return Work(2 * B * patches * values * D, B * patches * values + values * D + vectors * D)


def patch_embed_backward(B: int, patches: int, values: int, D: int, prefix: int) -> Work:
    """The weight's gradient is one product; an image needs none. dy and image in, the parameters' gradients out."""
    positions = patches + prefix
    vectors = 1 + positions + prefix + B * positions
    return Work(2 * B * patches * values * D, B * patches * values + values * D + vectors * D)
