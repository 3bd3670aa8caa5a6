"""The cascade on SqueezeNet with methods that take many passes an image: one tidy frame, computed once.

    python scripts/assets/imagenet_cascade.py            (about seven minutes of one core)

The result is `imagenet_cascade.csv.gz`: a first line `# {...}` of JSON that says how it was made, then the frame of
`sanity.parameter_randomization`, similarities to four places. Besides the frame's own schemes it holds `mirror`, the
trained network's map of the mirrored image, mirrored back.
"""

import gzip
import hashlib
import io
import json
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from saliency_sanity import inference, saliency, sanity, similarity
from saliency_sanity.book import models, photographs
from saliency_sanity.book.assets import assets_folder

PACKAGE = Path(__file__).resolve().parents[2] / "helpers"

OUTPUT = assets_folder() / "imagenet_cascade.csv.gz"
PHOTOGRAPHS = ("chelsea", "coffee")  # the two that the network classifies correctly
COMPOSITES, SCALE, TEXTURES = 10, 0.6, ("brick", "grass", "gravel")
READ = 223  # pixels a side that the network reads of 224; an odd number, so that its strides fit a mirror, too
SEEDS = range(5)
RANDOM = {"init": "truncated_normal", "std": "trained"}
METRICS = ("spearman", "spearman_abs", "ssim", "hog")
STEPS = 8
METHODS = {
    "gradient": saliency.gradient,
    "smoothgrad": partial(saliency.smoothgrad, samples=STEPS),
    "input_x_gradient": saliency.input_x_gradient,
    "integrated_gradients": partial(saliency.integrated_gradients, steps=STEPS),
    "guided_backprop": saliency.guided_backprop,
    "guided_gradcam": saliency.guided_gradcam,
    "gradcam": saliency.gradcam,
}
CONTROLS = ("sobel", "input", "noise")


def choose(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, list[dict]]:
    """Images in [0, 1] that the model classifies correctly, their classes, and how each was made."""
    photos, names = photographs.whole()
    found = [photos[names.index(name)] for name in PHOTOGRAPHS]
    made = [{"photograph": name} for name in PHOTOGRAPHS]
    index = photographs.stamps()
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0)).tolist()
    for position, row in enumerate(order):
        about = {"background": TEXTURES[len(found) % 3], "names": index.name[row], "scale": SCALE, "seed": position}
        pasted = photographs.composites(**about)
        if inference.predict(model, photographs.normalize(pasted.images)).argmax(1) == pasted.labels:
            found.append(pasted.images[0])
            made.append(about)
        if len(found) == len(PHOTOGRAPHS) + COMPOSITES:
            break
    images = torch.stack(found)
    return images, inference.predict(model, photographs.normalize(images), batch_size=4).argmax(1), made


def mirror_rows(model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor) -> pd.DataFrame:
    """Similarity of each map to that of the mirrored image, mirrored back."""
    mirrored, rows = images.clone(), []
    mirrored[..., :READ] = images[..., :READ].flip(-1)
    for label, method in METHODS.items():
        maps = sanity.heat_of(method, model, images, targets, 0)
        back = sanity.heat_of(method, model, mirrored, targets, 1)
        back[..., :READ] = back[..., :READ].flip(-1)
        for metric in METRICS:
            values = similarity.METRICS[metric](maps, back).numpy()
            about = {"scheme": "mirror", "role": "ceiling", "seed": 0, "stage": 0, "layer": ""}
            about |= {"method": label, "metric": metric}
            rows.append(pd.DataFrame({**about, "image": range(len(values)), "similarity": values}))
    return pd.concat(rows)


def code_hash() -> str:
    """SHA-256 over this script and all modules of the package, in the order of their paths."""
    files = [__file__, *sorted(map(str, PACKAGE.rglob("*.py")))]
    return hashlib.sha256(b"".join(open(file, "rb").read() for file in files)).hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    start = time.process_time()
    model = models.load("squeezenet_imagenet")
    raw, targets, made = choose(model)
    images = photographs.normalize(raw)
    cascade = partial(sanity.parameter_randomization, model, images, targets, metrics=METRICS, **RANDOM)
    parts = [cascade(methods=METHODS, seeds=SEEDS), cascade(methods=CONTROLS, seeds=[0], lines=False)]
    frame = pd.concat([*parts, mirror_rows(model, images, targets)])[sanity.COLUMNS]
    about = {
        "made by": "scripts/assets/imagenet_cascade.py",
        "date": date.today().isoformat(),
        "minutes of one core": round((time.process_time() - start) / 60, 1),
        "code": code_hash(),
        "torch": version("torch"),
        "seeds": list(SEEDS),
        "samples and steps": STEPS,
        "images": made,
    }
    text = io.StringIO()
    frame.to_csv(text, index=False, float_format="%.4f")
    content = f"# {json.dumps(about)}\n{text.getvalue()}".encode()
    OUTPUT.write_bytes(gzip.compress(content, mtime=0))
    print(
        f"{OUTPUT.name}: {len(frame):,} rows, {OUTPUT.stat().st_size:,} bytes, {about['minutes of one core']} minutes"
    )


if __name__ == "__main__":
    main()
