"""What becomes of the values in pictures: one scale for a whole source, and damage that never passes for a picture."""

import io
import json
import os
import shutil
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from distgan import cli, data
from distgan.data import sources, store
from distgan.recipe import DataConfig

RAMP = (np.arange(32 * 32).reshape(32, 32) / (32 * 32 - 1)).astype(np.float64)  # from 0 to 1


def folder_of(folder, arrays, ending="tif"):
    folder.mkdir(parents=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i}.{ending}")
    return folder


def loaded(folder, **settings):
    return data.load(DataConfig(source="folder", path=str(folder), channels=1, **settings))


def png16(values):
    """16 bits for each colour, which Pillow cannot write: (H, W, C) -> PNG."""
    height, width, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def encoded(picture, kind, **options):
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, kind, **options)
    return stream.getvalue()


DEPTHS = {
    "12 bits in 16-bit PNGs": (np.uint16, 4095, "png", (0, 4095)),
    "10 bits in 16-bit TIFFs": (np.uint16, 1023, "tif", (0, 1023)),
    "16 bits": (np.uint16, 65535, "png", (0, 65535)),
    "8 bits in 16": (np.uint16, 255, "png", (0, 255)),
    "big-endian": (">u2", 4095, "tif", (0, 4095)),
    "integers of 32 bits": (np.int32, 9_000_000, "tif", (0, 2**24 - 1)),
    "floats in 0 ... 1": (np.float32, 1, "tif", (0, 1)),
    "floats in 0 ... 255": (np.float32, 255, "tif", (0, 255)),
    "floats of 12 bits": (np.float32, 4095, "tif", (0, 4095)),
}


@pytest.mark.parametrize("case", DEPTHS)
def test_deep_pictures_take_one_scale_for_the_whole_source(tmp_path, case):
    """A dark picture stays dark beside a bright one, whichever comes first."""
    kind, top, ending, (low, high) = DEPTHS[case]
    bright, dark = (RAMP * top).astype(kind), (RAMP * top / 4).astype(kind)
    for name, arrays in {"a": (dark, bright), "b": (bright, dark)}.items():
        images = loaded(folder_of(tmp_path / name, arrays, ending))
        for pixels, values in zip(images.pixels, arrays, strict=True):
            expected = (values.astype(np.float64) - low) / (high - low) * 255
            assert np.abs(pixels[0].numpy() - expected).max() <= 0.51


def test_floats_from_minus_one_to_one_and_overshoot(tmp_path):
    signed = loaded(folder_of(tmp_path / "signed", [(RAMP * 2 - 1).astype(np.float32)]))
    assert np.abs(signed.pixels[0, 0].numpy() - RAMP * 255).max() <= 0.51
    over = (RAMP * 1.1 - 0.05).astype(np.float32)  # as bicubic resampling leaves them
    images = loaded(folder_of(tmp_path / "over", [over]))
    assert np.abs(images.pixels[0, 0].numpy() - over.clip(0, 1) * 255).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((RAMP * 3000 - 1000).astype(np.int32), r"1\.tif has values down to -1,000.*shift"),
        ((RAMP * 70 - 50).astype(np.float32), r"from -50 .*1\.tif\) to 20 .*1\.tif\).*rescale"),
        ((RAMP * 1e6).astype(np.float32), r"to 1e\+06 .*rescale"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), r"1\.tif has values that are NaN or inf.*skip_bad"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32), r"1\.tif has values that are NaN or inf.*skip_bad"),
    ],
    ids=["negative integers", "negative floats", "large floats", "NaN", "infinite"],
)
def test_values_of_no_known_range_are_refused(tmp_path, values, words):
    ordinary = RAMP.astype(values.dtype) if values.dtype == np.float32 else (RAMP * 255).astype(values.dtype)
    folder = folder_of(tmp_path / "pictures", [ordinary, values])
    with pytest.raises(ValueError, match=words):
        loaded(folder)
    if not np.isfinite(values).all():
        assert loaded(folder, skip_bad=True).skipped == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_colours_keep_their_lower_bits(tmp_path, channels):
    """Pillow keeps the upper 8 of 16 bits: of 12-bit values 16 levels."""
    colours = np.stack([RAMP, RAMP.T, 1 - RAMP], axis=-1) * 4095
    alpha = np.where(RAMP > 0.5, 65535, 0)[..., None]
    (tmp_path / "a.png").write_bytes(png16(colours.astype(np.uint16)))
    (tmp_path / "b.png").write_bytes(png16(np.concatenate([colours, alpha], -1).astype(np.uint16)))
    pixels = data.load(DataConfig(source="folder", path=str(tmp_path), channels=channels)).pixels
    expected = colours.astype(np.uint16) / 4095 * 255
    if channels == 1:
        expected = (expected @ [0.299, 0.587, 0.114])[..., None]
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() - expected).max() <= 0.51
    assert np.abs(pixels[1].permute(1, 2, 0).numpy() - np.where(alpha > 0, expected, 255)).max() <= 0.51


