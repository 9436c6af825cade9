"""google-research/vision_transformer written from its definition, on its own names and order of dimensions.

NHWC images, kernels (height, width, in, out), weights standardised by w / (std + 1e-5), GroupNorm and LayerNorm with
eps 1e-6, GELU in its tanh form. Any dtype; in fp64 it is the reference of the .npz tests.
"""

import numpy
import torch
import torch.nn.functional as F

ORDER = {"original": (1, 2, 3), "big_vision": (0, 1, 0)}  # numbers of attention, second norm and MLP in a block


def draw(rng, *shape, mean=0.0, std=None):
    std = (numpy.prod(shape[:-1]) or 1) ** -0.5 if std is None else std
    return (mean + std * rng.standard_normal(shape)).astype(numpy.float32)


def norm_weights(rng, name, width):
    return {f"{name}/scale": draw(rng, width, mean=1, std=0.2), f"{name}/bias": draw(rng, width, std=0.2)}


def dense(rng, name, *shape, inputs=1):
    fan_in = int(numpy.prod(shape[:inputs]))
    return {
        f"{name}/kernel": draw(rng, *shape, std=fan_in**-0.5),
        f"{name}/bias": draw(rng, *shape[inputs:], std=0.2),
    }


def attention_weights(rng, name, width, heads):
    each, found = width // heads, dense(rng, f"{name}/out", heads, width // heads, width, inputs=2)
    for part in ("query", "key", "value"):
        found |= dense(rng, f"{name}/{part}", width, heads, each)
    return found


def stem_weights(rng, layers):
    """A ResNet whose stage i has layers[i] units, 64 · 2^i wide inside and four times that outside."""
    found = {"conv_root/kernel": draw(rng, 7, 7, 3, 64, std=0.1), **norm_weights(rng, "gn_root", 64)}
    width = 64
    for stage, units in enumerate(layers):
        inner, outer = 64 * 2**stage, 256 * 2**stage
        for unit in range(units):
            at = f"block{stage + 1}/unit{unit + 1}"
            for part, (k, i, o) in enumerate(((1, width, inner), (3, inner, inner), (1, inner, outer)), 1):
                found[f"{at}/conv{part}/kernel"] = draw(rng, k, k, i, o, std=0.1)
                found |= norm_weights(rng, f"{at}/gn{part}", o)
            if unit == 0:
                found[f"{at}/conv_proj/kernel"] = draw(rng, 1, 1, width, outer, std=0.1)
                found |= norm_weights(rng, f"{at}/gn_proj", outer)
            width = outer
    return found


def weights(grid=4, patch=8, classes=7, representation=None, layers=None, order="original"):
    """Arrays by the names of an original .npz file."""
    rng, (attention, norm, mlp) = numpy.random.default_rng(0), ORDER[order]
    width, heads, hidden, depth = 48, 3, 96, 2
    channels = 3 if layers is None else 256 * 2 ** (len(layers) - 1) if layers else 64
    found = {} if layers is None else stem_weights(rng, layers)
    found |= dense(rng, "embedding", patch, patch, channels, width, inputs=3)
    found["cls"] = draw(rng, 1, 1, width, std=0.5)
    found["Transformer/posembed_input/pos_embedding"] = draw(rng, 1, grid * grid + 1, width, std=0.5)
    for i in range(depth):
        at = f"Transformer/encoderblock_{i}"
        found |= norm_weights(rng, f"{at}/LayerNorm_0", width)
        found |= attention_weights(rng, f"{at}/MultiHeadDotProductAttention_{attention}", width, heads)
        found |= norm_weights(rng, f"{at}/LayerNorm_{norm}", width)
        found |= dense(rng, f"{at}/MlpBlock_{mlp}/Dense_0", width, hidden)
        found |= dense(rng, f"{at}/MlpBlock_{mlp}/Dense_1", hidden, width)
    found |= norm_weights(rng, "Transformer/encoder_norm", width)
    if representation:
        found |= dense(rng, "pre_logits", width, representation)
    if classes:
        found |= dense(rng, "head", representation or width, classes)
    return found


