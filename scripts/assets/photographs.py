"""Write textures/, photographs/ and stamps/: backgrounds, whole photographs, cut-out objects with masks.

Textures and photographs are sample images of scikit-image and scikit-learn. The objects are stamps of
Tux Paint (Debian package tuxpaint-stamps-default). CANDIDATES says, before anything is measured, of which
ImageNet class an object is; kept are those which SqueezeNet (squeezenet_imagenet.safetensors) puts in exactly
that class on plain grey and on at least one of the textures, at the defaults of `composites`.

    python scripts/assets/photographs.py [--stamps FOLDER]
"""

import argparse
import shutil
from pathlib import Path

import pandas as pd
import skimage
import sklearn.datasets
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from saliency_sanity.book.assets import assets_folder
from saliency_sanity.book.photographs import GREY, class_names, normalize, paste, square_crop
from torchvision.models import squeezenet1_1
from torchvision.transforms.v2 import functional as F

STAMPS, GPL = Path("/usr/share/tuxpaint/stamps"), Path("/usr/share/common-licenses/GPL-2")
TEXTURES = ("brick", "grass", "gravel")
SHORT_SIDE, LONGEST_SIDE = 256, 160  # pixels of a photograph, of an object

CREDITS = {
    "-": "not credited one by one",
    "AC": "Albert Cahalan",
    "BK": "Bill Kendrick, at the San Francisco Zoo",
    "CF": "Caroline Ford",
    "CG": "Chris Goerner, Australian stamps collection",
    "CH": "Childsplay, copyright 2002-2005 Stas Zytkiewicz, adapted by Pere Pujal i Carabantes",
    "CO": "with thanks to Jen and Ed Collins",
    "CR": "with thanks to Coco Ranch",
    "JO": "John O'Sullivan",
    "JT": "Jim Trice",
    "PP": "Pere Pujal i Carabantes",
    "SK": "Steve Karg",
    "DEA": "Albert Cahalan, from the US Drug Enforcement Administration",
    "USAF": "US Air Force photo by TSgt Ben Bloker, prepared by Steve Karg",
}