@pytest.mark.parametrize("corner", [0, 65535])
def test_16_bit_grey_with_alpha_keeps_its_lower_bits(tmp_path, corner):
    grey, alpha = RAMP * 4095, np.full((32, 32), 65535)
    alpha[:8, :8] = corner
    (tmp_path / "a.png").write_bytes(png16(np.stack([grey, alpha], -1).astype(np.uint16)))
    for channels in (1, 3):
        pixels = data.load(DataConfig(source="folder", path=str(tmp_path), channels=channels)).pixels[0]
        expected = np.where(alpha > 0, grey.astype(np.uint16) / 4095 * 255, 255)
        assert np.abs(pixels.numpy() - expected).max() <= 0.51


def test_a_bmp_of_5_6_and_5_bits_has_no_more_than_8(tmp_path):
    words = (np.arange(32 * 32) * 61 % 65536).astype("<u2")
    masks = struct.pack("<3I", 0xF800, 0x7E0, 0x1F)
    header = struct.pack("<IiiHHIIiiII", 40, 32, 32, 1, 16, 3, words.nbytes, 0, 0, 0, 0) + masks
    start = 14 + len(header)
    file = b"BM" + struct.pack("<IHHI", start + words.nbytes, 0, 0, start) + header + words.tobytes()
    (tmp_path / "a.bmp").write_bytes(file)
    images = data.load(DataConfig(source="folder", path=str(tmp_path)))
    assert images.scale is None
    with Image.open(tmp_path / "a.bmp") as image:
        assert np.array_equal(images.pixels[0].permute(1, 2, 0).numpy(), np.array(image))


def test_16_bit_colours_that_pillow_would_destroy_are_refused(tmp_path):
    for top, folder in ((65535, tmp_path / "full"), (4095, tmp_path / "low")):
        folder.mkdir()
        values = (np.stack([RAMP] * 3, -1) * top).astype(">u2")
        (folder / "a.ppm").write_bytes(b"P6 32 32 65535\n" + values.tobytes())
    assert np.abs(loaded(tmp_path / "full").pixels[0, 0].numpy() - RAMP * 255).max() <= 1
    with pytest.raises(ValueError, match=r"a\.ppm has 16-bit colours that do not use the highest bits.*PNG"):
        loaded(tmp_path / "low")


def test_pictures_of_8_bits_and_fewer_are_as_they_are_beside_deep_ones(tmp_path):
    grey = (RAMP * 100).astype(np.uint8)
    folder = folder_of(tmp_path / "p", [grey, RAMP > 0.5, (RAMP * 4095).astype(np.uint16)], "png")
    images = loaded(folder)
    assert np.array_equal(images.pixels[0, 0].numpy(), grey)
    assert np.array_equal(images.pixels[1, 0].numpy(), (RAMP > 0.5) * np.uint8(255))
    assert np.abs(images.pixels[2, 0].numpy() - RAMP * 255).max() <= 0.6


