"""Architectures of three libraries in sizes that take milliseconds, every weight random: data for compatibility.py.

All of them have two blocks per tower, a width of 48 or 64 and token counts that are no multiple of anything.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from models import images, randomize, timm
from timm.layers import LayerNorm
from timm.models import beit, deit, eva, naflexvit, vision_transformer as vit
from torch import Tensor, nn
from torchvision.models import vision_transformer as torchvision_vit

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    family: what the row is about, and package: of which library.
    make: the model with its library's own initial weights.
    inputs: the arguments of its forward, by name.
    eager: how many of its blocks ``accelerate`` leaves eager or fuses in parts; why: words of what the report says.
    limits: what the untouched model cannot do either, column of the table -> words of its error.
    """

    family: str
    package: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    eager: int = 0
    why: str = ""
    limits: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.package}: {self.family}"

    def build(self) -> nn.Module:
        """The model in eval mode with random weights, the same in every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return randomize(self.make()).eval()


def picture(name: str, side: int = 40, **more: Tensor) -> Callable[[], Inputs]:
    """Two images as the argument of that name, and others beside them."""
    return lambda: {name: images(2, side), **more}


TIMM = {"img_size": 40, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 33}


def of_timm(
    family: str, cls: Callable[..., nn.Module], eager: tuple[int, str] = (0, ""), **options: Any
) -> Architecture:
    """``eager``: how many blocks are not fused as a whole, and why."""
    given = {**TIMM, **options}
    return Architecture(family, "timm", partial(cls, **given), picture("x", given["img_size"]), *eager)


def clip_tower() -> nn.Module:
    norm = partial(LayerNorm, eps=1e-5)
    return vit.VisionTransformer(**TIMM, pre_norm=True, act_layer="quick_gelu", norm_layer=norm)


def hybrid_vit(**options: Any) -> nn.Module:
    """A ViT on the feature map of a small ResNet v2, as timm's R26 builds it; its patches are single positions."""
    stem = timm.models.resnetv2.ResNetV2(
        layers=(1, 1),
        channels=(16, 32),
        num_classes=0,
        global_pool="",
        in_chans=3,
        preact=False,
        stem_type="same",
        norm_layer=partial(timm.layers.GroupNormAct, num_groups=8),
        conv_layer=partial(timm.layers.StdConv2dSame, eps=1e-8),
        stem_chs=16,
    )
    return vit.VisionTransformer(**options, embed_layer=partial(timm.layers.HybridEmbed, stem, proj=True))


def naflex() -> nn.Module:
    config = naflexvit.NaFlexVitCfg(
        patch_size=8, embed_dim=48, depth=2, num_heads=3, pos_embed_grid_size=(4, 4), reg_tokens=1
    )
    return naflexvit.NaFlexVit(config, num_classes=33, img_size=40)


ROPE = {"use_rot_pos_emb": True, "num_heads": 3}
DINOV3 = {
    **ROPE,
    "use_abs_pos_emb": False,
    "qkv_bias": False,
    "init_values": 1e-5,
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "num_reg_tokens": 4,
    "use_fc_norm": False,
    "dynamic_img_size": True,
    "norm_layer": partial(LayerNorm, eps=1e-5),
}
NAVER = {
    **ROPE,
    "attn_type": "rope",
    "init_values": 1e-5,
    "global_pool": "token",
    "use_abs_pos_emb": False,
    "rope_grid_indexing": "xy",
}

OF_TIMM = [
    of_timm("ViT (AugReg)", vit.VisionTransformer),
    of_timm("ViT, mean pooled", vit.VisionTransformer, class_token=False, global_pool="avg", qkv_bias=False),
    of_timm("DeiT distilled", deit.VisionTransformerDistilled),
    of_timm("DeiT III", vit.VisionTransformer, no_embed_class=True, init_values=1e-6),
    of_timm("DINOv2", vit.VisionTransformer, init_values=1e-5, img_size=42, patch_size=14),
    of_timm("DINOv2, registers", vit.VisionTransformer, init_values=1e-5, reg_tokens=4, no_embed_class=True),
    Architecture("CLIP tower", "timm", clip_tower, picture("x")),
    of_timm("SigLIP tower", vit.VisionTransformer, class_token=False, global_pool="map", act_layer="gelu_tanh"),
    of_timm("qk-norm", vit.VisionTransformer, qk_norm=True),
    of_timm("hybrid (R26)", hybrid_vit, img_size=48, patch_size=1),
    of_timm("ViT-22B, parallel scaling", vit.VisionTransformer, block_fn=vit.ParallelScalingBlock, qk_norm=True),
    of_timm(
        "parallel things",
        vit.VisionTransformer,
        block_fn=vit.ParallelThingsBlock,
        init_values=1e-4,
        eager=(2, "ParallelThingsBlock: its parts are fused one by one"),
    ),
    of_timm("EVA", eva.Eva),
    of_timm("EVA-02", eva.Eva, swiglu_mlp=True, mlp_ratio=8 / 3, ref_feat_shape=(5, 5), **ROPE),
    of_timm("EVA-02, inner norms", eva.Eva, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, **ROPE),
    of_timm("DINOv3", eva.Eva, **DINOV3),
    of_timm("RoPE, axial", eva.Eva, rope_temperature=100.0, **NAVER),
    of_timm("RoPE, mixed", eva.Eva, rope_temperature=10.0, rope_type="mixed", **NAVER),
    of_timm("BEiT", beit.Beit, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True),
    Architecture("NaFlexViT", "timm", naflex, picture("x")),
]

