"""What a pre-norm encoder block is made of, whichever library's module holds it.

The fused forwards, quantisation, released weights and attention maps all work on this one form (paper, equations 2, 3):

    z' = z + drop_path1(γ₁ · proj_drop(MSA(LN₁(z))))
    z'' = z' + drop_path2(γ₂ · drop(fc2(hidden_drop(act(fc1(LN₂(z'))))))

A reader, a function of the module, fills it in at each call, so that what a user changes in his model is seen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

# where accelerate leaves the reader of a block's parts; our own blocks have it in their class
PARTS = "_fastvit_parts"

Norm = tuple[Tensor | None, Tensor | None, float]


class LinearParts(NamedTuple):
    """weight (N, K) and bias (N,) of a linear layer."""

    weight: Tensor
    bias: Tensor | None


class AttentionParts(NamedTuple):
    """Multi-head self-attention.

    qkv_weights: one (3·H·E, D), or those of queries, keys and values (H·E, D); qkv_biases: as many, or None among them.
    q_norm, k_norm: LayerNorm over E of each head's queries and keys, or None.
    dropout: the rate at which the softmax's rows are dropped now.
    relative_keys: (2·N - 1, E), the keys of distances (see ``fastvit.positions``), or None.
    """

    qkv_weights: tuple[Tensor, ...]
    qkv_biases: tuple[Tensor | None, ...]
    num_heads: int
    scale: float
    q_norm: Norm | None
    k_norm: Norm | None
    dropout: float
    proj: LinearParts
    proj_drop: nn.Module
    relative_keys: Tensor | None = None


class MlpParts(NamedTuple):
    """Linear → activation, by the ops' name → linear, with the dropouts behind both."""

    fc1: LinearParts
    activation: str
    hidden_drop: nn.Module
    fc2: LinearParts
    drop: nn.Module


class BlockParts(NamedTuple):
    """A pre-norm block; layer_scale1 and layer_scale2 are γ (D,) or None."""

    norm1: Norm
    attention: AttentionParts
    layer_scale1: Tensor | None
    drop_path1: nn.Module
    norm2: Norm
    mlp: MlpParts
    layer_scale2: Tensor | None
    drop_path2: nn.Module

    def tensors(self) -> list[Any]:
        """The tensors in the order of :class:`fastvit.ops.EncoderBlock`; several in a tuple stand for one."""
        attention, mlp = self.attention, self.mlp
        return [
            *self.norm1[:2],
            one_or_all(attention.qkv_weights),
            one_or_all(attention.qkv_biases),
            *attention.proj,
            self.layer_scale1,
            *self.norm2[:2],
            *mlp.fc1,
            *mlp.fc2,
            self.layer_scale2,
        ]


def one_or_all(tensors: tuple[Any, ...]) -> Any:
    """The only one of them, None where all are None, or the tuple."""
    return tensors[0] if len(tensors) == 1 or all(t is None for t in tensors) else tensors


# in the place of a dropout that a library's module does not have
ABSENT = nn.Identity()

_ACTIVATIONS = {
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
}


def activation_name(module: nn.Module) -> str | None:
    """The ops' name of an activation module (torch's, timm's, transformers' or ours), or None when they have none."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(type(module).__name__)


def activation_of(act: nn.Module) -> str:
    """The ops' name of an activation module; TypeError when they have none."""
    name = activation_name(act)
    if name is None:  # one that was put there after accelerate had looked
        raise TypeError(f"fastvit: activation {type(act).__name__} has no fused form; expected a GELU")
    return name


def norm_parts(norm: Any) -> Norm | None:
    """weight, bias and eps of a LayerNorm, or None for an Identity."""
    return None if isinstance(norm, nn.Identity) else (norm.weight, norm.bias, norm.eps)


def linear_parts(linear: nn.Linear) -> LinearParts:
    """weight and bias of a torch.nn.Linear."""
    return LinearParts(linear.weight, linear.bias)


def attention_parts(attn: Any) -> AttentionParts:
    """Of an attention module with timm's attribute names."""
    return AttentionParts(
        (attn.qkv.weight,),
        (attn.qkv.bias,),
        attn.num_heads,
        attn.scale,
        norm_parts(attn.q_norm),
        norm_parts(attn.k_norm),
        attn.attn_drop.p if attn.training else 0.0,
        linear_parts(attn.proj),
        attn.proj_drop,
        getattr(attn, "relative_keys", None),
    )


def mlp_parts(mlp: Any) -> MlpParts:
    """Of an MLP with timm's attribute names."""
    return MlpParts(linear_parts(mlp.fc1), activation_of(mlp.act), mlp.drop1, linear_parts(mlp.fc2), mlp.drop2)


def block_parts(block: Any) -> BlockParts:
    """Of a block with timm's attribute names."""
    norm1, norm2 = block.norm1, block.norm2
    return BlockParts(
        (norm1.weight, norm1.bias, norm1.eps),
        attention_parts(block.attn),
        None if isinstance(block.ls1, nn.Identity) else block.ls1.gamma,
        block.drop_path1,
        (norm2.weight, norm2.bias, norm2.eps),
        mlp_parts(block.mlp),
        None if isinstance(block.ls2, nn.Identity) else block.ls2.gamma,
        block.drop_path2,
    )


def parts_of(block: Any) -> BlockParts:
    """The parts of a fused block: ours, or another library's that accelerate has bound a forward to."""
    reader: Callable[[Any], BlockParts] = getattr(block, PARTS)
    return reader(block)


class Place(NamedTuple):
    """Where a weight is kept: the module, the name of the module's parameter, and the layer's name inside the block."""

    module: nn.Module
    parameter: str
    layer: str


def linear_places(block: nn.Module) -> list[tuple[Place, ...]]:
    """Where a block keeps the weights of qkv (one, or three), proj, fc1 and fc2."""
    parts = parts_of(block)
    mlp = parts.mlp
    weights = (parts.attention.qkv_weights, (parts.attention.proj.weight,), (mlp.fc1.weight,), (mlp.fc2.weight,))
    places = {
        id(tensor): Place(module, parameter, name if parameter == "weight" else f"{name}.{parameter}")
        for name, module in block.named_modules()
        for parameter, tensor in module._parameters.items()
    }
    return [tuple(places[id(tensor)] for tensor in layer) for layer in weights]
