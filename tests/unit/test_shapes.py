"""Images beyond squares of one or three channels: how pictures are made to fit, rectangles, and RGBA."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_pixels import RAMP, WAVES, encoded, png16

from distgan import cli, data, models, pictures, recipe
from distgan.applications.benefit import _augmented
from distgan.applications.masks import KINDS, masks
from distgan.data import sources, store
from distgan.data.decode import picture
from distgan.evaluation import classifier
from distgan.evaluation.extractors import Classifier, Inception
from distgan.models import ImageSpec, layers
from distgan.objective.augment import color
from distgan.recipe import Config, DataConfig, ModelConfig, RunConfig

PHOTO = np.concatenate([WAVES, WAVES[::-1] * 0.7], 1).astype(np.uint8)  # 64x128


def fitted(content, size, channels=3, fit="crop"):
    return picture(content, size=size, channels=channels, scale=None, fit=fit).permute(1, 2, 0).numpy().astype(int)


def opened(content, mode):
    with Image.open(io.BytesIO(content)) as image:
        return image.convert(mode)


# Fit ------------------------------------------------------------------------------------------------------------------

# Left, top, right and bottom: of the part of the picture that is used, and of where it comes to lie.
CASES = {
    "crop of a wide one": ("crop", (50, 90), (32, 48), (7, 0, 82, 50), (0, 0, 48, 32)),
    "crop of a tall one": ("crop", (60, 30), (32, 48), (0, 20, 30, 40), (0, 0, 48, 32)),
    "crop to a tall one": ("crop", (50, 90), (64, 32), (32, 0, 57, 50), (0, 0, 32, 64)),
    "crop and enlarge": ("crop", (12, 30), (64, 128), (3, 0, 27, 12), (0, 0, 128, 64)),
    "pad a wide one": ("pad", (50, 90), (32, 48), (0, 0, 90, 50), (0, 2, 48, 29)),
    "pad a tall one": ("pad", (60, 30), (32, 48), (0, 0, 30, 60), (16, 0, 32, 32)),
    "pad and enlarge": ("pad", (12, 30), (64, 128), (0, 0, 30, 12), (0, 6, 128, 57)),
    "pad a line": ("pad", (1, 120), (32, 48), (0, 0, 120, 1), (0, 15, 48, 16)),
    "stretch": ("stretch", (50, 90), (64, 32), (0, 0, 90, 50), (0, 0, 32, 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_picture_is_made_to_fit_as_pillow_does_it(case):
    fit, (height, width), size, part, place = CASES[case]
    image = Image.fromarray(PHOTO[:height, :width])
    inner = image.crop(part).resize((place[2] - place[0], place[3] - place[1]), Image.Resampling.BICUBIC)
    expected = Image.new("RGB", size[::-1])
    expected.paste(inner, place[:2])
    ours = fitted(encoded(PHOTO[:height, :width], "PNG"), size, fit=fit)
    assert np.abs(ours - np.array(expected)).max() <= 2  # Pillow rounds twice
    for other in {"crop", "pad", "stretch"} - {fit}:
        assert np.abs(ours - fitted(encoded(PHOTO[:height, :width], "PNG"), size, fit=other)).max() > 20


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_pictures_of_the_right_size_stay_as_they_are(fit):
    part = PHOTO[:32, :48]
    assert np.array_equal(fitted(encoded(part, "PNG"), (32, 48), fit=fit), part)
    square = fitted(encoded(PHOTO[:40, :40], "PNG"), (32, 32), fit=fit)
    assert np.array_equal(square, fitted(encoded(PHOTO[:40, :40], "PNG"), (32, 32)))  # all three agree on squares


# RGBA -----------------------------------------------------------------------------------------------------------------


def test_no_colour_of_transparent_pixels_shows_at_an_edge():
    """A red disk on transparent green, as drawing programs leave it: resized, it stays red up to its edge."""
    y, x = np.mgrid[-64:64, -64:64]
    disk = x**2 + y**2 < 50**2
    clear = np.where(disk[..., None], [255, 0, 0, 255], [0, 255, 0, 0]).astype(np.uint8)
    for fit in ("crop", "pad", "stretch"):
        ours = fitted(encoded(clear, "PNG"), (32, 48), 4, fit)
        alpha = ours[..., 3]
        assert ((alpha > 20) & (alpha < 235)).sum() > 20  # there is an edge
        assert (np.abs(ours[alpha > 0][:, :3] - [255, 0, 0]).max()) <= 1
        assert (ours[alpha == 0] == 0).all()
        assert ours[:, 0].max() == 0 if fit == "pad" else True  # borders are transparent


def test_transparent_pictures_are_resized_as_pillow_does_it():
    """Pillow, too, weights colours by their opacity."""
    rng = np.random.default_rng(0)
    noise = rng.integers(256, size=(64, 96, 4), dtype=np.uint8)
    expected = np.array(Image.fromarray(noise).resize((48, 32), Image.Resampling.BICUBIC)).astype(int)
    ours = fitted(encoded(noise, "PNG"), (32, 48), 4)
    assert np.abs(ours[..., 3] - expected[..., 3]).max() <= 1
    opaque = expected[..., 3] > 100  # where there is little opacity, Pillow's 8 bits do not hold the colour
    assert np.abs(ours - expected)[opaque].max() <= 5
    plain = torch.nn.functional.interpolate(
        torch.from_numpy(noise).permute(2, 0, 1)[None].float(), (32, 48), mode="bicubic", antialias=True
    )[0]
    assert np.abs(plain[:3].permute(1, 2, 0).numpy() - expected[..., :3])[opaque].max() > 20  # without the weights


COLOURS = Image.fromarray(PHOTO[:32, :48])
GREY = COLOURS.convert("L")
ALPHA = Image.fromarray((np.arange(32 * 48).reshape(32, 48) % 256).astype(np.uint8))


def with_alpha(mode):
    image = COLOURS.convert(mode)
    image.putalpha(ALPHA)
    return image


CLEAR = {
    "RGBA": (with_alpha("RGB"), "PNG", {}),
    "LA": (with_alpha("L"), "PNG", {}),
    "WebP": (with_alpha("RGB"), "WEBP", {"lossless": True, "exact": True}),
    "TIFF": (with_alpha("RGB"), "TIFF", {}),
    "palette": (COLOURS.quantize(16), "PNG", {"transparency": 3}),
    "palette with alphas": (COLOURS.quantize(16), "PNG", {"transparency": bytes(range(0, 256, 16))}),
    "GIF": (COLOURS.quantize(16), "GIF", {"transparency": 3}),
    "a grey value": (GREY, "PNG", {"transparency": int(np.array(GREY)[3, 3])}),
    "a colour": (COLOURS, "PNG", {"transparency": tuple(map(int, np.array(COLOURS)[3, 3]))}),
}
OPAQUE = {
    "RGB": (COLOURS, "PNG", {}),
    "grey": (GREY, "PNG", {}),
    "one bit": (GREY.convert("1"), "PNG", {}),
    "palette": (COLOURS.quantize(16), "PNG", {}),
    "CMYK": (COLOURS.convert("CMYK"), "JPEG", {}),
    "JPEG": (COLOURS, "JPEG", {}),
}


def file_of(image, kind, options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("name", CLEAR)
def test_transparency_of_every_kind_is_kept(name):
    content = file_of(*CLEAR[name])
    expected = np.array(opened(content, "RGBA")).astype(int)
    assert expected[..., 3].min() == 0
    assert expected[..., 3].max() > 200
    ours = fitted(content, (32, 48), 4)
    assert np.array_equal(ours, np.where(expected[..., 3:] > 0, expected, 0))
    on_white = fitted(content, (32, 48), 3)  # as ever
    white = Image.alpha_composite(Image.new("RGBA", (48, 32), "white"), opened(content, "RGBA")).convert("RGB")
    assert np.array_equal(on_white, np.array(white))


@pytest.mark.parametrize("name", OPAQUE)
def test_pictures_without_transparency_become_opaque(name):
    content = file_of(*OPAQUE[name])
    ours = fitted(content, (32, 48), 4)
    assert (ours[..., 3] == 255).all()
    assert np.array_equal(ours[..., :3], fitted(content, (32, 48), 3))


@pytest.mark.parametrize("grey", [False, True])
def test_deep_pictures_keep_their_transparency(tmp_path, grey):
    colours = np.stack([RAMP] if grey else [RAMP, RAMP.T, 1 - RAMP], axis=-1) * 4095
    alpha = (RAMP.T[..., None] * 65535).round()
    (tmp_path / "a.png").write_bytes(png16(np.concatenate([colours, alpha], -1).astype(np.uint16)))
    (tmp_path / "b.png").write_bytes(png16(colours.astype(np.uint16)))
    images = data.load(DataConfig(source="folder", path=str(tmp_path), channels=4))
    assert tuple(images.scale.integers) == (0, 4095)
    clear, opaque = images.pixels.permute(0, 2, 3, 1).numpy().astype(float)
    expected = np.broadcast_to(colours.astype(np.uint16) / 4095 * 255, (32, 32, 3))
    assert np.abs(clear[..., 3] - alpha[..., 0] / 257).max() <= 0.51
    assert np.abs(clear[..., :3] - expected)[clear[..., 3] > 0].max() <= 0.51
    assert (clear[clear[..., 3] == 0] == 0).all()
    assert np.abs(opaque[..., :3] - expected).max() <= 0.51
    assert (opaque[..., 3] == 255).all()


def test_arrays_become_rgba():
    planes = PHOTO[:32, :48].transpose(2, 0, 1)
    assert np.array_equal(fitted(planes, (32, 48), 4)[..., :3], PHOTO[:32, :48])
    assert (fitted(planes, (32, 48), 4)[..., 3] == 255).all()
    grey = fitted(np.float32(RAMP * 255), (32, 32), 4)
    assert np.array_equal(grey[..., 0], np.round(np.float32(RAMP * 255)))
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert (grey[..., 3] == 255).all()
    clear = np.array(with_alpha("RGB"))
    assert np.array_equal(fitted(clear.transpose(2, 0, 1), (32, 48), 4), fitted(encoded(clear, "PNG"), (32, 48), 4))
    assert np.array_equal(fitted(clear.transpose(2, 0, 1), (32, 48), 3), fitted(encoded(clear, "PNG"), (32, 48), 3))


def test_rgba_images_are_laid_on_white_where_there_is_no_transparency(tmp_path):
    clear = np.array(with_alpha("RGB"))
    images = torch.from_numpy(clear).permute(2, 0, 1)[None]
    white = Image.alpha_composite(Image.new("RGBA", (48, 32), "white"), Image.fromarray(clear)).convert("RGB")
    laid = pictures.on_white(images)
    assert np.abs(laid[0].permute(1, 2, 0).numpy().astype(int) - np.array(white)).max() <= 1
    assert torch.equal(pictures.on_white(images[:, :3]), images[:, :3])
    assert np.array_equal(np.array(pictures.one(images[0])), clear)
    sheet = pictures.grid(images.repeat(3, 1, 1, 1), columns=2)
    assert (sheet.mode, sheet.size) == ("RGBA", (2 * 50 + 2, 2 * 34 + 2))
    assert np.array_equal(np.array(sheet)[2:34, 2:50], clear)
    for ending in ("webp", "mp4"):
        pictures.save_moving(images.repeat(2, 1, 1, 1), tmp_path / f"a.{ending}", fps=2)
    with Image.open(tmp_path / "a.webp") as image:
        assert image.size == (6 * 48, 6 * 32)
        assert np.abs(np.array(image.convert("RGB")).astype(int)[::6, ::6] - np.array(white)).max() <= 1


def test_colour_augmentation_leaves_opacity_alone():
    rng = torch.Generator().manual_seed(0)
    images, u = torch.rand(8, 4, 16, 24, generator=rng) * 2 - 1, torch.rand(8, 3, generator=rng)
    changed = color(images, u)
    assert torch.equal(changed[:, 3], images[:, 3])
    assert torch.equal(changed[:, :3], color(images[:, :3], u))
    assert not torch.allclose(changed[:, :3], images[:, :3])


# The store ------------------------------------------------------------------------------------------------------------


def folder_of(folder):
    folder.mkdir()
    for i, image in enumerate((COLOURS, GREY, with_alpha("RGB"))):
        image.save(folder / f"{i}.png")
    return folder


def test_stores_of_earlier_versions_are_found_again(tmp_path):
    """The rule of version 0.1.0, written out, and what is added for new settings."""
    folder = folder_of(tmp_path / "p")

    def name(**settings):
        config = DataConfig(source="folder", path=str(folder), **settings)
        return store.store_folder(sources.find(config), config).name

    def hashed(*made):
        fingerprint = sources.find(DataConfig(source="folder", path=str(folder))).fingerprint()
        return hashlib.sha256(json.dumps([1, fingerprint, *made]).encode()).hexdigest()[:32]

    assert name() == name(image_size=(32, 32)) == hashed(32, 3, False)
    assert name(image_size=64, channels=1, skip_bad=True) == hashed(64, 1, True)
    assert name(image_size=[32, 48], channels=4) == hashed([32, 48], 4, False)
    assert name(fit="pad") == hashed(32, 3, False, "pad")
    assert len({name(fit=fit) for fit in ("crop", "pad", "stretch")}) == 3


def test_a_store_holds_rectangles_and_rgba(tmp_path):
    folder = folder_of(tmp_path / "p")
    found = {
        fit: data.load(DataConfig(source="folder", path=str(folder), image_size=(64, 32), channels=4, fit=fit))
        for fit in ("crop", "pad", "stretch")
    }
    for fit, images in found.items():
        assert images.pixels.shape == (3, 4, 64, 32)
        for i, pixels in enumerate(images.pixels):
            expected = fitted((folder / f"{i}.png").read_bytes(), (64, 32), 4, fit)
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    # What is cached about images is found by their fingerprint.
    assert len({images.fingerprint for images in found.values()}) == 3


def test_only_pictures_of_the_generators_shape_pass(tmp_path):
    folder = folder_of(tmp_path / "p")

    def check(**settings):
        data.refuse_other_shapes(DataConfig(source="folder", path=str(folder), **settings))

    with pytest.raises(ValueError, match=r"0\.png is 32x48x3, but the generator draws 48x32x3 \(height x width x cha"):
        check(image_size=(48, 32), channels=3)
    check(image_size=(32, 48), channels=4)  # a picture without transparency is opaque
    for name in ("0", "1"):
        (folder / f"{name}.png").unlink()
    for name in ("LA", "palette", "palette with alphas", "a colour"):
        (folder / f"{name}.png").write_bytes(file_of(*CLEAR[name]))
    check(image_size=(32, 48), channels=4)


def test_data_shows_shapes(tmp_path, capsys):
    argv = ["data", str(folder_of(tmp_path / "p")), f"--out={tmp_path}/d.png", "--channels=4"]
    for given, fit in (("32,48", "pad"), ("[32,48]", "crop")):
        assert cli.main([*argv, "--image-size", given, "--fit", fit, "--prepare"]) == 0
        said = capsys.readouterr().out
        assert "48x32 RGBA" in said
        assert "looked at (width x height)\n" in said
        assert "fed as       32x48x4 (height x width x channels)\n" in said
    with Image.open(tmp_path / "d.png") as sheet:
        assert sheet.mode == "RGBA"
    for given in ("50", "1,2,3"):
        assert cli.main([*argv, "--image-size", given]) == 2
        assert "multiples of 4 up to 256" in capsys.readouterr().err


def test_given_pictures_are_made_to_fit_or_refused(tmp_path):
    folder, array = folder_of(tmp_path / "p"), tmp_path / "a.npz"
    np.savez(array, arr_0=np.array(with_alpha("RGB"))[None])
    how = {"size": (32, 48), "channels": 4}
    names, pixels = data.given(str(array), **how, fit=None)
    assert names == ["a-000000"]
    assert np.array_equal(
        pixels[0].permute(1, 2, 0).numpy(), fitted(encoded(np.array(with_alpha("RGB")), "PNG"), (32, 48), 4)
    )
    assert (data.given(str(folder), **how, fit=None)[1][0, 3] == 255).all()  # the first has no transparency
    with pytest.raises(ValueError, match=r"0\.png is 32x48x3.*--fit"):
        data.given(str(folder), size=(48, 32), channels=3, fit=None)
    for fit in ("crop", "pad"):
        _, pixels = data.given(str(folder), size=(64, 32), channels=4, fit=fit)
        assert np.array_equal(
            pixels[0].permute(1, 2, 0).numpy(), fitted(encoded(PHOTO[:32, :48], "PNG"), (64, 32), 4, fit)
        )


# Sizes ----------------------------------------------------------------------------------------------------------------

SIZES = [(32, 48), (64, 128), (8, 32), (256, 16), (36, 36), (80, 48), (80, 80), (100, 60), (252, 12)]


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
@pytest.mark.parametrize("size", SIZES)
def test_networks_of_every_shape(architecture, size):
    width = 64 if architecture == "r3gan" else 2  # a multiple of all that it may need
    model = ModelConfig(architecture=architecture, width=width, latent_dim=420)
    spec = ImageSpec(image_size=size, channels=4)
    least = models.ARCHITECTURES[architecture].least_doublings
    if layers.doublings(size) < least:
        words = rf"data\.image_size is \[{size[0]}, {size[1]}\], but {architecture} needs .* multiples of {2**least}"
        for build in (lambda: models.build(model, spec, seed=0), lambda: models.build_generator(model, spec)):
            with pytest.raises(ValueError, match=words):
                build()
        return
    G, D = models.build(model, spec, seed=0)
    fake = G(torch.randn(2, 420), None)
    assert fake.shape == (2, 4, *size)
    assert D(fake, None).shape == (2,)
    logits = D(fake, None).sum()
    (slope,) = torch.autograd.grad(logits, fake)
    assert (slope.abs().amax((0, 1)) > 0).all()  # D sees the whole image


def test_maps_double_as_often_as_whole_sides_of_at_least_four_allow():
    expected = {32: (3, 4), 64: (4, 4), 128: (5, 4), 256: (6, 4), 36: (2, 9), 100: (2, 25), 48: (3, 6), 160: (5, 5)}
    for side, (count, first) in expected.items():
        assert layers.doublings((side, side)) == count
        assert layers.first_map((side, side)) == (first, first)
    assert layers.first_map((32, 48)) == (4, 6)
    assert layers.first_map((8, 64)) == (4, 32)


def test_what_a_message_proposes_fits():
    for architecture in models.ARCHITECTURES:
        for size in ((4, 64), (256, 4), (8, 32), (12, 100)):
            try:
                models.check_size(ModelConfig(architecture=architecture), size)
            except ValueError as error:
                proposed = json.loads(str(error).split("for instance ")[1].split("]")[0] + "]")
                models.check_size(ModelConfig(architecture=architecture), DataConfig(image_size=proposed).size)


def test_a_recipe_keeps_height_and_width(tmp_path):
    config, _ = recipe.parse(["--run.dir=r", "--data.image_size=[64,128]", "--data.fit=pad", "--data.channels=4"])
    assert config.data.size == (64, 128)
    file = tmp_path / "config.yaml"
    file.write_text(recipe.dump(config))
    assert recipe.load(file) == config
    assert recipe.as_dict(config)["data"]["image_size"] == [64, 128]
    assert DataConfig(image_size=[64, 64]) == DataConfig(image_size=64)
    earlier, _ = recipe.parse(["--run.dir=r"])
    lines = recipe.dump(earlier).splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "fit:" not in line))  # an earlier version's
    assert recipe.mathematical_differences(recipe.load(file), earlier) == []
    for key, value in {"image_size": (32, 64), "fit": "pad", "channels": 4}.items():
        other = Config(run=RunConfig(dir="r"), data=DataConfig(**{key: value}))
        (difference,) = recipe.mathematical_differences(earlier, other)
        assert difference.startswith(f"data.{key}: ")


@pytest.mark.parametrize("size", [50, 0, -32, 28, 260, 512, (4, 28), (64, 260), (6, 64), (0, 64), (64,), (32, 32, 32)])
def test_sizes_beyond_the_rule_are_refused(size):
    with pytest.raises(
        ValueError, match=r"data\.image_size is .* multiples of 4 up to 256, the longer one at least 32"
    ):
        DataConfig(image_size=size)


def test_an_exported_shape_is_read_again():
    spec = ImageSpec(**json.loads(json.dumps({"image_size": (32, 48), "channels": 4})))
    assert spec == ImageSpec(image_size=(32, 48), channels=4)
    assert (spec.size, spec.shape, str(spec)) == ((32, 48), (4, 32, 48), "32x48x4")


def test_the_classifier_halves_until_the_longer_side_is_at_most_four(monkeypatch):
    for side, widths in {32: [16, 32, 128], 64: [16, 32, 64, 128], 256: [16, 32, 64, 128, 128, 128]}.items():
        network = Classifier(size=(side, side), channels=3, classes=2)  # as ever
        assert [layer.out_channels for layer in network.convolutions if hasattr(layer, "stride")] == widths
    for size in SIZES:
        network = Classifier(size=size, channels=4, classes=3)
        x = torch.randint(256, (2, 4, *size), dtype=torch.uint8)
        assert max(network.convolutions(x.float()).shape[2:]) in (3, 4)
        features, logits = network(x)
        assert (features.shape, logits.shape) == ((2, 128), (2, 3))
    monkeypatch.setattr(classifier, "_STEPS", 2)
    monkeypatch.setattr(classifier, "_EPOCHS", 0)
    trained, _ = classifier.train(
        torch.randint(256, (40, 4, 32, 48), dtype=torch.uint8), torch.arange(40) % 2, classes=2
    )
    assert trained.convolutions[0].in_channels == 4


@pytest.mark.parametrize("size", [(32, 48), (64, 16)])
def test_masks_have_the_pictures_shape(size, tmp_path):
    height, width = size
    shares = {"center": 0.25, "left": 0.5, "random": 0.5, "grid": 0.75, "scratch": 0.1}
    for kind in KINDS:
        hidden = masks(kind, ["a", "b"], size=size, seed=0)
        assert hidden.shape == (2, *size)
        assert hidden.float().mean().item() == pytest.approx(shares[kind], abs=0.1)
    assert masks("left", ["a"], size=size, seed=0)[0, :, : width // 2].all()
    Image.new("L", (width, height)).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=rf"m\.png is {height}x{width} \(height x width\), but the pictures are 32x32"):
        masks(str(tmp_path / "m.png"), ["a"], size=(32, 32), seed=0)


def test_shifts_of_the_benefits_classifier_keep_the_shape():
    pixels = torch.arange(32 * 48).view(1, 1, 32, 48).remainder(251).to(torch.uint8).expand(6, 4, -1, -1)
    moved = _augmented(pixels, 0, 0, mirror=False)
    assert moved.shape == pixels.shape
    for image in moved:
        inner = image[:, 8:24, 8:40]
        assert any(
            torch.equal(inner, pixels[0, :, 8 + down : 24 + down, 8 + right : 40 + right])
            for down in range(-4, 5)
            for right in range(-4, 5)
        )


def test_inception_sees_rgba_images_on_white():
    class Stub(torch.nn.Module):
        features_list = ("features", "logits")

        def forward(self, images):
            self.seen = images
            return images.float().mean((2, 3)), images.float().amax((2, 3))

    extractor = Inception.__new__(Inception)
    torch.nn.Module.__init__(extractor)
    extractor.network, extractor._layers = Stub(), ("features", "logits")
    images = torch.randint(256, (3, 4, 32, 48), dtype=torch.uint8)
    extractor(images)
    assert torch.equal(extractor.network.seen, pictures.on_white(images))
    extractor(images[:, :1])
    assert torch.equal(extractor.network.seen, images[:, :1].expand(-1, 3, -1, -1))
