"""The parts of a repair, against formulas written out and against scikit-image."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from distgan.applications import repair
from distgan.applications.masks import KINDS, masks
from distgan.evaluation.neighbours import nearest_where

SIZE = 16
RNG = np.random.default_rng(0)


def pictures(count, channels=3, size=SIZE):
    return torch.from_numpy(RNG.integers(256, size=(count, channels, size, size), dtype=np.uint8))


def holes(*kinds, size=SIZE):
    return torch.cat([masks(kind, ["a"], size=(size, size), seed=0) for kind in kinds])


@pytest.mark.parametrize("kind", [*KINDS])
def test_a_blend_solves_poissons_equation(kind):
    """The same system, dense, from equation 7 of Pérez et al. 2003: |N_p| f_p - sum f_q = sum (g_p - g_q)."""
    (picture,), (hidden,) = pictures(1, size=8), holes(kind, size=8)
    image = torch.from_numpy(RNG.random((3, 8, 8))).float() * 2 - 1
    ours = repair.blend(picture, image, hidden)
    assert torch.equal(ours[:, ~hidden], picture[:, ~hidden])
    g = (image.double().numpy() + 1) * 127.5
    matrix, right = np.zeros((64, 64)), np.zeros((64, 3))
    for p in range(64):
        row, column = divmod(p, 8)
        if not hidden[row, column]:
            matrix[p, p], right[p] = 1, picture[:, row, column]
            continue
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < 8 and 0 <= c < 8:
                matrix[p, p] += 1
                matrix[p, r * 8 + c] -= 1
                right[p] += g[:, row, column] - g[:, r, c]
    expected = np.linalg.solve(matrix, right).T.reshape(3, 8, 8).round().clip(0, 255)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1)
    assert (ours.numpy() == expected).mean() > 0.99  # but for halves that round either way


def test_the_agreement_is_the_least_squares_factor():
    (picture,), (hidden,) = pictures(1), holes("center")
    picture = picture / 127.5 - 1
    image = picture + torch.from_numpy(RNG.standard_normal((3, SIZE, SIZE))).float()
    image[:, hidden] = 9  # not looked at
    pairs = [
        (one[c, p, q], one[c, r, s])
        for one in (image.double(), picture.double())
        for c in range(3)
        for p, q in np.ndindex(SIZE, SIZE)
        for r, s in ((p + 1, q), (p, q + 1))
        if r < SIZE and s < SIZE and not hidden[p, q] and not hidden[r, s]
    ]
    differences = np.array([float(b - a) for a, b in pairs]).reshape(2, -1)
    (expected,), *_ = np.linalg.lstsq(differences[0][:, None], differences[1], rcond=None)
    assert 0 < expected < 1
    assert repair.agreement(picture, image, hidden) == pytest.approx(expected)
    assert repair.agreement(picture, picture, hidden) == pytest.approx(1)
    assert repair.agreement(picture, -picture, hidden) == 0
    assert repair.agreement(picture, torch.zeros(3, SIZE, SIZE), hidden) == 0


def test_no_seam_remains_where_the_image_is_only_darker():
    (picture,), (hidden,) = pictures(1) // 2 + 64, holes("center")
    darker = picture.double() / 127.5 - 1 - 0.3
    assert torch.equal(repair.blend(picture, darker, hidden), picture)


def test_weights_are_the_shares_of_hidden_pixels_around():
    """Equation 3 of Yeh et al. 2017, over those of the window's 49 pixels that the picture has."""
    hidden = holes("random", "center", "scratch")
    ours = repair.weights_near(hidden)
    for n, row, column in np.ndindex(len(hidden), SIZE, SIZE):
        window = hidden[n, max(0, row - 3) : row + 4, max(0, column - 3) : column + 4]
        expected = 0.0 if hidden[n, row, column] else window.float().mean()
        assert ours[n, 0, row, column] == pytest.approx(float(expected), abs=1e-6)


def test_scores_are_scikit_images():
    truth, other = pictures(4), pictures(4)
    hidden = holes("center", "left", "random", "scratch")
    ours = repair.psnr(other, truth, hidden)
    inner = torch.zeros_like(hidden)
    inner[:, 3:-3, 3:-3] = True  # what scikit-image's own mean is over
    for n in range(4):
        inside = [one[n][:, hidden[n]].numpy() for one in (truth, other)]
        assert ours[n] == pytest.approx(peak_signal_noise_ratio(*inside, data_range=255))
        whole = structural_similarity(*(one[n].permute(1, 2, 0).numpy() for one in (other, truth)), channel_axis=2)
        assert float(repair.ssim(other, truth, inner)[n]) == pytest.approx(whole)
    assert repair.psnr(truth, truth, hidden).tolist() == [100] * 4
    assert repair.ssim(truth, truth, hidden).tolist() == pytest.approx([1] * 4)


def test_simple_fills_use_known_pixels_only():
    truth, hidden = pictures(2), holes("center", "random")
    spoiled = torch.where(hidden[:, None], 255 - truth, truth)
    training = torch.cat([pictures(30), truth, pictures(3)])
    for fill in (
        repair.fill_with_mean,
        repair.fill_smoothly,
        lambda some, where: repair.fill_with_nearest(some, where, training),
    ):
        filled = fill(truth, hidden)
        assert torch.equal(filled, fill(spoiled, hidden))
        known = ~hidden[:, None].expand_as(truth)
        assert torch.equal(filled[known], truth[known])
    means = repair.fill_with_mean(truth, hidden)
    for n in range(2):
        known = truth[n][:, ~hidden[n]].double().mean(1)
        assert torch.equal(means[n][:, hidden[n]][:, 0], known.round().to(torch.uint8))
    assert torch.equal(repair.fill_with_nearest(spoiled, hidden, training), truth)
    assert nearest_where(spoiled, ~hidden, training).tolist() == [30, 31]


def test_masks_hide_what_they_say_and_depend_on_their_own_number_alone():
    shares = {"center": 1 / 4, "left": 1 / 2, "grid": 3 / 4, "random": 1 / 2, "scratch": 0.2}
    for kind, share in shares.items():
        some = masks(kind, ["x"] * 20, size=(32, 32), seed=1)
        assert float(some.float().mean()) == pytest.approx(share, abs=0.02 if kind != "scratch" else 0.1)
        assert torch.equal(masks(kind, ["x"] * 5, size=(32, 32), seed=1), some[:5])
        assert kind in ("center", "left", "grid") or not torch.equal(some[0], some[1])


def test_mask_files_are_one_for_all_or_one_for_each(tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    white = {"a": (0, 0), "b": (3, 5)}
    for name, (row, column) in white.items():
        array = np.zeros((SIZE, SIZE), dtype=np.uint8)
        array[row, column] = 255
        Image.fromarray(array).save(folder / f"{name}.png")
    each = masks(str(folder), ["x/b.jpg", "a.jpeg"], size=(SIZE, SIZE), seed=0)
    assert [one.nonzero().tolist() for one in each] == [[[3, 5]], [[0, 0]]]
    (folder / "more").mkdir()
    Image.new("L", (SIZE, SIZE)).save(folder / "more" / "a.png")
    with pytest.raises(ValueError, match="several masks named a"):
        masks(str(folder), ["b"], size=(SIZE, SIZE), seed=0)
    one = masks(str(folder / "a.png"), ["x", "y", "z"], size=(SIZE, SIZE), seed=0)
    assert one.shape == (3, SIZE, SIZE)
    assert one.nonzero().tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