SIZE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
WIDTH = {**SIZE, "intermediate_size": 96}
IMAGE = {"image_size": 40, "patch_size": 8}
LABELS = {"num_labels": 33}


def of_transformers(
    family: str,
    model: str,
    config: str,
    inputs: Callable[[], Inputs] | None = None,
    eager: tuple[int, str] = (0, ""),
    **options: Any,
) -> Architecture:
    """``eager``: how many blocks are not fused as a whole, and why."""

    def make() -> nn.Module:
        return getattr(transformers, model)(getattr(transformers, config)(**{**WIDTH, **IMAGE, **options}))

    return Architecture(family, "transformers", make, inputs or picture("pixel_values"), *eager)


TEXT = {
    "vocab_size": 50,
    "max_position_embeddings": 9,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 49,
    **WIDTH,
}
IDS = torch.tensor([[0, 5, 9, 11, 49, 1, 1], [0, 17, 3, 22, 8, 30, 49]])
MASK = (IDS != 1).long()


def two_towers(kind: str) -> Architecture:
    def make() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(
            text_config=dict(TEXT), vision_config={**WIDTH, **IMAGE}, projection_dim=32
        )
        return getattr(transformers, f"{kind}Model")(config)

    inputs = picture("pixel_values", input_ids=IDS, attention_mask=MASK)
    return Architecture(f"{kind}, both towers", "transformers", make, inputs)


def captioner() -> nn.Module:
    encoder = transformers.ViTConfig(**WIDTH, **IMAGE)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    decoder = transformers.BertConfig(**TEXT, **dropout, is_decoder=True, add_cross_attention=True, use_cache=False)
    return transformers.VisionEncoderDecoderModel(
        transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    )


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**WIDTH, **IMAGE)
    text = transformers.LlamaConfig(**{**TEXT, "max_position_embeddings": 64}, use_cache=False)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=48, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


PROMPT = torch.cat([torch.full((2, 25), 48), IDS], 1)


OF_TRANSFORMERS = [
    of_transformers("ViT", "ViTForImageClassification", "ViTConfig", **LABELS),
    of_transformers("DeiT, two heads", "DeiTForImageClassificationWithTeacher", "DeiTConfig", **LABELS),
    of_transformers("DINOv2", "Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2, **LABELS),
    of_transformers("DINOv2, SwiGLU", "Dinov2Model", "Dinov2Config", mlp_ratio=2, use_swiglu_ffn=True),
    of_transformers("DINOv2, registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2),
    of_transformers("DINOv3", "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4, pos_embed_rescale=None),
    of_transformers(
        "DINOv3, SwiGLU",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        use_gated_mlp=True,
        hidden_act="silu",
        pos_embed_rescale=None,
    ),
    of_transformers(
        "BEiT",
        "BeitForImageClassification",
        "BeitConfig",
        drop_path_rate=0.0,
        use_relative_position_bias=True,
        **LABELS,
    ),
    of_transformers(
        "Data2Vec",
        "Data2VecVisionModel",
        "Data2VecVisionConfig",
        drop_path_rate=0.0,
        use_shared_relative_position_bias=True,
        eager=(2, "Data2VecVisionLayer"),
    ),
    of_transformers("CLIP tower", "CLIPVisionModel", "CLIPVisionConfig"),
    two_towers("CLIP"),
    of_transformers("SigLIP tower", "SiglipVisionModel", "SiglipVisionConfig"),
    two_towers("Siglip"),
    of_transformers(
        "MAE",
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        picture("pixel_values", noise=torch.rand(2, 25, generator=torch.Generator().manual_seed(3))),
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
    ),
    of_transformers("MSN", "ViTMSNModel", "ViTMSNConfig"),
    of_transformers("I-JEPA", "IJepaModel", "IJepaConfig"),
    of_transformers(
        "YOLOS", "YolosModel", "YolosConfig", image_size=[40, 48], num_detection_tokens=5, eager=(2, "YolosLayer")
    ),
    Architecture(
        "ViT + BERT captioner",
        "transformers",
        captioner,
        picture("pixel_values", decoder_input_ids=IDS, decoder_attention_mask=MASK),
        *(2, "BertLayer"),
    ),
    Architecture(
        "LLaVA",
        "transformers",
        llava,
        picture("pixel_values", input_ids=PROMPT, attention_mask=(PROMPT != 1).long()),
        *(2, "LlamaDecoderLayer"),
        limits={"compile": "Unsupported context manager", "ONNX": "Failed to convert the exported program"},
    ),
]

TORCHVISION = {"image_size": 40, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96}


def of_torchvision(family: str, **options: Any) -> Architecture:
    given = {**TORCHVISION, "num_classes": 33, **options}
    return Architecture(family, "torchvision", partial(torchvision_vit.VisionTransformer, **given), picture("x"))


STEM = [torchvision_vit.ConvStemConfig(16, 3, 2), torchvision_vit.ConvStemConfig(32, 3, 2)]

OF_TORCHVISION = [
    of_torchvision("ViT"),
    of_torchvision("ViT, pre-logits", representation_size=24),
    of_torchvision("ViT, conv stem", conv_stem_configs=[*STEM, torchvision_vit.ConvStemConfig(48, 3, 2)]),
]

ARCHITECTURES = {a.name: a for a in (*OF_TIMM, *OF_TRANSFORMERS, *OF_TORCHVISION)}
