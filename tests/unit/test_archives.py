"""Zip archives of pictures, as people make them, as StyleGAN does, and as nobody should."""

import copy
import io
import json
import stat
import zipfile

import numpy as np
import pytest
from PIL import Image
from support.programs import launch
from support.runs import TINY, metrics

from distgan import cli, data
from distgan.data import sources, store
from distgan.errors import UserError
from distgan.recipe import DataConfig


def encoded(colour):
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (colour, colour, colour)).save(stream, "PNG")
    return stream.getvalue()


def archive(file, names, *, compression=zipfile.ZIP_STORED, **others):
    """A zip of pictures, each of another grey, and of other files by name."""
    with zipfile.ZipFile(file, "w", compression) as stream:
        for i, name in enumerate(names):
            stream.writestr(name, encoded(10 * i))
        for name, content in others.items():
            stream.writestr(name, content)
    return file


def found(file, **settings):
    return sources.find(DataConfig(source="folder", path=str(file), **settings))


def shown(source):
    """Names in the archive and labels."""
    return [(record.name.split(".zip/")[1], record.label) for record in source.records(1)]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_is_read_as_the_folder_that_it_would_become(tmp_path, compression):
    names = ["pictures/dog/2.png", "pictures/cat/b/1.png", "pictures/cat/3.png", "pictures/.git/1.png"]
    file = archive(tmp_path / "x.zip", names, compression=compression, **{"pictures/a.txt": "", "__MACOSX/._1.png": ""})
    images = data.load(DataConfig(source="folder", path=str(file)))
    with zipfile.ZipFile(file) as stream:
        stream.extractall(tmp_path / "out")
    folder = data.load(DataConfig(source="folder", path=str(tmp_path / "out" / "pictures")))
    assert images.classes == folder.classes == ("cat", "dog")
    assert images.labels.tolist() == folder.labels.tolist() == [0, 0, 1]
    assert np.array_equal(images.pixels, folder.pixels)
    assert images.fingerprint == folder.fingerprint  # a run goes on where the archive was unpacked
    assert "2 files hidden or made by tools" in images.left_out
    assert "1 file that Pillow does not read (1 .txt)" in images.left_out


def test_stylegans_labels_are_read(tmp_path):
    names = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png"]
    said = {"labels": [[names[2], 0], [names[0], 6], [names[1], 1]]}
    source = found(archive(tmp_path / "a.zip", names[::-1], **{"dataset.json": json.dumps(said)}))
    assert shown(source) == [(names[0], 6), (names[1], 1), (names[2], 0)]
    assert source.classes == tuple("0123456")
    assert source.left_out == ""
    none = found(archive(tmp_path / "b.zip", names, **{"dataset.json": json.dumps({"labels": None})}))
    assert shown(none) == [(name, None) for name in names]
    assert none.classes is None
    within = {"top/dataset.json": json.dumps({"labels": [["00000/img00000000.png", 1]]})}
    one = found(archive(tmp_path / "c.zip", [f"top/{names[0]}"], **within))
    assert shown(one) == [(f"top/{names[0]}", 1)]


def test_splits_in_a_zip_and_names_as_windows_writes_them(tmp_path):
    file = archive(tmp_path / "a.zip", ["x/train/cat/1.png", "x/train/dog/1.png", "x/val/dog/1.png"])
    assert shown(found(file)) == [("x/train/cat/1.png", 0), ("x/train/dog/1.png", 1)]
    config = store.test_split(DataConfig(source="folder", path=str(file)))
    assert config.split == "val"
    assert shown(sources.find(config)) == [("x/val/dog/1.png", 1)]
    assert shown(found(archive(tmp_path / "b.zip", ["cat\\1.png", "dog\\1.png"]))) == [
        ("cat/1.png", 0),
        ("dog/1.png", 1),
    ]


@pytest.mark.parametrize(
    "name", ["../1.png", "cat/../../1.png", "/etc/1.png", "..\\1.png", "\\1.png", "C:\\1.png", "../a"]
)
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path, name):
    file = archive(tmp_path / "a.zip", ["1.png", name])
    with pytest.raises(ValueError, match=r"the archive .*a\.zip holds .*, a name that leads out of it"):
        found(file)


def test_a_class_may_have_a_letter_and_a_colon(tmp_path):
    assert shown(found(archive(tmp_path / "a.zip", ["A: good/1.png", "B: bad/1.png"])))[0] == ("A: good/1.png", 0)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_several_files_of_one_name_the_last_is_read_and_the_others_are_counted(tmp_path):
    """As unpacking them would leave the last."""
    source = found(archive(tmp_path / "a.zip", ["a/1.png", "a/1.png", "b//2.png", "b/2.png", "a/3.png"]))
    assert [record.content for record in source.records(1)] == [encoded(10), encoded(40), encoded(30)]
    assert "2 files (a/1.png, b/2.png) of which there is a later one of the same name" in source.left_out