def parquet(folder, split, pictures):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = [{"bytes": encoded(picture, "PNG"), "path": None} for picture in pictures]
    rows = datasets.Dataset.from_dict({"image": rows, "label": [i % 2 for i in range(len(rows))]}, features=features)
    rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def test_parquet_and_its_test_split_take_the_scale_of_what_is_trained_on(tmp_path):
    train = DataConfig(source="hub", id="a/b", path=str(tmp_path), channels=1)
    dim = (RAMP * 1000).astype(np.uint16)  # on its own, it would be of 10 bits
    parquet(tmp_path, "train", [dim, (RAMP * 4095).astype(np.uint16)])
    parquet(tmp_path, "test", [dim, dim])
    images = data.load(train)
    test = data.load(data.test_split(train), like=train)
    assert torch.equal(test.pixels[0], images.pixels[0])
    assert test.pixels.max() == 62
    alone = data.load(data.test_split(train))
    assert alone.pixels.max() == 249
    assert alone.fingerprint != test.fingerprint
    assert data.load(data.test_split(train), like=train).folder == test.folder  # both are kept


def test_a_preview_agrees_with_the_store_or_goes_by_what_it_looks_at(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = folder_of(tmp_path / "p", [(RAMP * 500).astype(np.uint16)] * 3 + [(RAMP * 4000).astype(np.uint16)], "png")
    config = DataConfig(source="folder", path=str(folder))
    source = sources.find(config)
    pixels, _, scale = store.preview(source, config, 2)  # the first and the third
    assert (pixels.max(), scale.integers) == (125, (0, 1023))
    assert cli.main(["data", str(folder)]) == 0
    assert "integers from 0 to 4,095 become 0 to 255, by the 4 looked at" in capsys.readouterr().out
    images = data.load(config)
    assert "integers from 0 to 4,095 become 0 to 255\n" in capsys.readouterr().out
    pixels, _, scale = store.preview(source, config, 2)
    assert torch.equal(pixels, images.pixels[::2])
    assert cli.main(["data", str(folder)]) == 0
    assert "integers from 0 to 4,095 become 0 to 255\n" in capsys.readouterr().out


def test_a_store_of_an_earlier_version_stands_unless_its_pictures_are_deep(tmp_path):
    """Stores had no scale, and each picture its own."""
    for name, kind, top in (("eight", np.uint8, 255), ("deep", np.uint16, 4095)):
        folder = folder_of(tmp_path / name, [(RAMP * top).astype(kind)] * 2, "png")
        first = loaded(folder)
        described = json.loads((first.folder / "store.json").read_text())
        del described["scale"], described["plain"]
        (first.folder / "store.json").write_text(json.dumps(described))
        (first.folder / "images.bin").write_bytes(bytes([7]) * first.pixels.numel())
        again = loaded(folder)
        assert again.folder == first.folder
        assert again.fingerprint == first.fingerprint
        assert (again.pixels == 7).all() == (name == "eight")
        assert again.plain is not None


def test_a_store_of_an_earlier_version_serves_where_the_cache_may_only_be_read(tmp_path):
    folder = folder_of(tmp_path / "p", [np.full((32, 32), 9, np.uint8), (RAMP * 255).astype(np.uint8)], "png")
    first = loaded(folder)
    described = json.loads((first.folder / "store.json").read_text())
    del described["scale"], described["plain"]
    (first.folder / "store.json").write_text(json.dumps(described))
    (first.folder / f"store.json.{os.getpid()}.tmp").mkdir()  # root may write anywhere, but not a file in its place
    again = loaded(folder)
    assert (again.folder, again.plain) == (first.folder, 1)
    assert torch.equal(again.pixels, first.pixels)
    assert json.loads((first.folder / "store.json").read_text()) == described


def test_pictures_of_one_colour_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = [np.full((32, 32), 9, np.uint8), (RAMP * 255).astype(np.uint8), np.uint8(RAMP * 2.9), np.uint8(RAMP * 5)]
    folder = folder_of(tmp_path / "some", arrays, "png")
    assert loaded(folder).plain == 2
    assert f"2 of 4 pictures are of one colour throughout, the first: {folder}/0.png" in capsys.readouterr().out
    assert cli.main(["data", str(folder), "--prepare"]) == 0
    assert "one colour   2 of 4 throughout" in capsys.readouterr().out
    masks = folder_of(tmp_path / "masks", [np.uint8(RAMP > 0.5)] * 3, "png")  # 0 and 1, to the eye black
    assert loaded(masks).plain == 3
    assert "0.png; if that is a surprise, their values may not go from 0 to 255" in capsys.readouterr().out


# Damage ---------------------------------------------------------------------------------------------------------------

WAVES = np.stack([np.sin(np.arange(64) / k)[:, None] * np.cos(np.arange(64) / k) for k in (3, 5, 7)], -1) * 100 + 128
KINDS = {
    "jpeg": ("JPEG", {}),
    "jpeg in grey": ("JPEG", {}),
    "jpeg with restarts": ("JPEG", {"restart_marker_blocks": 2}),
    "progressive": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "gif": ("GIF", {}),
    "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "lzw tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "deflated tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "bmp": ("BMP", {}),
    "ppm": ("PPM", {}),
    "jpeg 2000": ("JPEG2000", {}),
}


def fits(content):
    return store.picture(content, size=(64, 64), channels=3, scale=None)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow's, about the same
@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_cut_is_refused_or_whole(name):
    """Also where zeros fill what is missing, as in a download that was interrupted, or a JPEG's end was put back."""
    kind, options = KINDS[name]
    array = WAVES.astype(np.uint8)
    content = encoded(array[..., 0] if "grey" in name else array, kind, **options)
    whole, refused = fits(content), 0
    zeros_fill = kind in ("JPEG", "PNG", "GIF", "WEBP", "JPEG2000")
    for at in {*np.linspace(1, len(content) - 24, 40).astype(int).tolist(), len(content) - 1}:
        cuts = [content[:at]]
        if zeros_fill and at < len(content) - 1:
            cuts.append(content[:at] + bytes(len(content) - at))
        if kind == "JPEG" and name != "progressive":
            cuts.append(content[: min(at, len(content) - 60)] + b"\xff\xd9")
        for damaged in cuts:
            try:
                seen = fits(damaged)
            except ValueError:
                refused += 1
            else:
                assert torch.equal(seen, whole), (at, len(damaged), len(content))
    assert refused > 40


@pytest.mark.parametrize("colour", [0, 128, 255])
@pytest.mark.parametrize("name", KINDS)
def test_a_flat_picture_is_not_taken_for_a_cut_one(name, colour):
    kind, options = KINDS[name]
    for size in (1, 5, 64, 600):
        picture = np.full((size, size, 3), colour, np.uint8)
        assert (fits(encoded(picture, kind, **options)).float() - colour).abs().max() <= 3
        half = np.concatenate([WAVES.astype(np.uint8), np.full((64, 64, 3), colour, np.uint8)])
        fits(encoded(half, kind, **options))


def test_a_jpeg_may_hold_a_small_one_and_a_trailer(tmp_path):
    small = encoded(WAVES[::4, ::4].astype(np.uint8), "JPEG")
    exif = b"Exif\0\0" + small
    content = encoded(WAVES.astype(np.uint8), "JPEG", exif=exif)
    assert torch.equal(fits(content + b"\0\xff\xda\xff" * 20), fits(content))
    with pytest.raises(ValueError, match=r"cut short|cannot be decoded"):
        fits(content[:-40] + bytes(40))


def test_damage_is_left_out_where_that_is_asked_for(tmp_path):
    content = encoded(WAVES.astype(np.uint8), "JPEG")
    for i, cut in enumerate((content, content[:-10] + bytes(10), content[:-300] + b"\xff\xd9")):
        (tmp_path / f"{i}.jpg").write_bytes(cut)
    with pytest.raises(ValueError, match=r"1\.jpg is cut short: repair or remove it.*data\.skip_bad"):
        loaded(tmp_path)
    images = loaded(tmp_path, skip_bad=True)
    assert (len(images.pixels), images.skipped) == (1, 2)
    shutil.rmtree(images.folder)
