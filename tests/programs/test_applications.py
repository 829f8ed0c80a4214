"""`distgan invert`, `inpaint` and `interpolate` as users call them, on one process and on two."""

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.commands import complaint
from support.generators import NAMES, exported
from support.programs import launch

from distgan import cli, load_generator
from distgan.applications.repair import psnr

FEW = ["--steps=12", "--restarts=2"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("plain") / "generator")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("labelled") / "generator", channels=1, names=NAMES)


@pytest.fixture(scope="module")
def pictures(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "p"
    assert cli.main(["sample", str(plain), "--num=40", "--seed=9", f"--out={folder}/"]) == 0
    return folder


def read(file):
    with Image.open(file) as image:
        return np.array(image)


def test_inverted_pictures_are_drawn_again_and_walked_between(labelled, tmp_path, capfd):
    assert cli.main(["sample", str(labelled), "--num=3", f"--out={tmp_path}/p/"]) == 0
    latents = tmp_path / "l.safetensors"
    argv = ["invert", labelled, tmp_path / "p", "--steps=200", f"--out={latents}", f"--grid={tmp_path}/g.png"]
    assert cli.main([*map(str, argv), f"--json={tmp_path}/n.json"]) == 0
    said = capfd.readouterr().out
    assert "no recipe beside it, so no training images" in said
    found = load_file(latents)
    assert found["latents"].shape == (3, 16)
    assert found["labels"].shape == (3,)
    assert cli.main(["sample", str(labelled), f"--latents={latents}", f"--out={tmp_path}/again/"]) == 0
    given, again = (
        torch.from_numpy(np.stack([read(file) for file in sorted((tmp_path / name).iterdir())]))[:, None]
        for name in ("p", "again")
    )
    drawn = load_generator(labelled).decode(found["latents"], found["labels"])
    assert torch.equal(again, drawn)
    assert psnr(again, given, torch.ones(3, 32, 32, dtype=torch.bool)).median() > 30
    numbers = json.loads((tmp_path / "n.json").read_text())
    error = ((again.double() - given.double()) / 127.5).square().mean((1, 2, 3)).sqrt()
    assert numbers["distance"] == pytest.approx(error.tolist(), rel=1e-4)
    assert numbers["distance_of_nearest_training_image"] is None
    assert len(numbers["pictures"]) == 3
    assert read(tmp_path / "g.png").shape == (2 * 34 + 2, 3 * 34 + 2, 3)
    walk = ["interpolate", str(labelled), f"--latents={latents}", "--steps=5", f"--out={tmp_path}/w.png"]
    assert cli.main(walk) == 0
    strip = read(tmp_path / "w.png")[2:34]
    for station in range(3):
        at = 2 + 5 * station * 34
        assert np.array_equal(strip[:, at : at + 32, 0], again[station, 0].numpy())


@pytest.mark.parametrize(("ending", "frames"), [("gif", 7), ("webp", 7), ("mp4", 7)])
def test_an_animation_has_every_image(labelled, tmp_path, ending, frames):
    out = tmp_path / f"w.{ending}"
    argv = ["interpolate", str(labelled), "--classes=cat,big, red,2,cat", "--steps=2", f"--out={out}", "--fps=10"]
    assert cli.main(argv) == 0
    if ending == "mp4":
        with av.open(str(out)) as video:
            shown = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    else:
        with Image.open(out) as image:
            # Equal neighbours (class 2 after class 2) may be one frame that is shown for longer.
            durations, shown = [], []
            for i in range(image.n_frames):
                image.seek(i)
                image.load()
                count = round(image.info["duration"] / 100)
                shown += [np.array(image.convert("RGB"))] * count
                durations.append(count)
            assert image.info["loop"] == 0
    assert len(shown) == frames
    generator = load_generator(labelled)
    first, last = (generator.sample(1, label="cat")[0, 0].float(), torch.from_numpy(shown[-1]).float().mean(2))
    assert shown[0].shape == (256, 256, 3)
    for frame in (torch.from_numpy(shown[0]).float().mean(2), last):
        assert (frame[4::8, 4::8] - first).abs().mean() < 6  # GIF has 256 colours, and H.264 is lossy


def test_completed_pictures_keep_what_was_known(plain, pictures, tmp_path, capfd):
    argv = ["inpaint", plain, pictures, "--mask=left", f"--out={tmp_path}/r", f"--grid={tmp_path}/g.png", "--num=9"]
    assert cli.main([*map(str, argv), "--steps=100", f"--json={tmp_path}/n.json"]) == 0
    said = capfd.readouterr().out
    assert "not compared with the nearest training image: no recipe beside it" in said
    names = [f"{i:06d}.png" for i in range(9)]
    assert [file.name for file in sorted((tmp_path / "r").iterdir())] == names
    for name in names:
        given, repaired = read(pictures / name), read(tmp_path / "r" / name)
        assert np.array_equal(given[:, 16:], repaired[:, 16:])
        assert not np.array_equal(given[:, :16], repaired[:, :16])
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["hidden"] == [0.5] * 9
    scores = numbers["scores"]
    assert set(scores) == {"repair", "mean", "biharmonic"}
    for by_metric in scores.values():
        assert len(by_metric["psnr"]) == len(by_metric["ssim"]) == 9
    assert np.mean(scores["repair"]["psnr"]) > np.mean(scores["mean"]["psnr"]) + 3
    assert f"{np.mean(scores['repair']['psnr']):.2f} dB" in said
    assert read(tmp_path / "g.png").shape == (5 * 34 + 2, 8 * 34 + 2, 3)


def test_masks_from_files_are_measured_only_if_the_pictures_are_whole(plain, pictures, tmp_path):
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[4:9, 10:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for whole in (False, True):
        argv = ["inpaint", plain, pictures, f"--mask={tmp_path}/mask.png", f"--out={tmp_path}/{whole}", "--num=2", *FEW]
        more = [f"--json={tmp_path}/{whole}.json", *(["--whole"] if whole else [])]
        assert cli.main([*map(str, argv), *more]) == 0
        assert bool(json.loads((tmp_path / f"{whole}.json").read_text())["scores"]) is whole
    given, repaired = read(pictures / "000000.png"), read(tmp_path / "True" / "000000.png")
    assert np.array_equal(given[mask == 0], repaired[mask == 0])


def test_pictures_may_be_an_array_of_ours(labelled, tmp_path):
    found = []
    for out in ("p/", "a.npz"):
        assert cli.main(["sample", str(labelled), "--num=3", f"--out={tmp_path}/{out}"]) == 0
        latents = tmp_path / f"{out[0]}.safetensors"
        assert cli.main(["invert", str(labelled), f"{tmp_path}/{out}", f"--out={latents}", *FEW]) == 0
        found.append(latents.read_bytes())
    assert found[0] == found[1]


def test_one_picture_of_any_size_can_be_fitted(plain, tmp_path):
    Image.new("L", (50, 41), 99).save(tmp_path / "one.jpg")
    argv = ["inpaint", str(plain), f"{tmp_path}/one.jpg", "--mask=center", "--fit", f"--out={tmp_path}/r", *FEW]
    assert cli.main(argv) == 0
    repaired = read(tmp_path / "r" / "one.png")
    assert repaired.shape == (32, 32, 3)
    assert (abs(repaired[0].astype(int) - 99) <= 1).all()


def test_two_processes_find_what_one_finds(plain, pictures, tmp_path):
    """40 pictures are two groups, one for each of two processes."""
    for world in (1, 2):
        out = tmp_path / str(world)
        out.mkdir()
        argv = [str(plain), str(pictures), "--seed=3", *FEW]
        assert launch([*argv, f"--out={out}/l.safetensors"], verb="invert", world=world) == [0] * world
        mask = ["--mask=random", f"--out={out}/r", f"--json={out}/n.json"]
        assert launch([*argv, *mask], verb="inpaint", world=world) == [0] * world
    one, two = (
        {file.relative_to(tmp_path / world): file.read_bytes() for file in (tmp_path / world).rglob("*.*")}
        for world in ("1", "2")
    )
    assert one == two
    assert len(one) == 42


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["invert", "G", "nowhere"], ["nowhere does not exist", "give a picture"]),
        (["invert", "G", "small"], ["0.png is 16x16x3", "draws 32x32x3", "--fit"]),
        (["invert", "G", "grey"], ["0.png is 32x32x1", "--fit"]),
        (["invert", "G", "noise.png"], ["noise.png"]),
        (["invert", "G", "empty"], ["empty"]),
        (["invert", "G", "noise.npz"], ["noise.npz is no .npz file with an array arr_0"]),
        (["invert", "G", "other.npz"], ["other.npz is no .npz file with an array arr_0"]),
        (["invert", "G", "floats.npz"], ["floats.npz is float64 (2, 32, 32, 3)", "uint8 (N, H, W, 3)"]),
        (["invert", "G", "small.npz"], ["small-000000 is 16x16x3", "--fit"]),
        (["invert", "G", "test"], ["PICTURES is test", "no recipe"]),
        (["invert", "G", "p", "--out=there.safetensors"], ["there.safetensors", "exists", "--overwrite"]),
        (["invert", "G", "p", "--out=l.npz"], ["l.npz", ".safetensors"]),
        (["invert", "G", "p", "--out=no/l.safetensors"], ["no folder no"]),
        (["invert", "G", "p", "--grid=there.png"], ["--grid is there.png", "exists"]),
        (["invert", "G", "p", "--steps=0"], ["number of steps is 0"]),
        (["invert", "G", "p", "--restarts=0"], ["number of restarts is 0"]),
        (["invert", "G", "p", "--restarts=2000"], ["number of restarts is 2000", "at most 1024"]),
        (["invert", "G", "p", "--num=0"], ["--num is 0"]),
        (["inpaint", "G", "p", "--mask=centre", "--out=r"], ['"centre"', 'did you mean "center"?']),
        (["inpaint", "G", "p", "--mask=white.png", "--out=r"], ["white.png hides everything"]),
        (["inpaint", "G", "p", "--mask=black.png", "--out=r"], ["black.png hides nothing"]),
        (["inpaint", "G", "p", "--mask=small/0.png", "--out=r"], ["16x16", "32x32"]),
        (["inpaint", "G", "p", "--mask=noise.png", "--out=r"], ["noise.png"]),
        (["inpaint", "G", "p", "--mask=small", "--out=r"], ["no mask for", "x.png"]),
        (["inpaint", "G", "p", "--mask=center", "--out=full"], ["full, which is not empty (it has cat)"]),
        (["inpaint", "G", "p", "--mask=center", "--out=there.png"], ["there.png, which is a file"]),
        (["inpaint", "G", "p", "--mask=center", "--out=no/r"], ["no folder no"]),
        (["inpaint", "G", "p", "--mask=center", "--out=p", "--overwrite"], ["--out is", "PICTURES is read from there"]),
        (["inpaint", "G", "p/x.png", "--mask=center", "--out=p", "--overwrite"], ["--out is", "PICTURES is read"]),
        (["inpaint", "G", "links", "--mask=center", "--out=p", "--overwrite"], ["--out is", "PICTURES is read"]),
        (["inpaint", "G", "p", "--mask=center", "--out=r", "--grid=r/x.png"], ["--grid is", "--out is written"]),
        (
            ["inpaint", "G", "p", "--mask=center", "--out=empty", "--grid=empty/x.png"],
            ["--grid is", "--out is written"],
        ),
        (["invert", "G", "p", "--json=p/x.png"], ["--json is", "PICTURES is read from there"]),
        (["invert", "G", "p", "--out=l.safetensors", "--json=l.safetensors"], ["written there, too"]),
        (["inpaint", "G", "p", "--mask=small", "--out=small/r"], ["--out is", "--mask is read from there"]),
        (["inpaint", "G", "p", "--mask=alpha.png", "--out=r"], ["alpha.png has transparency"]),
        (["inpaint", "G", "p", "--mask=deep.png", "--out=r"], ["deep.png has transparency or more than 8 bits"]),
        (["invert", "G", "p", f"--out={'n' * 240}.safetensors"], ["too long"]),
        (["interpolate", "G", "--fps=3000000000"], ["--fps is 3000000000", "1 to 100"]),
        (["interpolate", "G", "--seed=3"], ["--seed has no meaning without --classes"]),
        (["interpolate", "G", "--seeds=1"], ["--seeds 1 gives one image", "at least two"]),
        (["interpolate", "G", "--seeds=1,b"], ["--seeds is 1,b", "numbers"]),
        (["interpolate", "G", "--classes=cat,dog"], ["trained without labels"]),
        (["interpolate", "G", "--out=w.avi"], ["w.avi", ".mp4"]),
        (["interpolate", "G", "--out=there.gif"], ["there.gif, which exists", "--overwrite"]),
        (["interpolate", "G", "--steps=0"], ["--steps is 0"]),
        (["interpolate", "G", "--latents=there.safetensors"], ["holds w, but no latents"]),
        (["interpolate", "G", "--latents=wide.safetensors"], ["float32 (2, 9)", "(N, 16)"]),
        (["interpolate", "G", "--latents=labels.safetensors"], ["has labels, but the generator takes none"]),
        (["sample", "G", "--latents=nan.safetensors"], ["NaN or infinite"]),
        (["sample", "G", "--latents=nan.safetensors", "--num=3"], ["leave --num or --latents out"]),
        (["sample", "G", "--latents=noise.png"], ["noise.png is not a readable safetensors file"]),
    ],
)
def test_mistakes_are_said_before_any_work(plain, tmp_path, monkeypatch, capfd, argv, words):
    monkeypatch.chdir(tmp_path)
    for folder, size, mode in (("p", 32, "RGB"), ("small", 16, "RGB"), ("grey", 32, "L")):
        (tmp_path / folder).mkdir()
        Image.new(mode, (size, size)).save(tmp_path / folder / ("x.png" if folder == "p" else "0.png"))
    for name, colour in (("white", 255), ("black", 0), ("there", 9)):
        Image.new("L", (32, 32), colour).save(f"{name}.png")
    for name in ("noise.png", "noise.npz"):
        (tmp_path / name).write_bytes(b"noise")
    np.savez("other.npz", images=np.zeros(3))
    np.savez("floats.npz", np.zeros((2, 32, 32, 3)))
    np.savez("small.npz", np.zeros((2, 16, 16, 3), dtype=np.uint8))
    (tmp_path / "there.gif").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "l.png").symlink_to(tmp_path / "p" / "x.png")
    Image.new("RGBA", (32, 32), (255, 255, 255, 99)).save("alpha.png")
    Image.fromarray(np.full((32, 32), 300, dtype=np.uint16)).save("deep.png")
    (tmp_path / "full" / "cat").mkdir(parents=True)
    for name, found in {
        "there": {"w": torch.zeros(1)},
        "wide": {"latents": torch.zeros(2, 9)},
        "nan": {"latents": torch.full((2, 16), float("nan"))},
        "labels": {"latents": torch.zeros(2, 16), "labels": torch.zeros(2, dtype=torch.int64)},
    }.items():
        save_file(found, f"{name}.safetensors")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    said = complaint(capfd, *(str(plain) if word == "G" else word for word in argv))
    assert all(word in said for word in words), said
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_files_are_replaced_if_that_is_asked_for(plain, pictures, tmp_path):
    out = tmp_path / "l.safetensors"
    out.write_bytes(b"old")
    argv = ["invert", str(plain), str(pictures), f"--out={out}", "--num=1", *FEW]
    assert cli.main([*argv, "--overwrite"]) == 0
    assert load_file(out)["latents"].shape == (1, 16)
