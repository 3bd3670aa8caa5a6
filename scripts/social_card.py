"""Draw the picture that social networks show beside a link to the book: _static/social_card.png."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from page_extras import CARD, CARD_SIZE
from PIL import Image
from saliency_sanity import plots, randomization, saliency
from saliency_sanity.book import models, photographs

QUESTION = "Does an explanation\nof a neural network\ndepend on the network\nat all?"
INK, PAPER = "#20254d", "#ffffff"
METHODS = {"Gradient": "gradient", "Guided\nBackprop": "guided_backprop"}


def main() -> None:
    model = models.load("squeezenet_imagenet")
    pictures, names = photographs.whole()
    cat = pictures[[names.index("chelsea")]]
    image = photographs.normalize(cat)
    target = model(image).argmax(1)
    _, ruined = next(randomization.cascading(model, seed=0))

    width, height = (pixels / 100 for pixels in CARD_SIZE)
    with plt.rc_context({"font.size": 17, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": PAPER}):
        figure = plt.figure(figsize=(width, height), dpi=100, facecolor=PAPER)
        figure.text(0.045, 0.86, "Sanity Checks for\nSaliency Maps", size=28, weight="bold", va="top")
        figure.text(0.045, 0.57, QUESTION, size=22, va="top", linespacing=1.3)
        figure.text(0.045, 0.1, "An executable book", size=17)
        grid = figure.add_gridspec(2, 3, left=0.45, right=0.985, top=0.9, bottom=0.03, wspace=0.05, hspace=0.06)
        for row, (label, method) in enumerate(METHODS.items()):
            shown = [plots.picture(cat[0])]
            for network in (model, ruined):
                maps = saliency.METHODS[method](network, image, target)
                shown.append(saliency.heatmap(maps, signed=False)[0].detach())
            for column, (title, values) in enumerate(zip(["image", "trained", "random top"], shown)):
                axis = figure.add_subplot(grid[row, column], xticks=[], yticks=[])
                limit = None if column == 0 else float(values.quantile(0.99))
                axis.imshow(values, cmap=plots.UNSIGNED, vmin=0, vmax=limit)
                if row == 0:
                    axis.set_title(title, size=18)
                if column == 0:
                    axis.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)
        figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(256)
    picture.save(Path(__file__).parent.parent / CARD, optimize=True)


if __name__ == "__main__":
    main()
