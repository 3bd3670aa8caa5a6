"""A panel for trying the test of randomised weights: image, method and stage are chosen, maps are computed on demand.

Where nobody can press a button, because the variable `SANITY_STATIC` is 1 (the build of the pages sets it), the
panel is a figure of what it would show first. The figure's caption, in the cell's metadata, says how to get it live.
"""

import inspect
import io
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import chain

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from .. import plots, randomization, saliency, similarity
from . import photographs

LARGEST = 40_000_000  # pixels of an image that is read; what a phone takes has 12 to 24 million
SMALLEST = 32  # pixels of a side
TRAINED = "trained"
FIRST = 3  # maps that are shown first: of the trained network, and of two randomised ones


class Cancelled(Exception):
    """The reader has stopped the computation."""


def read_image(content: bytes, size: int) -> Tensor:
    """An image file as a network sees it: upright, in RGB, the largest square in its middle.

    Parameters
    ----------
    content : what is in the file, in any format that Pillow reads. Transparent parts become white.
    size : pixels of a side of the result.

    Returns
    -------
    `(3, size, size)` float32 in [0, 1].

    Raises
    ------
    ValueError
        Not an image, a damaged one, one with a side under 32 pixels or with more than 40 million pixels in all.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        width, height = image.size
        if width * height > LARGEST:
            raise ValueError(f"The image has {width} × {height} pixels; {LARGEST // 10**6} million is the most.")
        if min(width, height) < SMALLEST:
            raise ValueError(f"The image has {width} × {height} pixels; {SMALLEST} a side is the least.")
        image = ImageOps.exif_transpose(image).convert("RGBA")
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise ValueError("This file is not an image that can be read; try PNG or JPEG.") from None
    except (OSError, SyntaxError):
        raise ValueError("The image is damaged or not complete.") from None
    white = Image.new("RGBA", image.size, "white")
    pixels = F.pil_to_tensor(Image.alpha_composite(white, image).convert("RGB"))
    return photographs.square_crop(F.to_dtype(pixels, torch.float32, scale=True), size)


def cascade(
    model: nn.Module,
    image: Tensor,
    target: Tensor,
    *,
    method: Callable[..., Tensor],
    last: str,
    seed: int,
    stopped: threading.Event | None = None,
    step: Callable[[str], None] = lambda name: None,
) -> dict[str, Tensor]:
    """Maps of one image while the network is randomised from the top, down to the stage `last`.

    Parameters
    ----------
    model, image, target : a network, its input `(1, C, H, W)`, the class `(1,)` to explain. The model stays as it is.
    method : as in `saliency.METHODS`, its options already given.
    last : the last stage to be made random; `"trained"` for none.
    seed : of the new weights.
    stopped : when set, the computation ends at the network's next pass.
    step : called with each stage's name when its map is there.

    Returns
    -------
    Name of the last stage made random (first `"trained"`) -> signed heatmap `(H, W)`, on the CPU.

    Raises
    ------
    Cancelled
        `stopped` was set.
    """

    def check(*_) -> None:
        if stopped is not None and stopped.is_set():
            raise Cancelled

    maps = {}
    trained = [(TRAINED, deepcopy(model))]
    for name, network in chain(trained, randomization.cascading(model, seed=seed, example=image)):
        check()
        network.register_forward_pre_hook(check)
        maps[name] = saliency.heatmap(method(network, image, target), signed=True)[0].detach().cpu()
        step(name)
        if name == last:
            break
    return maps


def predicted(model: nn.Module, image: Tensor) -> Tensor:
    """The class `(1,)` that a network in eval mode gives an input `(1, C, H, W)`; the model stays as it is."""
    with torch.no_grad():
        return deepcopy(model).eval()(image).argmax(1)


def stage_names(model: nn.Module, image: Tensor) -> list[str]:
    """What can be made random last: nothing, or a stage of the network that reads `image`."""
    return [TRAINED, *(stage.name for stage in randomization.plan(model, example=image).stages)]


def figure(picture: Tensor, maps: Mapping[str, Tensor], *, signed: bool) -> Figure:
    """The picture and the maps of a cascade, each with its rank correlation to the trained network's map."""
    shown = {name: heat if signed else heat.abs() for name, heat in maps.items()}
    first = shown[TRAINED][None]
    alike = {name: similarity.spearman(first, heat[None]).item() for name, heat in shown.items() if name != TRAINED}
    labels = {name: f"{name}\nalike {alike[name]:.2f}" if name in alike else f"{name}\n" for name in shown}
    titled = {labels[name]: heat for name, heat in shown.items()}
    return plots.gallery(titled, signed=signed, image=picture, across=4)


def png(drawn: Figure) -> bytes:
    """A figure as a PNG file."""
    file = io.BytesIO()
    drawn.savefig(file, format="png", dpi=150)
    return file.getvalue()