# Photographs of things that have an ImageNet class, one class each: the one a person would call right; where
# ImageNet knows one kind of a thing only (sorrel horse, fox squirrel, toilet seat), that kind.
# Not candidates are: drawings and silhouettes; cut-outs that hold something else too (fox on a stump, koala
# on a branch, boar with young, tiger in grass); kinds ImageNet has no class for (rhea, lark, chamois, lime, a
# frog of unknown kind, ...); and every stamp for which the collection's change log names a licence other than
# the package's (GFDL, CC BY, CC BY-SA) or a web source without a licence (see TERMS).
# name; stamp (without .png); ImageNet class; credit in the change log
CANDIDATES = """
airliner; vehicles/flight/planes/747; airliner; AC
badger; animals/mammals/badger; badger; CH
banana; food/fruit/banana; banana; CR
beaver; animals/mammals/rodents/beaver; beaver; CH
bell_pepper_green; food/vegetables/pepper; bell pepper; -
bell_pepper_yellow; food/vegetables/yellowpepper; bell pepper; CR
binoculars; hobbies/binoculars; binoculars; -
bison; animals/mammals/bovines/bison; bison; CH
bolete; plants/mushrooms/cep; bolete; PP
bolete_brown; plants/mushrooms/cep-1; bolete; PP
bolete_pair; plants/mushrooms/cep-2; bolete; PP
broccoli; food/vegetables/broccoli; broccoli; SK
brown_bear; animals/mammals/bears/european-bear; brown bear; PP
brown_bear_dark; animals/mammals/bears/bear; brown bear; CH
camera; hobbies/camera_35mm; reflex camera; -
candle; seasonal/candle; candle; -
car_wheel; vehicles/7spoke256; car wheel; AC
chicken; animals/birds/chicken_profile; hen; CF
chimpanzee; animals/mammals/apes/chimp; chimpanzee; CH
clownfish; animals/fish/clownfish; anemone fish; JO
coffee_mug; household/dishes/mug; coffee mug; CF
convertible; vehicles/auto/sportscar2; convertible; -
corn; food/vegetables/corn; corn; SK
crowned_crane; animals/birds/crowned_crane; crane bird; BK
custard_apple; food/fruit/cherimoya; custard apple; -
daisy; plants/flowers/yellow-flower; daisy; CG
dingo; animals/mammals/dogs/dingo; dingo; CG
drake; animals/birds/drake; drake; JO
dromedary; animals/mammals/camel/dromedary; Arabian camel; CH
electric_guitar; hobbies/music/string/guitar2; electric guitar; -
elephant; animals/mammals/elephant; African elephant; CH
ferret; animals/mammals/ferret; black-footed ferret; CH
flamingo; animals/birds/pink_flamingo; flamingo; BK
fly; animals/insects/fly; fly; CH
garbage_can; household/garbagecan; ashcan; CR
garbage_truck; vehicles/garbagetruck; garbage truck; -
goose; animals/birds/gander; goose; CH
gorilla; animals/mammals/apes/gorilla; gorilla; CH
granny_smith; food/fruit/apple_granny_smith; Granny Smith; CR
grasshopper; animals/insects/grasshopper; grasshopper; CH
green_apple; food/fruit/apple_green; Granny Smith; -
hammer; household/tools/hammer; hammer; CO
hen; animals/birds/hen; hen; JO
hippopotamus; animals/mammals/hippopotamus; hippopotamus; CH
hog; animals/mammals/pig_golden; hog; CF
hog_lying; animals/mammals/pig_golden2; hog; CF
hog_pink; animals/mammals/pig; hog; CH
hot_air_balloon; vehicles/flight/balloon360; balloon; AC
iguana; animals/lizards/iguana; common iguana; CH
killer_whale; animals/mammals/aquatic/orca; killer whale; CH
king_penguin; animals/birds/penguin; king penguin; CH
lemon; food/fruit/lemon; lemon; CG
lion; animals/mammals/cats/lion; lion; CH
lion_standing; animals/mammals/cats/lion-2; lion; -
lionfish; animals/fish/lionfish; lionfish; JO
lorikeet; animals/birds/rainbow-lorikeet; lorikeet; CG
magpie; animals/birds/magpie; magpie; CG
mailbox; town/usps_mailbox; mailbox; -
mailbox_red; town/uk_post_box; mailbox; CF
malamute; animals/mammals/dogs/dog; malamute; CH
mallard; animals/birds/duck; drake; CH
mantis; animals/insects/mantis; mantis; PP
marmot; animals/mammals/rodents/marmot; marmot; CH
mushroom; food/vegetables/mushroom; mushroom; -
orange; food/fruit/orange; orange; -
orange_mandarin; food/fruit/mandarine; orange; CG
orange_seville; food/fruit/orange_seville; orange; -
ostrich; animals/birds/ostrich; ostrich; BK
otter; animals/mammals/aquatic/otter; otter; -
paintbrush; household/tools/paintbrush_large; paintbrush; CO
parachute; military/paratrooper; parachute; AC
peacock; animals/birds/peacock; peacock; BK
pickup; vehicles/auto/truck; pickup; -
pitcher; household/dishes/pitcher_small; pitcher; CO
pomegranate; food/fruit/pomegranate; pomegranate; CO
racing_car; vehicles/race/indycar; racer; AC
ram; animals/mammals/bovines/ram; ram; CH
rooster; animals/birds/rooster; cock; CH
sea_lion; animals/mammals/aquatic/sea_lion; sea lion; CH
shovel; household/tools/spade; shovel; -
soccer_ball; sports/soccer; soccer ball; AC
sorrel; animals/mammals/equines/horse; sorrel; CH
spiny_lobster; animals/fish/lobster; spiny lobster; -
squirrel; animals/mammals/rodents/squirrel; fox squirrel; CH
strawberry; food/fruit/strawberry; strawberry; CO
syringe; medical/syringe; syringe; DEA
tank; military/vehicles/bradley; tank; AC
teapot; household/dishes/teapot; teapot; CR
teddy_bear; animals/mammals/bears/toys/edward_bear; teddy; JT
tiger; animals/mammals/cats/tiger; tiger; CH
toilet; household/toilet; toilet seat; AC
toucan; animals/birds/tucan; toucan; CH
tricycle; vehicles/cycle/pink_tricycle; tricycle; CF
vulture; animals/birds/vulture; vulture; CH
warplane; military/vehicles/f22_raptor; warplane; USAF
wheelie_bin; household/wheelie_bin; ashcan; CF
wombat; animals/marsupials/wombat; wombat; CH
zebra; animals/mammals/equines/zebra; zebra; CH
"""

TERMS = """# Licence of the objects in this folder

The images in this folder are part of the *Tux Paint* stamps, and are under their licence, the **GNU General
Public License, version 2 or (at your option) any later version**; its text is in `COPYING`. They are
distributed in the hope that they will be useful, but without any warranty. The rest of the repository is not
under it.

- Source: Debian package `tuxpaint-stamps-default` 2022.06.04-1, of source package `tuxpaint-stamps`; upstream
  the Tux Paint stamps of 4 June 2022, <https://tuxpaint.org/>, <https://sourceforge.net/projects/tuxpaint>.
- Copyright 2002-2022 Bill Kendrick <bill@newbreedsoftware.com> and the contributors to Tux Paint.
- Changed in November 2026: cropped to the object, and scaled down where it was longer than {side} pixels, by
  `scripts/assets/photographs.py`, which makes this folder from the package.
- Left out, though recognised: stamps for which the change log of the collection names another licence (GFDL,
  CC BY-SA: slug, woodlouse, a second strawberry) or a web source without a licence (basketball, tennis ball,
  racket, cello, guitar, violin, sliced orange, pineapple).

Credits, from the change log of the collection:

| object | stamp | credit |
|---|---|---|
"""