def conv(x, kernel, stride=1, same=True):
    """Convolution of NHWC images; SAME pads so that ceil(size / stride) positions remain, the odd one behind."""
    x = x.permute(0, 3, 1, 2)
    if same:
        x = F.pad(x, same_padding(x, kernel.shape[0], stride))
    return F.conv2d(x, kernel.permute(3, 2, 0, 1), stride=stride).permute(0, 2, 3, 1)


def same_padding(x, side, stride):
    found = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + side - size, 0)
        found += [total // 2, total - total // 2]
    return found


def standardised(kernel):
    mean, std = kernel.mean((0, 1, 2)), kernel.std((0, 1, 2), unbiased=False)
    return (kernel - mean) / (std + 1e-5)


def group_norm(x, scale, bias):
    return F.group_norm(x.permute(0, 3, 1, 2), 32, scale.flatten(), bias.flatten(), 1e-6).permute(0, 2, 3, 1)


def resnet(w, x, layers):
    def conv_norm(x, at, conv_name, norm_name, stride=1):
        x = conv(x, standardised(w[f"{at}{conv_name}/kernel"]), stride)
        return group_norm(x, w[f"{at}{norm_name}/scale"], w[f"{at}{norm_name}/bias"])

    x = conv_norm(x, "", "conv_root", "gn_root", 2).relu().permute(0, 3, 1, 2)
    x = F.max_pool2d(F.pad(x, same_padding(x, 3, 2), value=-torch.inf), 3, 2).permute(0, 2, 3, 1)
    for stage, units in enumerate(layers):
        for unit in range(units):
            at, stride = f"block{stage + 1}/unit{unit + 1}/", 2 if stage and not unit else 1
            shortcut = x if unit else conv_norm(x, at, "conv_proj", "gn_proj", stride)
            y = conv_norm(x, at, "conv1", "gn1").relu()
            y = conv_norm(y, at, "conv2", "gn2", stride).relu()
            x = (shortcut + conv_norm(y, at, "conv3", "gn3")).relu()
    return x


def logits(arrays, image, layers=None, order="original"):
    """(B, 3, height, width) to (B, classes), in the image's dtype."""
    w = {name: torch.from_numpy(array).to(image.dtype) for name, array in arrays.items()}
    attention, norm_number, mlp = ORDER[order]

    def norm(x, at):
        return F.layer_norm(x, x.shape[-1:], w[f"{at}/scale"], w[f"{at}/bias"], 1e-6)

    x = image.permute(0, 2, 3, 1)
    if layers is not None:
        x = resnet(w, x, layers)
    kernel = w["embedding/kernel"]
    x = (conv(x, kernel, kernel.shape[0], same=False) + w["embedding/bias"]).flatten(1, 2)
    x = torch.cat([w["cls"].expand(len(x), -1, -1), x], 1) + w["Transformer/posembed_input/pos_embedding"]
    depth = len({name.split("/")[1] for name in w if "encoderblock_" in name})
    for i in range(depth):
        at = f"Transformer/encoderblock_{i}"
        y, mha = norm(x, f"{at}/LayerNorm_0"), f"{at}/MultiHeadDotProductAttention_{attention}"
        q, k, v = (
            torch.einsum("bnd,dhe->bnhe", y, w[f"{mha}/{part}/kernel"]) + w[f"{mha}/{part}/bias"]
            for part in ("query", "key", "value")
        )
        p = (torch.einsum("bnhe,bmhe->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        y = torch.einsum("bhnm,bmhe->bnhe", p, v)
        x = x + torch.einsum("bnhe,hed->bnd", y, w[f"{mha}/out/kernel"]) + w[f"{mha}/out/bias"]
        y = norm(x, f"{at}/LayerNorm_{norm_number}") @ w[f"{at}/MlpBlock_{mlp}/Dense_0/kernel"]
        y = F.gelu(y + w[f"{at}/MlpBlock_{mlp}/Dense_0/bias"], approximate="tanh")
        x = x + y @ w[f"{at}/MlpBlock_{mlp}/Dense_1/kernel"] + w[f"{at}/MlpBlock_{mlp}/Dense_1/bias"]
    x = norm(x, "Transformer/encoder_norm")[:, 0]
    if "pre_logits/kernel" in w:
        x = (x @ w["pre_logits/kernel"] + w["pre_logits/bias"]).tanh()
    return x @ w["head/kernel"] + w["head/bias"] if "head/kernel" in w else x
