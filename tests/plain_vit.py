"""A Vision Transformer of options as plain PyTorch writes it, image by image, from a model's parameters alone."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_vit(
    state: Mapping[str, Tensor],
    image: Tensor,
    positions: Tensor | None,
    num_heads: int,
    *,
    eps: float = 1e-6,
    mask: Tensor | None = None,
    factors: Sequence[float] | None = None,
) -> Tensor:
    """Tokens (N, D) of one image (C, height, width) behind the last block and norm.

    Args:
        state: timm's names, ``blocks.i.attn.relative_keys`` beside them.
        positions: (N, D) for all tokens, or for the patches alone.
        mask: what is added to the logits (N, N).
        factors: of the branches, two for each block, as drop path draws them.
    """
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(image[None], weight, state["patch_embed.proj.bias"], stride=weight.shape[2:]).flatten(2)[0].t()
    if positions is not None and positions.shape[0] == x.shape[0]:
        x, positions = x + positions, None
    prefix = [state[name][0] for name in ("cls_token", "reg_token") if name in state]
    x = torch.cat([*prefix, x])
    x = x if positions is None else x + positions
    depth = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
    for i in range(depth):
        block = {name[len(f"blocks.{i}.") :]: t for name, t in state.items() if name.startswith(f"blocks.{i}.")}
        scale1, scale2 = (1.0, 1.0) if factors is None else factors[2 * i : 2 * i + 2]
        x = x + scale1 * _scaled(_attention(block, _norm(block, "norm1", x, eps), num_heads, mask, eps), block, "ls1")
        h = F.gelu(F.linear(_norm(block, "norm2", x, eps), block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
        x = x + scale2 * _scaled(F.linear(h, block["mlp.fc2.weight"], block["mlp.fc2.bias"]), block, "ls2")
    return _norm(state, "norm", x, eps)


def _norm(state: Mapping[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    if f"{name}.weight" not in state:
        return x
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _scaled(y: Tensor, block: Mapping[str, Tensor], name: str) -> Tensor:
    return y * block[f"{name}.gamma"] if f"{name}.gamma" in block else y


def _attention(block: Mapping[str, Tensor], x: Tensor, num_heads: int, mask: Tensor | None, eps: float) -> Tensor:
    tokens, width = x.shape
    qkv = F.linear(x, block["attn.qkv.weight"], block["attn.qkv.bias"])
    q, k, v = qkv.view(tokens, 3, num_heads, -1).permute(1, 2, 0, 3)
    q, k = _norm(block, "attn.q_norm", q, eps), _norm(block, "attn.k_norm", k, eps)
    logits = q @ k.mT
    if "attn.relative_keys" in block:
        keys = block["attn.relative_keys"]  # key n of query m lies m - n + N - 1 rows down
        rows = [keys[[m - n + tokens - 1 for n in range(tokens)]] for m in range(tokens)]
        logits = logits + torch.einsum("hme,mne->hmn", q, torch.stack(rows))
    logits = logits / (width // num_heads) ** 0.5
    weights = (logits if mask is None else logits + mask).softmax(-1)
    return F.linear((weights @ v).transpose(0, 1).flatten(1), block["attn.proj.weight"], block["attn.proj.bias"])
