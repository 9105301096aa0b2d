"""The measures of where heatmaps point, on maps and pictures with obvious answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from bench.composites import HEIGHT, WIDTH, compose, find_stamps, write_folders
from bench.localisation import quality


def _masks() -> np.typing.NDArray[np.bool_]:
    masks = np.zeros((2, 20, 20), bool)
    masks[0, :10] = True
    masks[1, 5:15, 5:15] = True
    return masks


def test_the_object_itself_is_the_best_map() -> None:
    found = quality(_masks().astype(np.float32), _masks())
    assert (found["energy"], found["pointing"], found["iou"], found["blank"]) == (1, 1, 1, 0)


def test_a_map_of_everything_finds_as_much_as_the_object_covers() -> None:
    found = quality(np.ones((2, 20, 20), np.float32), _masks())
    assert found["energy"] == pytest.approx((200 + 100) / 2 / 400)
    assert found["iou"] == pytest.approx((200 + 100) / 2 / 400)


def test_a_map_beside_the_object_finds_nothing() -> None:
    found = quality((~_masks()).astype(np.float32), _masks())
    assert (found["energy"], found["pointing"], found["iou"]) == (0, 0, 0)


def test_a_blank_map_counts_as_a_miss() -> None:
    maps = _masks().astype(np.float32)
    maps[1] = 0
    found = quality(maps, _masks())
    assert (found["energy"], found["pointing"], found["iou"], found["blank"]) == (0.5, 0.5, 0.5, 1)


def test_worked_by_hand() -> None:
    """Half of the heat inside, the peak outside; above 0.4 of the peak two pixels of which one is in a mask of two."""
    masks = np.array([[[True, True, False, False]]])
    found = quality(np.array([[[1.0, 3.0, 4.0, 0.0]]], np.float32), masks)
    assert found["energy"] == pytest.approx(0.5)
    assert found["pointing"] == 0
    # From 0.05 to 0.25 of the peak all but the last pixel are found: 2 of 3.
    assert found["iou"] == pytest.approx(2 / 3)
    assert found["threshold"] == pytest.approx(0.05)


@pytest.fixture
def cutouts(tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for name, colour in {"red": (255, 0, 255, 255), "green": (0, 255, 254, 255)}.items():
        image = Image.new("RGBA", (90, 120))
        ImageDraw.Draw(image).ellipse((10, 20, 70, 100), fill=colour)
        paths[name] = tmp_path / f"{name}.png"
        image.save(paths[name])
    return paths


def test_masks_are_where_the_objects_are(cutouts: dict[str, Path]) -> None:
    colours = {"red": (255, 0, 255), "green": (0, 255, 254)}
    for seed in range(20):
        composite = compose(cutouts, np.random.default_rng(seed))
        assert composite.pixels.shape == (HEIGHT, WIDTH, 3)
        for name, mask in composite.masks.items():
            painted = np.all(np.abs(composite.pixels.astype(int) - colours[name]) <= 2, axis=2)
            # Half-transparent edges are in neither, or only in the mask.
            assert mask.sum() > 0.9 * painted.sum() > 500
            assert painted[mask].mean() > 0.85
            assert not painted[~mask].any()
        assert not (composite.masks["red"] & composite.masks["green"]).any()


def test_objects_lie_anywhere_at_any_size(cutouts: dict[str, Path]) -> None:
    composites = [compose({"red": cutouts["red"]}, np.random.default_rng(seed)) for seed in range(60)]
    centres = np.array([np.argwhere(composite.masks["red"]).mean(axis=0) for composite in composites])
    assert (centres.std(axis=0) > (HEIGHT * 0.1, WIDTH * 0.15)).all()
    areas = np.array([composite.masks["red"].mean() for composite in composites])
    assert areas.max() > 3 * areas.min()


def test_photos_to_test_on_show_other_objects_than_those_to_learn_from(
    cutouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.composites.CLASSES", {"one": "a/one", "two": "b/two"})
    for place in ("a/one", "b/two"):
        folder = tmp_path / "stamps" / place / "cartoon"
        folder.mkdir(parents=True)
        for number in range(12):
            Image.open(cutouts["red"]).save(folder.parent / f"{number}.png")
        Image.open(cutouts["green"]).save(folder / "drawing.png")
    stamps = find_stamps(tmp_path / "stamps")
    for train, held_out in stamps.values():
        assert (len(train), len(held_out)) == (8, 4)
        assert not set(train) & set(held_out)
        assert not any("cartoon" in path.parts for path in (*train, *held_out))
    write_folders(tmp_path / "out", stamps, train=3, val=2)
    for part, count in (("train", 3), ("val", 2)):
        for name in ("one", "two"):
            for place in ("photos", "masks"):
                assert len(list((tmp_path / "out" / place / part / name).iterdir())) == count
    for path in (tmp_path / "stamps" / "b" / "two").glob("1*.png"):
        path.unlink()
    with pytest.raises(SystemExit, match="two holds 9 cut-outs: 10 are needed"):
        find_stamps(tmp_path / "stamps")