def candidates() -> pd.DataFrame:
    """The table above, with the index of each class."""
    rows = [[cell.strip() for cell in line.split(";")] for line in CANDIDATES.strip().splitlines()]
    table = pd.DataFrame(rows, columns=["name", "source", "class_name", "credit"])
    table["class_index"] = [class_names().index(name) for name in table["class_name"]]
    return table.assign(file=table["name"] + ".png", source=table["source"] + ".png")


def cut_out(path: Path) -> Image.Image:
    """A stamp as RGBA, cropped to its alpha with a margin of one transparent pixel, LONGEST_SIDE at most."""
    image = Image.open(path).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha >= 8)).getbbox())
    image.thumbnail((LONGEST_SIDE - 2, LONGEST_SIDE - 2), Image.Resampling.BICUBIC, reducing_gap=None)
    return ImageOps.expand(image, border=1, fill=(0, 0, 0, 0))


def write_textures(folder: Path) -> dict[str, torch.Tensor]:
    """The textures as grey PNG, and with plain grey the four backgrounds on which objects are tried."""
    backgrounds = {"grey": torch.full((3, 224, 224), GREY)}
    for name in TEXTURES:
        image = Image.fromarray(getattr(skimage.data, name)())
        image.save(folder / f"{name}.png", optimize=True)
        backgrounds[name] = square_crop(F.pil_to_tensor(image.convert("RGB")) / 255, 224)
    return backgrounds


def write_photographs(folder: Path) -> None:
    """Whole photographs as JPEG."""
    arrays = {name: getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    arrays |= {name: sklearn.datasets.load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    for name, array in arrays.items():
        image = F.resize(Image.fromarray(array), [SHORT_SIDE], interpolation=F.InterpolationMode.LANCZOS)
        image.save(folder / f"{name}.jpg", quality=95, optimize=True)


def network() -> torch.nn.Module:
    """The SqueezeNet of this package."""
    model = squeezenet1_1(weights=None)
    state = load_file(assets_folder() / "squeezenet_imagenet.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    model.classifier[2] = torch.nn.Identity()
    return model.eval()


@torch.no_grad()
def recognise(table: pd.DataFrame, cutouts: list, backgrounds: dict[str, torch.Tensor]) -> pd.DataFrame:
    """The table with `p_grey`, and for each background 1 where the object is classified correctly."""
    model, rows = network(), []
    for cutout, label in zip(cutouts, table["class_index"]):
        images = torch.stack([paste(background, cutout)[0] for background in backgrounds.values()])
        p = model(normalize(images)).softmax(1)
        right = (p.argmax(1) == label).int().tolist()
        rows.append({"p_grey": round(p[0, label].item(), 4)} | dict(zip(backgrounds, right)))
    return pd.concat([table, pd.DataFrame(rows)], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="folder of the Tux Paint stamps")
    parser.add_argument("--gpl", type=Path, default=GPL, help="text of the GNU GPL, version 2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("textures", "photographs", "stamps"):
        shutil.rmtree(assets_folder() / name, ignore_errors=True)
        (assets_folder() / name).mkdir()
    backgrounds = write_textures(assets_folder() / "textures")
    write_photographs(assets_folder() / "photographs")

    folder, table = assets_folder() / "stamps", candidates()
    cutouts = [cut_out(arguments.stamps / source) for source in table["source"]]
    table = recognise(table, cutouts, backgrounds)
    kept = table[(table["grey"] == 1) & (table[list(TEXTURES)].sum(axis=1) > 0)]
    for i, file in kept["file"].items():
        cutouts[i].save(folder / file, optimize=True)
    columns = ["name", "file", "class_index", "class_name", "source", "p_grey", "grey", *TEXTURES]
    kept[columns].to_csv(folder / "index.csv", index=False, lineterminator="\n")
    credits = [f"| {r.name} | `{r.source}` | {CREDITS[r.credit]} |" for r in kept.itertuples(index=False)]
    (folder / "LICENSE.md").write_text(TERMS.format(side=LONGEST_SIDE) + "\n".join(credits) + "\n", encoding="utf-8")
    shutil.copyfile(arguments.gpl, folder / "COPYING")

    print(f"kept {len(kept)} of {len(table)} candidates; not:", ", ".join(table.drop(kept.index)["name"]))
    for who, rows in (("candidates", table), ("kept", kept)):
        print(f"{who} classified correctly:", ", ".join(f"{b} {rows[b].mean():.0%}" for b in backgrounds))


if __name__ == "__main__":
    main()