def test_a_picture_of_an_archive_that_cannot_be_unpacked_is_refused_or_skipped(tmp_path):
    file = archive(tmp_path / "a.zip", ["1.png", "2.png"])
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT")] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"1\.png in the archive .* is damaged"):
        data.load(DataConfig(source="folder", path=str(file)))
    with zipfile.ZipFile(file, "a") as stream:
        stream.writestr("3.png", encoded(90))
    images = data.load(DataConfig(source="folder", path=str(file), skip_bad=True))
    assert (images.skipped, images.pixels[:, 0, 0, 0].tolist()) == (1, [10, 90])


def test_links_in_an_archive_are_left_out(tmp_path):
    link = zipfile.ZipInfo("2.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    file = archive(tmp_path / "a.zip", ["1.png"])
    with zipfile.ZipFile(file, "a") as stream:
        stream.writestr(link, "/etc/passwd")
    source = found(file)
    assert shown(source) == [("1.png", None)]
    assert "1 link (2.png)" in source.left_out


def zeros(file, sizes):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as stream:
        stream.writestr("1.png", encoded(0))
        for i, size in enumerate(sizes):
            with stream.open(f"zeros{i}.png", "w") as member:
                for _ in range(size):
                    member.write(bytes(2**20))
    return file


def test_an_archive_that_expands_beyond_reason_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"zeros0\.png in the archive .* would expand to 274 MB"):
        found(zeros(tmp_path / "a.zip", [261]))
    file = archive(tmp_path / "b.zip", ["1.png"])
    with zipfile.ZipFile(tmp_path / "a.zip") as one:
        entry = one.getinfo("zeros0.png")
    # Many names for the same few bytes, as the worst of these archives have.
    with zipfile.ZipFile(file, "a") as stream:
        for i in range(6):
            info = copy.copy(entry)
            info.filename, info.file_size = f"{i}.png", 2**28 - 1
            stream.filelist.append(info)
        stream.writestr("2.png", encoded(0))
    with pytest.raises(ValueError, match=r"b\.zip would expand from 0\.0 MB to 1,611 MB"):
        found(file)


def test_a_damaged_or_encrypted_archive_gives_a_sentence(tmp_path):
    def content_of(source):
        return [record.content for record in source.records(1)]

    whole = archive(tmp_path / "a.zip", ["1.png", "2.png", "3.png"]).read_bytes()
    expected = content_of(found(tmp_path / "a.zip"))
    rng, refused, file = np.random.default_rng(0), 0, tmp_path / "b.zip"
    for _ in range(150):
        content = bytearray(whole)
        at = int(rng.integers(len(content)))
        if rng.integers(2):
            content[at] ^= 1 << int(rng.integers(8))
        else:
            del content[at : at + int(rng.integers(1, len(content)))]
        file.write_bytes(content)
        try:
            source = found(file)
            records = content_of(source)
        except ValueError as error:
            assert type(error) is UserError
            assert "\n" not in str(error)
            refused += 1
        else:  # what is there is whole; a name, a time or an ending may be another
            assert all(record in expected for record in records)
            assert len(records) == 3 or source.left_out
    assert refused > 100
    encrypted = whole.replace(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0")
    assert encrypted != whole
    file.write_bytes(encrypted)
    with pytest.raises(ValueError, match=r"is encrypted \(1\.png\): unpack it"):
        found(file)
    file.write_bytes(b"no zip at all")
    with pytest.raises(ValueError, match=r"the archive .* is damaged, incomplete or unreadable"):
        found(file)
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    with pytest.raises(ValueError, match="neither a folder nor a zip archive: unpack it"):
        found(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="no such folder or zip archive"):
        found(tmp_path / "gone.zip")


def test_a_run_on_a_zip_and_what_data_shows_of_it(tmp_path, capfd):
    names = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("cat", "dog") for i in range(5)]
    file = archive(tmp_path / "pictures.zip", names)
    argv = [*TINY, "--train.steps=2", "--train.batch_size=4", "--data.source=folder", f"--data.path={file}"]
    log = tmp_path / "log"
    assert launch([*argv, "--model.conditional=true", f"--run.dir={tmp_path / 'run'}"], world=2, log=log) == [0, 0]
    assert "guard/memory is off" not in log.read_text()  # the guard has images that nobody trains on
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    assert cli.main(["data", str(file), "--split", "test", "--prepare", "--out", str(tmp_path / "seen.png")]) == 0
    out = capfd.readouterr().out
    for words in ("images       10", "test, of train, test", "2: 0 cat, 1 dog", "10 of 32x32 RGB", "(prepared)"):
        assert words in out
