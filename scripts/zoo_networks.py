"""The networks of the zoo: small variants of known architectures, with weights as after training; used by zoo.py.

Nothing is downloaded. Depth and width are cut by the constructors' own arguments: each kind of step stays.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
from saliency_sanity import Wrapped
from torch import Tensor, nn

CLASSES = 10


class Network(NamedTuple):
    """How an architecture is built, its image size in pixels, and what is known of it from its paper.

    `rectified`: ReLU and ReLU6 are its only activations besides gates, so that Guided Backprop is defined for it.
    """

    library: str
    build: Callable[[], nn.Module]
    pixels: int = 64
    rectified: bool = False


# ---------------------------------------------------------------- torchvision


def _narrow(name: str, places: tuple[int, ...], width: int = 64) -> nn.Module:
    """AlexNet and VGG with narrow linear layers at the end: those of the originals have up to 120 million weights."""
    from torchvision import models

    model = getattr(models, name)(num_classes=CLASSES)
    inputs = model.classifier[places[0]].in_features
    for place, outputs in zip(places, (width, width, CLASSES)):
        model.classifier[place] = nn.Linear(inputs, outputs)
        inputs = outputs
    return model


def _vision(name: str, **options) -> nn.Module:
    from torchvision import models

    return getattr(models, name)(num_classes=CLASSES, **options)


def _resnet(block: str, layers: int = 1, **options) -> nn.Module:
    from torchvision.models import resnet

    return resnet.ResNet(getattr(resnet, block), [layers] * 4, num_classes=CLASSES, **options)


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=16, block_config=(2, 2, 2, 2), num_init_features=32, num_classes=CLASSES)


def _efficientnet_v2() -> nn.Module:
    from torchvision.models import efficientnet as e

    blocks = [
        e.FusedMBConvConfig(1, 3, 1, 16, 16, 1),
        e.FusedMBConvConfig(4, 3, 2, 16, 32, 2),
        e.MBConvConfig(4, 3, 2, 32, 48, 2),
        e.MBConvConfig(6, 3, 2, 48, 64, 1),
    ]
    return e.EfficientNet(blocks, 0.2, num_classes=CLASSES, norm_layer=partial(nn.BatchNorm2d, eps=1e-3))


def _convnext() -> nn.Module:
    from torchvision.models import convnext as c

    return c.ConvNeXt([c.CNBlockConfig(24, 48, 2), c.CNBlockConfig(48, 96, 2)] + [c.CNBlockConfig(96, None, 1)],
                      num_classes=CLASSES)  # fmt: skip


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=CLASSES)


def _swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as s

    new = {"block": s.SwinTransformerBlockV2, "downsample_layer": s.PatchMergingV2} if version == 2 else {}
    return s.SwinTransformer([4, 4], 24, [2, 2, 2], [2, 4, 4], [4, 4], num_classes=CLASSES, **new)


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 16, 2, [16, 32], [1, 2], 8, 0.0, num_classes=CLASSES)


# ---------------------------------------------------------------- timm and transformers


def _timm(name: str, **options) -> nn.Module:
    from timm import create_model

    return create_model(name, pretrained=False, num_classes=CLASSES, **options)


def _timm_class(module: str, name: str, *sizes, **options) -> nn.Module:
    """An architecture whose named variants fix its depth."""
    return getattr(import_module(f"timm.models.{module}"), name)(*sizes, num_classes=CLASSES, **options)


_VIT = {"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 2}


def _transformers(kind: str, wrapped: bool = True, **options) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **options)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    return Wrapped(model, output="logits") if wrapped else model


_HF_VIT = {
    "image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip

tv, ti, hf = "torchvision", "timm", "transformers"
NETWORKS: dict[str, Network] = {
    "AlexNet": Network(tv, partial(_narrow, "alexnet", (1, 4, 6)), rectified=True),
    "VGG-11": Network(tv, partial(_narrow, "vgg11", (0, 3, 6)), rectified=True),
    "VGG-11 with batch norm": Network(tv, partial(_narrow, "vgg11_bn", (0, 3, 6)), rectified=True),
    "ResNet-18": Network(tv, partial(_vision, "resnet18"), rectified=True),
    "ResNet with bottlenecks": Network(tv, partial(_resnet, "Bottleneck", 2), rectified=True),
    "ResNeXt": Network(tv, partial(_resnet, "Bottleneck", groups=32, width_per_group=4), rectified=True),
    "Wide ResNet": Network(tv, partial(_resnet, "Bottleneck", width_per_group=128), rectified=True),
    "DenseNet": Network(tv, _densenet, rectified=True),
    "SqueezeNet 1.0": Network(tv, partial(_vision, "squeezenet1_0"), rectified=True),
    "SqueezeNet 1.1": Network(tv, partial(_vision, "squeezenet1_1"), rectified=True),
    "GoogLeNet": Network(tv, partial(_vision, "googlenet", init_weights=False), rectified=True),
    "Inception v3": Network(tv, partial(_vision, "inception_v3", init_weights=False), 75, rectified=True),
    "MobileNet v2": Network(tv, partial(_vision, "mobilenet_v2", width_mult=0.5), rectified=True),
    "MobileNet v3": Network(tv, partial(_vision, "mobilenet_v3_small")),
    "MNASNet": Network(tv, partial(_vision, "mnasnet0_5"), rectified=True),
    "ShuffleNet v2": Network(tv, partial(_vision, "shufflenet_v2_x0_5"), rectified=True),
    "EfficientNet": Network(tv, partial(_vision, "efficientnet_b0")),
    "EfficientNet v2": Network(tv, _efficientnet_v2),
    "RegNet X": Network(tv, partial(_vision, "regnet_x_400mf"), rectified=True),
    "RegNet Y": Network(tv, partial(_vision, "regnet_y_400mf"), rectified=True),
    "ConvNeXt": Network(tv, _convnext),
    "ViT": Network(tv, _vit),
    "Swin": Network(tv, partial(_swin, 1)),
    "Swin v2": Network(tv, partial(_swin, 2)),
    "MaxViT": Network(tv, _maxvit),
    "ResNet v2": Network(ti, partial(_timm, "resnetv2_50", layers=[1, 1, 1, 1]), rectified=True),
    "BiT (group norm)": Network(
        ti, partial(_timm_class, "resnetv2", "ResNetV2", [1, 1, 1, 1], stem_type="fixed"), rectified=True
    ),
    "SE-ResNet": Network(ti, partial(_timm, "seresnet50", layers=[1, 1, 1, 1]), rectified=True),
    "Res2Net": Network(ti, partial(_timm, "res2net50_26w_4s", layers=[1, 1, 1, 1]), rectified=True),
    "ResNeSt": Network(ti, partial(_timm, "resnest14d"), rectified=True),
    "NFNet": Network(ti, partial(_timm, "nf_resnet26"), rectified=True),
    "NFNet with gates": Network(ti, partial(_timm, "eca_nfnet_l0")),
    "RepVGG": Network(ti, partial(_timm, "repvgg_a0"), rectified=True),
    "DLA": Network(ti, partial(_timm, "dla46_c"), rectified=True),
    "HRNet": Network(ti, partial(_timm, "hrnet_w18_small"), rectified=True),
    "VoVNet": Network(ti, partial(_timm, "ese_vovnet19b_slim_dw"), rectified=True),
    "Xception": Network(ti, partial(_timm, "legacy_xception"), 75, rectified=True),
    "GhostNet": Network(ti, partial(_timm, "ghostnet_050"), rectified=True),
    "MobileNet v3 (timm)": Network(ti, partial(_timm, "mobilenetv3_small_050")),
    "EfficientNet-Lite": Network(ti, partial(_timm, "efficientnet_lite0"), rectified=True),
    "ConvNeXt v2": Network(ti, partial(_timm, "convnextv2_atto", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64))),
    "ConvMixer": Network(ti, partial(_timm_class, "convmixer", "ConvMixer", 48, 3, kernel_size=5)),
    "PoolFormer": Network(ti, partial(_timm, "poolformer_s12")),
    "MLP-Mixer": Network(ti, partial(_timm_class, "mlp_mixer", "MlpMixer", img_size=64, num_blocks=2, embed_dim=48)),
    "DeiT, distilled": Network(ti, partial(_timm, "deit_tiny_distilled_patch16_224", **_VIT)),
    "ViT with registers": Network(ti, partial(_timm, "vit_small_patch14_reg4_dinov2", **_VIT | {"img_size": 70}), 70),
    "EVA-02": Network(ti, partial(_timm, "eva02_tiny_patch14_224", **_VIT | {"img_size": 70}), 70),
    "BEiT": Network(ti, partial(_timm, "beit_base_patch16_224", **_VIT)),
    "CaiT": Network(ti, partial(_timm, "cait_xxs24_224", **_VIT)),
    "XCiT": Network(ti, partial(_timm, "xcit_nano_12_p16_224", **_VIT)),
    "LeViT": Network(ti, partial(_timm, "levit_128s", img_size=64)),
    "EfficientFormer": Network(ti, partial(_timm, "efficientformer_l1"), 224),
    "MobileViT": Network(ti, partial(_timm, "mobilevit_xxs")),
    "CoAtNet": Network(ti, partial(_timm, "coatnet_nano_rw_224", img_size=64)),
    "ViT (transformers)": Network(hf, partial(_transformers, "ViT", **_HF_VIT)),
    "ViT (transformers), not wrapped": Network(hf, partial(_transformers, "ViT", wrapped=False, **_HF_VIT)),
    "Swin (transformers)": Network(
        hf,
        partial(_transformers, "Swin", image_size=64, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4),
    ),
    "ResNet (transformers)": Network(
        hf,
        partial(_transformers, "ResNet", embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1]),
        rectified=True,
    ),
    "ConvNeXt (transformers)": Network(
        hf, partial(_transformers, "ConvNext", hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1])
    ),
}


# ---------------------------------------------------------------- weights and images


def example(pixels: int, count: int = 2, seed: int = 0) -> Tensor:
    """Images `(count, 3, pixels, pixels)` in float64: coarse and fine noise of equal strength."""
    draw = torch.Generator().manual_seed(seed)
    coarse, fine = (torch.randn(count, 3, size, size, generator=draw, dtype=torch.float64) for size in (8, pixels))
    return (nn.functional.interpolate(coarse, size=(pixels, pixels), mode="bilinear") + fine) / 2**0.5


@torch.no_grad()
def _move(model: nn.Module, pixels: int, seed: int) -> None:
    """Move every weight away from its initial value, by noise of its own scale, and measure batch norms' statistics.

    What starts at zero or as one constant, and so hides a fault, is filled: embeddings, biases, layer scales, norms.
    """
    draw = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw, dtype=torch.float64).to(like)

    for name, weight in model.named_parameters():
        spread, size = float(weight.std(correction=0)), float(weight.abs().mean())
        inputs = weight.numel() / weight.shape[0]
        if spread > 1e-3 * size:
            weight += max(0.5 * spread, 1 / inputs**0.5 if weight.ndim > 1 else 0) * noise(weight)
        elif size > 0.05:
            weight *= 1 + 0.2 * noise(weight)
        elif "bias" in name:
            weight += 0.1 * noise(weight)
        elif max(weight.shape) == weight.numel():  # a layer scale, or the last norm of a block
            weight.copy_(0.5 + 0.1 * noise(weight))
        else:
            weight.copy_(noise(weight) / inputs**0.5)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    model(example(pixels, 16, seed + 1).float())
    for norm, momentum in zip(norms, momenta):
        norm.training, norm.momentum = False, momentum
        norm.running_mean += 0.1 * norm.running_var.sqrt() * noise(norm.running_mean)
        norm.running_var *= torch.exp(0.2 * noise(norm.running_var))


def network(name: str, seed: int = 0) -> nn.Module:
    """The architecture with weights moved by `seed`, in eval mode, in float32; torch's random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[name].build().eval()
    _move(model, NETWORKS[name].pixels, seed)
    return model
