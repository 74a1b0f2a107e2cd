"""Views on the device against the pipeline of PIL on the same draws, pixel by pixel."""

import numpy as np
import pytest
import torch
from pckd import MultiView, Views
from pckd.views import draws, normalize
from PIL import Image, ImageOps


def pil_views(image, views, mirrored, corners):
    """What a data loader does: mirror, turn, pad, crop, one view after another."""
    picture = Image.fromarray(image)
    if mirrored:
        picture = ImageOps.mirror(picture)
    out = []
    for k, (row, column) in enumerate(corners):
        view = picture
        if views.kind == "rot90" and k:
            view = view.transpose(
                [None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270][k]
            )
        if views.kind == "flip" and k % 2:
            view = ImageOps.mirror(view)
        padded = ImageOps.expand(view, border=views.padding, fill=0)
        out.append(np.asarray(padded.crop((column, row, column + view.width, row + view.height))))
    return out


@pytest.mark.parametrize("kind", ["rot90", "crop", "flip"])
@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("side", [7, 16])
def test_views_equal_those_of_pil_bit_for_bit(kind, number, side):
    images = torch.randint(256, (9, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index = torch.arange(40, 49)
    views = Views(kind=kind, number=number, padding=3)
    multi = MultiView(views, seed=5)
    found = multi(images, index, 2).view(9, number, 3, side, side).permute(0, 1, 3, 4, 2).numpy()
    mirrored, corners = multi.parameters(index, 2)
    assert 0 < int(mirrored.sum()) < 9
    for b in range(9):
        image = images[b].permute(1, 2, 0).contiguous().numpy()
        for ours, theirs in zip(found[b], pil_views(image, views, bool(mirrored[b]), corners[b].tolist()), strict=True):
            assert np.array_equal(ours, theirs)


def test_four_turns_are_none():
    """Without padding, view k turned back k times is the first view."""
    images = torch.randint(256, (3, 3, 6, 6), dtype=torch.uint8)
    found = MultiView(Views(padding=0))(images, torch.arange(3), 0).view(3, 4, 3, 6, 6)
    for k in range(4):
        assert torch.equal(torch.rot90(found[:, k], -k, (2, 3)), found[:, 0])


def test_draws_depend_on_seed_epoch_and_image_alone():
    index = torch.arange(1000)
    first = draws(0, 3, index, 9)
    order = torch.randperm(1000)
    assert torch.equal(draws(0, 3, index[order], 9), first[order])
    assert torch.equal(draws(0, 3, index, 5), first[:, :5])
    for other in (draws(1, 3, index, 9), draws(0, 4, index, 9), draws(0, 3, index + 1000, 9)):
        assert float((other == first).double().mean()) < 0.01
    assert int(first.min()) >= 0 and int(first.max()) < 2**31  # noqa: PT018
    counts = torch.bincount((first % 9).flatten(), minlength=9)
    assert (counts - 1000).abs().max() < 150, counts
    correlation = torch.corrcoef(first.double().T)
    assert (correlation - torch.eye(9)).abs().max() < 0.12


def test_normalizing_and_views_of_none():
    images = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(normalize(images, mean, std), expected, atol=1e-6)
    assert MultiView(Views(kind="none"))(images, torch.arange(2), 0) is images


def test_bad_images():
    """Quarter turns of what is not square name the shape."""
    oblong = torch.zeros(2, 3, 5, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="5 x 4"):
        MultiView(Views())(oblong, torch.arange(2), 0)
    assert MultiView(Views(kind="crop"))(oblong, torch.arange(2), 0).shape == (8, 3, 5, 4)
    with pytest.raises(ValueError, match="uint8"):
        MultiView(Views())(oblong.float(), torch.arange(2), 0)