class Panel(widgets.VBox):
    """The widgets, and a thread that computes; made by `panel`."""

    def __init__(self, model, pictures, *, prepare, classes, methods, seed):
        self.model, self.prepare, self.classes, self.seed = model, prepare, classes, seed
        self.pictures, self.methods = dict(pictures), dict(methods)
        self.device = next(model.parameters()).device
        names = stage_names(model, self._prepared(next(iter(pictures.values()))))
        self.stopped, self.worker = threading.Event(), None

        wide = {"layout": widgets.Layout(width="22em", max_width="100%"), "style": {"description_width": "6em"}}
        self.image = widgets.Dropdown(options=list(self.pictures), description="Image", **wide)
        self.upload = widgets.FileUpload(accept="image/*", multiple=False, description="Your own image")
        self.upload.layout.width = "auto"
        self.method = widgets.Dropdown(options=list(self.methods), description="Method", **wide)
        self.stage = widgets.Dropdown(options=names, value=names[:FIRST][-1], description="Random to", **wide)
        self.signed = widgets.Checkbox(description="with signs", indent=False)
        self.run = widgets.Button(description="Compute", button_style="primary")
        self.cancel = widgets.Button(description="Cancel", disabled=True)
        self.progress = widgets.IntProgress(min=0, max=1, layout=widgets.Layout(width="12em"))
        self.message = widgets.HTML()
        self.result = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", display="none"))
        super().__init__(
            [
                widgets.HBox([self.image, self.upload], layout=widgets.Layout(flex_flow="row wrap")),
                widgets.HBox([self.method, self.stage, self.signed], layout=widgets.Layout(flex_flow="row wrap")),
                widgets.HBox([self.run, self.cancel, self.progress], layout=widgets.Layout(flex_flow="row wrap")),
                self.message,
                self.result,
            ]
        )
        self.upload.observe(self._read, "value")
        self.run.on_click(self._start)
        self.cancel.on_click(lambda _: self.stopped.set())

    def _prepared(self, picture: Tensor) -> Tensor:
        return self.prepare(picture[None].to(self.device))

    def _read(self, change: dict) -> None:
        """Add an uploaded image to the choices, or say why it cannot be used."""
        files = change["new"]
        if not files:
            return
        if isinstance(files, dict):  # ipywidgets 7, which Colab has
            name, content = next((name, file["content"]) for name, file in files.items())
        else:
            name, content = files[0]["name"], files[0]["content"]
        size = next(iter(self.pictures.values())).shape[-1]
        try:
            self.pictures[name] = read_image(bytes(content), size)
        except ValueError as error:
            self._say(str(error))
            return
        self.image.options = list(self.pictures)
        self.image.value = name
        self._say("Your image is chosen; it stays in this notebook's kernel.")

    def _say(self, text: str) -> None:
        self.message.value = f'<span role="status">{_escaped(text)}</span>'

    def _start(self, _) -> None:
        """Compute in a thread, so that *Cancel* is heard."""
        self.stopped.clear()
        self.run.disabled, self.cancel.disabled = True, False
        self.progress.value, self.progress.max = 0, self.stage.index + 1
        chosen = (self.pictures[self.image.value], self.method.value, self.stage.value, self.signed.value)
        self.worker = threading.Thread(target=self._work, args=chosen, daemon=True)
        self.worker.start()

    def _work(self, picture: Tensor, method: str, stage: str, signed: bool) -> None:
        def step(name: str) -> None:
            self.progress.value += 1
            self._say(f"{method}: {name} is done")

        try:
            image = self._prepared(picture)
            target = predicted(self.model, image)
            maps = cascade(
                self.model, image, target, method=self.methods[method], last=stage, seed=self.seed,
                stopped=self.stopped, step=step,
            )  # fmt: skip
            self.result.value = png(figure(picture, maps, signed=signed))
            self.result.layout.display = None
            about = self.classes[target.item()]
            self._say(f"{method} of the class “{about}”. “Alike” is the rank correlation with the trained map.")
        except Cancelled:
            self._say("Cancelled.")
        except Exception as error:  # a method may refuse a network: the reader reads why, in the panel
            self._say(f"{method} gives no map here: {error}")
        finally:
            self.run.disabled, self.cancel.disabled = False, True


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _with_references(method: Callable[..., Tensor], references: Tensor) -> Callable[..., Tensor]:
    """A method that needs other images to compare with gets them."""
    if "references" not in inspect.signature(method).parameters:
        return method
    return lambda *args: method(*args, references=references)


def panel(
    model: nn.Module,
    pictures: Mapping[str, Tensor],
    *,
    classes: Sequence[str],
    prepare: Callable[[Tensor], Tensor] = photographs.normalize,
    methods: Mapping[str, Callable[..., Tensor]] | None = None,
    seed: int = 0,
) -> Panel | Figure:
    """A panel in which a reader randomises a network under a method and an image of their choice.

    Parameters
    ----------
    model : a network in eval mode; it stays as it is, the panel works on copies.
    pictures : name -> `(3, H, W)` in [0, 1], all of one size with H = W; a reader's own image is cut to it.
    classes : the names of the classes, in the order of the logits.
    prepare : pictures `(N, 3, H, W)` -> the network's input.
    methods : name -> method, to choose from; all of `saliency.METHODS` if none are given.
    seed : of the random weights.

    Returns
    -------
    The widgets; or, where the variable `SANITY_STATIC` is 1, a figure of what they would show first.
    """
    device = next(model.parameters()).device
    references = prepare(torch.stack(list(pictures.values())).to(device))
    chosen = {name: _with_references(method, references) for name, method in (methods or saliency.METHODS).items()}
    if os.environ.get("SANITY_STATIC") != "1":
        return Panel(model, pictures, prepare=prepare, classes=classes, methods=chosen, seed=seed)
    picture, method = next(iter(pictures.values())), next(iter(chosen.values()))
    image = prepare(picture[None].to(device))
    last = stage_names(model, image)[:FIRST][-1]
    maps = cascade(model, image, predicted(model, image), method=method, last=last, seed=seed)
    return figure(picture, maps, signed=False)
