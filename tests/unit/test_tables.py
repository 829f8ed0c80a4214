"""Tables of pictures as people have them: layouts, configurations, columns, labels, scripts; copies and the hub."""

import dataclasses
import io
import json
import shutil

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from distgan import cli, data
from distgan.recipe import DataConfig


def png(value):
    """A grey picture, so that its value says which it is, with a spot: all of one colour would be refused."""
    stream, picture = io.BytesIO(), Image.new("RGB", (32, 32), (value, value, value))
    picture.putpixel((31, 31), (255 - value, 255, 255))
    picture.save(stream, "PNG")
    return stream.getvalue()


def plain(file, values, *, kind="struct", image="image", **columns):
    """A table that no `datasets` library wrote."""
    encoded = [png(value) for value in values]
    if kind == "struct":
        type_ = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        pictures = pyarrow.array([{"bytes": one, "path": "a.png"} for one in encoded], type_)
    else:
        types = {"large": pyarrow.large_binary(), "view": pyarrow.binary_view()}
        pictures = pyarrow.array(encoded, types.get(kind, pyarrow.binary()))
    others = {
        name: column if isinstance(column, pyarrow.Array) else pyarrow.array(column) for name, column in columns.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({**others, image: pictures}), file)


def described(file, values, labels, names):
    """A table of the `datasets` library, with its metadata."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [{"bytes": png(value), "path": None} for value in values], "label": labels}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


def load(path, **settings):
    return data.load(DataConfig(source="hub", id="owner/name", path=str(path), **settings))


def values(images):
    return images.pixels[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("kind", ["struct", "binary", "large", "view"])
def test_pictures_without_metadata_are_found_by_their_first_bytes(tmp_path, kind):
    rubbish = pyarrow.array([b"no picture"] * 3, pyarrow.binary())
    plain(tmp_path / "train.parquet", [10, 20, 30], kind=kind, image="photo", raw=rubbish, label=[2, 0, -1])
    images = load(tmp_path)
    assert values(images) == [10, 20, 30]
    assert images.labels.tolist() == [2, 0, -1]
    assert images.classes == ("0", "1", "2")
    assert values(load(tmp_path, image_column="photo")) == [10, 20, 30]
    with pytest.raises(ValueError, match=r'data\.image_column is "label", which holds no images: choose photo\.'):
        load(tmp_path, image_column="label")
    plain(tmp_path / "none" / "train.parquet", [], raw=rubbish[:0])
    with pytest.raises(ValueError, match=r"train\.parquet has no image column \(its columns are raw, image"):
        load(tmp_path / "none")


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([3, 0, 1], "0 1 2 3", [3, 0, 1]),
        (pyarrow.array([1, None, 0], pyarrow.uint8()), "0 1", [1, -1, 0]),
        (["dog", "cat", "dog"], "cat dog", [1, 0, 1]),
        (pyarrow.array(["b", None, "a"]).dictionary_encode(), "a b", [1, -1, 0]),
        (pyarrow.array(["b", "b", "a"], pyarrow.large_string()), "a b", [1, 1, 0]),
        (pyarrow.array(["b", "b", "a"], pyarrow.string_view()), "a b", [1, 1, 0]),
        ([2.0, float("nan"), 0.0], "0 1 2", [2, -1, 0]),
        (pyarrow.array([1.0, None, -1.0], pyarrow.float32()), "0 1", [1, -1, -1]),
        ([True, False, None], "0 1", [1, 0, -1]),
    ],
    ids=["numbers", "bytes", "strings", "categories", "large strings", "views", "floats of a gap", "floats", "bools"],
)
def test_plain_labels(tmp_path, labels, classes, expected):
    plain(tmp_path / "train.parquet", [10, 20, 30], label=labels, kind_of_animal=labels)
    for column in (None, "label", "kind_of_animal"):
        images = load(tmp_path, label_column=column)
        assert images.labels.tolist() == expected
        assert images.classes == tuple(classes.split())


def test_classes_of_strings_are_numbered_over_all_splits(tmp_path):
    plain(tmp_path / "train-0.parquet", [10, 20], label=["cat", "eel"])
    plain(tmp_path / "train-1.parquet", [30], label=["ape"])
    plain(tmp_path / "test-0.parquet", [40, 50], label=["eel", "dog"])
    plain(tmp_path / "validation.parquet", [60])
    assert load(tmp_path).classes == load(tmp_path, split="test").classes == ("ape", "cat", "dog", "eel")
    assert load(tmp_path).labels.tolist() == [1, 3, 0]
    assert load(tmp_path, split="test").labels.tolist() == [3, 2]
    assert load(tmp_path, split="validation").labels is None


def test_numbers_with_fractions_are_no_labels_whatever_they_are_called(tmp_path):
    plain(tmp_path / "train.parquet", [10, 20], label=[0.5, 1.0])
    assert load(tmp_path).labels is None


def test_shards_without_rows_and_first_rows_without_pictures_are_passed_over(tmp_path):
    for shard in (0, 2):
        parquet.write_table(pyarrow.table({"image": pyarrow.nulls(0)}), tmp_path / f"train-{shard}.parquet")
    pictures = pyarrow.array([None] * 20 + [png(10), png(20)], pyarrow.binary())
    parquet.write_table(pyarrow.table({"image": pictures}), tmp_path / "train-1.parquet")
    images = load(tmp_path, skip_bad=True)
    assert (values(images), images.skipped) == ([10, 20], 20)


def test_pictures_that_a_table_names_lie_beside_it(tmp_path):
    type_ = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pictures = pyarrow.array([{"bytes": png(10), "path": None}, {"bytes": None, "path": "images/b.png"}], type_)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.png").write_bytes(png(20))
    parquet.write_table(pyarrow.table({"image": pictures}), tmp_path / "train.parquet")
    assert values(load(tmp_path)) == [10, 20]
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"row 1 of .* is kept in .*/images/b\.png, which cannot be read"):
        load(tmp_path, cache=str(tmp_path / "cache"))


def test_what_is_no_label_is_refused(tmp_path):
    plain(tmp_path / "train.parquet", [10, 20], label=[0, -2], id=[7, 10**9], share=[0.5, 1.0])
    for column, words in {
        "label": r"row 1 of .* has the label -2, which is none of the 1 classes",
        "id": r'the label column "id" of owner/name has numbers for more than 100,000 classes',
        "share": r'data\.label_column is "share", which holds no class labels',
        "lable": r'data\.label_column is "lable", which .* does not have: did you mean "label"\?',
    }.items():
        with pytest.raises(ValueError, match=words):
            load(tmp_path, label_column=column)


def test_two_columns_of_labels_have_stores_of_their_own(tmp_path):
    plain(tmp_path / "train.parquet", [10, 20, 30], fine=[0, 1, 2], coarse=[2, 1, 0])
    assert load(tmp_path, label_column="fine").labels.tolist() == [0, 1, 2]
    assert load(tmp_path, label_column="coarse").labels.tolist() == [2, 1, 0]


def test_what_datasets_wrote_is_read_as_ever(tmp_path):
    """Its own classes win, and numbers beside a described picture are labels only where they are named: otherwise runs
    on such a copy could not be resumed."""
    described(tmp_path / "named" / "train-0.parquet", [10, 20], [1, 0], ["zebra", "ape"])
    assert load(tmp_path / "named").classes == ("zebra", "ape")
    assert load(tmp_path / "named").labels.tolist() == [1, 0]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": png(value), "path": None} for value in (10, 20)], "label": [1, 0]}
    (tmp_path / "numbers").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "numbers" / "train-0.parquet")
    assert load(tmp_path / "numbers").labels is None
    assert load(tmp_path / "numbers", label_column="label").labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            "data/test-00000-of-00001.parquet",
        ),
        (["default/train/0000.parquet", "default/train/0001.parquet"], "default/test/0000.parquet"),
        (["default/partial-train/0000.parquet", "default/partial-train/0001.parquet"], "default/test/0000.parquet"),
        (["train/0000.parquet", "train/0001.parquet"], "test/0000.parquet"),
        (["train/part-00000-of-00002.parquet", "train/part-00001-of-00002.parquet"], "test/part-00000.snappy.parquet"),
        (["train.parquet"], "test.parquet"),
        (["pictures_train_0.parquet", "pictures_train_1.parquet"], "pictures_test.parquet"),
        (["one/train-0.parquet"], "other/test-0.parquet"),
    ],
)
def test_layouts(tmp_path, train, test):
    for i, name in enumerate(train):
        plain(tmp_path / name, [10 * i, 10 * i + 1])
    plain(tmp_path / test, [100])
    plain(tmp_path / ".cache" / "train-9.parquet", [200])
    assert values(load(tmp_path)) == [10 * i + j for i in range(len(train)) for j in range(2)]
    assert values(load(tmp_path, split="test")) == [100]
    with pytest.raises(ValueError, match=r"no validation-\*\.parquet is in it: data\.split must be one of test, train"):
        load(tmp_path, split="validation")


def test_splits_are_known_by_their_kind_and_one_of_them_is_unseen(tmp_path, hub_cache):
    for split, value in {"train": 10, "validation": 20, "test": 30, "extra": 40}.items():
        described(tmp_path / "all" / f"{split}-00000-of-00001.parquet", [value, value + 1], [0, 1], ["a", "b"])
    two = tmp_path / "two"
    two.mkdir()
    for split in ("train", "validation"):
        shutil.copy(tmp_path / "all" / f"{split}-00000-of-00001.parquet", two)
    hub_cache("default", **{split: two / f"{split}-00000-of-00001.parquet" for split in ("train", "validation")})
    for place in (str(two), None):
        config = DataConfig(source="hub", id="owner/name", path=place)
        assert data.test_split(config).split == "validation"
        val = dataclasses.replace(config, split="val")
        assert values(data.load(val)) == [20, 21]
        assert data.test_split(val).split == "train"
    assert data.test_split(DataConfig(source="hub", id="owner/name", path=str(tmp_path / "all"))).split == "test"
    with pytest.raises(ValueError, match="has no split for tests"):
        data.test_split(DataConfig(source="hub", id="owner/name", split="train[:50%]"))  # it may be a part of any


def test_files_that_name_no_split_are_trained_on_and_other_names_are_splits(tmp_path):
    plain(tmp_path / "some" / "a.parquet", [1])
    plain(tmp_path / "some" / "b.parquet", [2])
    assert values(load(tmp_path / "some")) == [1, 2]
    plain(tmp_path / "folds" / "default" / "fold1" / "0000.parquet", [3])
    plain(tmp_path / "folds" / "data" / "balanced-00000-of-00001.parquet", [4])
    assert values(load(tmp_path / "folds", split="fold1")) == [3]
    assert values(load(tmp_path / "folds", split="balanced")) == [4]


def test_several_configurations_of_a_copy(tmp_path, capsys):
    for layout, place in {"hub": "{}/train-00000-of-00001.parquet", "converted": "{}/train/0000.parquet"}.items():
        root = tmp_path / layout
        described(root / place.format("animals"), [10], [0], ["cat"])
        described(root / place.format("vehicles"), [20], [0], ["bus"])
        with pytest.raises(ValueError, match=r"has the configurations animals, vehicles: choose one with data\.config"):
            load(root)
        assert load(root, config="animals").classes == ("cat",)
        assert values(load(root, config="vehicles")) == [20]
        assert values(load(root / "vehicles")) == [20]
        with pytest.raises(
            ValueError, match=r'data\.config is "animal", which .* does not have: did you mean "animals"'
        ):
            load(root, config="animal")
        with pytest.raises(ValueError, match=r"data\.split must be one of train\."):
            load(root, config="animals", split="test")
    arguments = ["hub", "--path", str(root), "--out", str(tmp_path / "data.png")]
    source = ["data", "owner/name", *arguments[1:]]
    assert cli.main(source) == 2
    assert cli.main([*source, "--config", "vehicles"]) == 0
    assert "classes      1: 0 bus" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"data\.config is animals, which data\.source folder does not use"):
        DataConfig(source="folder", config="animals")


README = """---
license: mit
configs:
- config_name: animals
  data_files:
  - split: train
    path: all/cats-*.parquet
  - split: test
    path: ["all/eels.parquet", "../outside/*.parquet"]
