"""The shipped files: listed, unchanged, named in the README; a missing or damaged one is an error."""

import shutil
from fnmatch import fnmatch

import pytest
from saliency_sanity.book import assets, data, models, photographs

FILES = sorted(path for path in assets.assets_folder().rglob("*") if path.is_file())
CODE_AND_NOTICES = {".py", ".pyc", ".md", ""}  # by suffix; all else is data


def test_every_data_file_is_listed_and_the_listed_exist():
    data_files = [path for path in FILES if path.suffix not in CODE_AND_NOTICES]
    assert sorted(assets.manifest()) == [path.relative_to(assets.assets_folder()).as_posix() for path in data_files]


@pytest.mark.parametrize("name", sorted(assets.manifest()))
def test_every_listed_file_is_the_published_one(name):
    path = assets.locate(name)
    assert path.is_file() and path == assets.assets_folder() / name


def test_all_assets_together_are_small():
    assert sum(path.stat().st_size for path in FILES) <= 30e6


def test_every_data_file_is_covered_by_the_readme():
    """Each file is named there, or its folder is, or a pattern in backticks fits it."""
    quoted = (assets.assets_folder() / "README.md").read_text(encoding="utf-8").split("`")[1::2]
    for name in assets.manifest():
        patterns = [q + "*" if q.endswith("/") else q for q in quoted]
        assert any(fnmatch(name, pattern) for pattern in patterns), f"{name} is not in assets/README.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of a few assets that a test may damage."""
    for name in ("SHA256SUMS", "digits.npz", "checkpoints/records.csv", "stamps/index.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(assets.assets_folder() / name, tmp_path / name)
    monkeypatch.setattr(assets, "assets_folder", lambda: tmp_path)
    return tmp_path


LOADERS = {
    "digits.npz": lambda: data.load("digits"),
    "checkpoints/records.csv": models.records,
    "stamps/index.csv": photographs.stamps,
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_missing_file_is_an_error_that_says_what_to_do(name, folder):
    LOADERS[name]()
    (folder / name).unlink()
    with pytest.raises(assets.AssetError, match=rf"{name} is missing.*make assets"):
        LOADERS[name]()


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("damage", ["cut", "flipped byte", "empty"])
def test_a_damaged_file_is_an_error_also_after_it_was_read_once(name, damage, folder):
    LOADERS[name]()
    content = (folder / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    (folder / name).write_bytes({"cut": content[:-1], "flipped byte": flipped, "empty": b""}[damage])
    with pytest.raises(assets.AssetError, match=rf"{name} is damaged"):
        LOADERS[name]()


@pytest.mark.parametrize("load", [lambda: models.load("mlp_digits"), lambda: models.load("squeezenet_imagenet")])
def test_missing_weights_are_an_error(load, folder):
    with pytest.raises(assets.AssetError, match="missing|not one of the assets"):
        load()


@pytest.mark.parametrize("name", ["nonsense", "../device.py", "", "SHA256SUMS"])
def test_a_name_that_is_no_asset_raises_and_says_what_there_is(name):
    with pytest.raises(assets.AssetError, match="not one of the assets; there are: .*digits.npz"):
        assets.locate(name)


def test_a_name_that_is_nearly_an_asset_is_corrected():
    with pytest.raises(assets.AssetError, match="there are: digits.npz"):
        assets.locate("digit.npz")


def test_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # the standard's own example
    assert assets.digest(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_names_in_a_folder_are_listed():
    textures = [name for name in assets.manifest() if name.startswith("textures/")]
    assert assets.listed("textures") == sorted(textures) and len(textures) >= 3
    assert assets.listed("texture") == []


def test_what_is_opened_is_written_down_where_the_build_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.delenv("SANITY_ASSETS_NOTE", raising=False)
    data.load("digits", "test")
    monkeypatch.setenv("SANITY_ASSETS_NOTE", str(tmp_path / "note"))
    data.load("clothes", "test")
    models.load("mlp_digits")
    assets.listed("textures")
    with pytest.raises(assets.AssetError):
        assets.locate("nonsense")
    opened = (tmp_path / "note").read_text(encoding="utf-8").splitlines()
    assert opened == ["clothes.npz", "checkpoints/mlp_digits.true.safetensors", "textures/"]