- config_name: vehicles
  data_dir: vehicles
- config_name: not-downloaded
  data_files: elsewhere/*
---
# A data set
"""


def test_readme_names_the_configurations(tmp_path):
    root = tmp_path / "copy"
    for i, name in enumerate(["all/cats-1", "all/cats-2", "all/eels", "vehicles/train", "../outside/x"]):
        plain(root / f"{name}.parquet", [i])
    (root / "README.md").write_text(README)
    with pytest.raises(ValueError, match=r"has the configurations animals, vehicles: choose"):
        load(root)
    assert values(load(root, config="animals")) == [0, 1]
    assert values(load(root, config="animals", split="test")) == [2]
    assert values(load(root, config="vehicles")) == [3]
    (root / "README.md").write_text(README.replace("animals", "animals\n  default: true"))
    assert values(load(root)) == [0, 1]  # as load_dataset does
    (root / "README.md").write_text(README.replace("path: all/cats-*.parquet", "files: all"))
    with pytest.raises(ValueError, match=r"README\.md has a `configs:` entry that is not in the hub's form"):
        load(root)
    (root / "README.md").write_text("---\n: : [\n---\n")
    assert values(load(root)) == [3]  # by the names of the files, as without it


def test_files_that_differ_are_refused_and_both_named(tmp_path):
    described(tmp_path / "classes" / "train-0.parquet", [10], [0], ["cat"])
    described(tmp_path / "classes" / "train-1.parquet", [20], [0], ["bus"])
    with pytest.raises(
        ValueError, match=r"train-0\.parquet has the classes 0 cat, but .*train-1\.parquet has .* 0 bus"
    ):
        load(tmp_path / "classes")
    plain(tmp_path / "columns" / "train-0.parquet", [10], label=[0])
    plain(tmp_path / "columns" / "train-1.parquet", [20], label=["cat"])
    with pytest.raises(ValueError, match=r"train-0\.parquet has .* numbers in label .*train-1\.parquet has .* strings"):
        load(tmp_path / "columns")


def test_a_script_is_never_run_and_its_conversion_is_named(tmp_path, monkeypatch):
    script = tmp_path / "owner" / "name" / "name.py"
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemExit('ran')")
    conversion = r"hf download --repo-type dataset owner/name --revision refs/convert/parquet --local-dir DIR"
    with pytest.raises(ValueError, match=rf"is a copy of a script, which is never run; .*{conversion}"):
        load(script.parent)
    monkeypatch.chdir(tmp_path)  # where datasets itself finds the script, as it would on the hub
    with pytest.raises(ValueError, match=rf"owner/name is a script, and scripts are never run: .*{conversion}"):
        data.load(DataConfig(source="hub", id="owner/name"))


# The hub's cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """`datasets` finds here what it loaded from the hub before; there is no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))

    def add(config, **files):
        datasets.load_dataset("parquet", data_files={split: str(file) for split, file in files.items()})
        (made,) = cache.glob("parquet/*/*/*/dataset_info.json")
        info = json.loads(made.read_text()) | {"config_name": config, "dataset_name": "name"}
        made.write_text(json.dumps(info))
        for arrow in made.parent.glob("*.arrow"):
            arrow.rename(arrow.with_name(arrow.name.replace("parquet-", "name-")))
        shutil.copytree(made.parent, cache / "owner___name" / config / "0.0.0" / "abc")
        shutil.rmtree(cache / "parquet")

    return add


def cached(**settings):
    return data.load(DataConfig(source="hub", id="owner/name", **settings))


def test_tables_of_every_kind_by_way_of_the_hub(tmp_path, hub_cache):
    mask = pyarrow.array([{"bytes": b"damaged", "path": None}] * 2)
    plain(tmp_path / "train.parquet", [10, 20], label=["eel", "cat"], mask=mask)
    plain(tmp_path / "test.parquet", [30, 40], label=["eel", "ape"], mask=mask)
    hub_cache("default", train=tmp_path / "train.parquet", test=tmp_path / "test.parquet")
    train, test = cached(), cached(split="test")
    assert (values(train), train.labels.tolist()) == ([10, 20], [2, 1])
    assert (values(test), test.labels.tolist()) == ([30, 40], [2, 0])
    assert train.classes == test.classes == ("ape", "cat", "eel")
    assert train.fingerprint == load(tmp_path).fingerprint
    with pytest.raises(ValueError, match=r"owner/name cannot be loaded: Unknown split .*train.*test"):
        cached(split="validation")


def test_several_configurations_by_way_of_the_hub(tmp_path, hub_cache, monkeypatch):
    described(tmp_path / "animals.parquet", [10], [0], ["cat"])
    described(tmp_path / "vehicles.parquet", [20], [0], ["bus"])
    for config in ("animals", "vehicles"):
        hub_cache(config, train=tmp_path / f"{config}.parquet")
    several = r"owner/name has the configurations (animals, vehicles|vehicles, animals): choose one with data\.config"
    unknown = r'data\.config is "cars", which owner/name does not have: known are (animals, vehicles|vehicles, animals)'
    with pytest.raises(ValueError, match=several):
        cached()
    assert cached(config="vehicles").classes == ("bus",)
    assert values(cached(config="animals")) == [10]
    with pytest.raises(ValueError, match=unknown):
        cached(config="cars")
    # Where the hub is reached datasets has other words; it has them for a folder, too.
    (tmp_path / "owner").mkdir()
    plain(tmp_path / "owner" / "name" / "a" / "train.parquet", [1])
    configs = [{"config_name": name, "data_files": "a/*"} for name in ("animals", "vehicles")]
    (tmp_path / "owner" / "name" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=several):
        cached()
    with pytest.raises(ValueError, match=unknown):
        cached(config="cars")
