"""A folder of photos on its way to Keras."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photo_folders import CLASSES, make_class_folders
from PIL import Image

from fastcam.errors import ArgumentError, WriteError
from fastcam.pictures.preparing import resize_image
from fastcam.pictures.reading import read_image
from fastcam.training.photos import Photos, stage_photos


def _stage(folder: Path, staging: Path, validation: float = 0.25, seed: int = 0) -> Photos:
    return stage_photos(folder, staging, 32, validation, seed, lambda done, total: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_class_folders(tmp_path / "photos")


def _by_part(photos: Photos) -> dict[str, list[tuple[str, int]]]:
    return {
        "train": sorted((str(photo.source), photo.label) for photo in photos.train),
        "val": sorted((str(photo.source), photo.label) for photo in photos.val),
    }


def test_classes_are_the_folders_in_order_and_every_photo_is_in_one_part(folder: Path, tmp_path: Path) -> None:
    photos = _stage(folder, tmp_path / "staged")
    assert photos.classes == tuple(sorted(CLASSES))
    for part, count in ((photos.train, 6), (photos.val, 2)):
        for label, name in enumerate(photos.classes):
            assert [photo.source.parent.name for photo in part if photo.label == label] == [name] * count
    sources = {photo.source for photo in (*photos.train, *photos.val)}
    assert sources == set(folder.rglob("*.png"))


def test_what_keras_reads_is_what_the_explainer_would_give_the_network(folder: Path, tmp_path: Path) -> None:
    keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[train]")
    photos = _stage(folder, tmp_path / "staged")
    for part, members in (("train", photos.train), ("val", photos.val)):
        dataset = keras.utils.image_dataset_from_directory(
            tmp_path / "staged" / part, image_size=(32, 32), batch_size=100, shuffle=False, verbose=False
        )
        ((pixels, labels),) = dataset.as_numpy_iterator()
        assert labels.tolist() == [photo.label for photo in members]
        expected = [resize_image(read_image(photo.source), (32, 32)) for photo in members]
        np.testing.assert_array_equal(pixels, np.stack(expected))


def test_the_division_depends_on_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    first = _by_part(_stage(folder, tmp_path / "a"))
    assert _by_part(_stage(folder, tmp_path / "b")) == first
    assert any(_by_part(_stage(folder, tmp_path / f"c{seed}", seed=seed)) != first for seed in (1, 2))
    # An additional class does not change the split of the others.
    (folder / "another").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "another" / "1.png")
    Image.new("RGB", (9, 9)).save(folder / "another" / "2.png")
    extended = _by_part(_stage(folder, tmp_path / "d"))
    for part in ("train", "val"):
        kept = {source for source, _ in extended[part] if "another" not in source}
        assert kept == {source for source, _ in first[part]}


def test_photos_are_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _stage(folder, tmp_path / "staged")
    before = {photo.staged: photo.staged.stat().st_mtime_ns for photo in (*first.train, *first.val)}
    monkeypatch.setattr("fastcam.training.photos.read_image", lambda path: pytest.fail(f"{path} was read again"))
    again = _stage(folder, tmp_path / "staged")
    assert again == first
    # A different split moves them.
    other = _stage(folder, tmp_path / "staged", seed=3)
    assert {photo.staged.name for photo in (*other.train, *other.val)} == {path.name for path in before}
    assert set((tmp_path / "staged").rglob("*.png")) == {photo.staged for photo in (*other.train, *other.val)}


def test_changed_and_removed_photos_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    _stage(folder, tmp_path / "staged")
    (folder / "grün" / "00.png").unlink()
    Image.new("RGB", (20, 20), "white").save(folder / "grün" / "01.png")
    photos = _stage(folder, tmp_path / "staged")
    staged = {photo.source.name: photo.staged for photo in (*photos.train, *photos.val) if photo.label == 0}
    assert len(list((tmp_path / "staged").rglob("*.png"))) == 23
    assert np.asarray(Image.open(staged["01.png"])).min() == 255


def test_train_and_val_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for part, seed in (("train", 1), ("validation", 2)):
        make_class_folders(tmp_path / "photos" / part, 3, seed=seed)
    photos = _stage(tmp_path / "photos", tmp_path / "staged")
    assert {photo.source.parts[-3] for photo in photos.train} == {"train"}
    assert {photo.source.parts[-3] for photo in photos.val} == {"validation"}
    assert (len(photos.train), len(photos.val)) == (9, 9)


def test_the_same_photo_in_two_classes_stays_two_photos(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "grün" / "00.png", folder / "red one" / "copy.png")
    photos = _stage(folder, tmp_path / "staged")
    assert len({photo.staged for photo in (*photos.train, *photos.val)}) == 25


def test_what_is_no_photo_is_listed_and_skipped(folder: Path, tmp_path: Path) -> None:
    (folder / "grün" / "empty.jpg").touch()
    (folder / "grün" / "text.png").write_text("no picture")
    (folder / "grün" / "notes.txt").write_text("no picture")
    (folder / "grün" / ".DS_Store").write_text("nobody's business")
    whole = (folder / "grün" / "00.png").read_bytes()
    (folder / "red one" / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (9, 9)).save(folder / "loose.png")
    (folder / ".hidden").mkdir()
    photos = _stage(folder, tmp_path / "staged")
    assert len(photos.train) + len(photos.val) == 24
    assert len(photos.skipped) == 5
    for name in ("empty.jpg", "text.png", "notes.txt", "cut.png", "loose.png"):
        assert sum(name in reason for reason in photos.skipped) == 1, name


def test_copies_in_hidden_folders_are_no_photos(folder: Path, tmp_path: Path) -> None:
    """An editor's copy of a training photo could become a validation photo."""
    shutil.copytree(folder / "grün", folder / "grün" / ".ipynb_checkpoints" / "deep")
    photos = _stage(folder, tmp_path / "staged")
    assert len(photos.train) + len(photos.val) == 24
    assert not any(".ipynb_checkpoints" in photo.source.parts for photo in (*photos.train, *photos.val))


def test_a_folder_that_may_not_be_read_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "grün" / "secret").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    photos = _stage(folder, tmp_path / "staged")
    (reason,) = photos.skipped
    assert reason.endswith("secret' cannot be read (Permission denied)")


def test_only_staged_photos_are_ever_removed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "staged" / "train" / "0000").mkdir(parents=True)
    (tmp_path / "staged" / "train" / "0000" / "mine.png").touch()
    _stage(folder, tmp_path / "staged")
    assert (tmp_path / "staged" / "train" / "0000" / "mine.png").exists()


def test_photos_of_every_format_and_folders_within_a_class_count(folder: Path, tmp_path: Path) -> None:
    (folder / "grün" / "more" / "deep").mkdir(parents=True)
    for name, mode in (("a.webp", "RGB"), ("b.gif", "P"), ("c.tif", "L"), ("d.JPG", "RGB"), ("e.png", "RGBA")):
        Image.new(mode, (30, 20)).save(folder / "grün" / "more" / "deep" / name)
    photos = _stage(folder, tmp_path / "staged")
    assert (len(photos.train) + len(photos.val), photos.skipped) == (29, ())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "contains no folders: put the photos of each class into a folder"),
        (["only"], "contains one class folder, 'only'"),
        (["a", "b"], "class 'a' has 0 usable photos, 0 for training and 0 for validation: each class needs"),
        (["a", "b\nc"], "is not a valid class name: rename its folder"),
        (["train/a", "train/b", "val/a", "val/c"], "the classes 'b', 'c' are missing from train or from val"),
        (["train/a", "train/b", "test/a"], "'test', 'train' are not classes: name the folders 'train' and 'val'"),
        (["Train/a", "Val/a"], "'Train', 'Val' are not classes"),
    ],
)
def test_folders_that_hold_no_classes_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "photos").mkdir()
    for name in names:
        (tmp_path / "photos" / name).mkdir(parents=True)
    with pytest.raises(ArgumentError, match=message):
        _stage(tmp_path / "photos", tmp_path / "staged")


def test_a_class_of_one_usable_photo_is_refused_with_what_is_wrong_in_it(folder: Path, tmp_path: Path) -> None:
    for number in range(1, 8):
        (folder / "red one" / f"{number:02}.png").write_bytes(b"")
    with pytest.raises(
        ArgumentError, match="class 'red one' has 1 usable photos, 1 for training and 0 for validation"
    ) as error:
        _stage(folder, tmp_path / "staged")
    assert "07.png' is empty or not a picture" in str(error.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="is not a folder"):
        _stage(tmp_path / "nowhere", tmp_path / "staged")


def test_a_staging_folder_that_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError):
        _stage(folder, tmp_path / "file" / "staged")


@pytest.mark.parametrize(("count", "validation", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.2, 2), (10, 0.99, 9)])
def test_each_class_keeps_photos_for_both(tmp_path: Path, count: int, validation: float, held_out: int) -> None:
    folder = make_class_folders(tmp_path / "photos", count)
    photos = _stage(folder, tmp_path / "staged", validation)
    assert np.bincount([photo.label for photo in photos.val]).tolist() == [held_out] * 3


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes as POSIX has them")
@pytest.mark.parametrize("place", ["train", "val", "incoming", "train/0000", "val/0002"])
def test_links_in_the_staging_folder_are_refused(folder: Path, tmp_path: Path, place: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"{'0' * 32}.png").write_bytes(b"the only copy")
    link = tmp_path / "staged" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(WriteError, match="is a link"):
        _stage(folder, tmp_path / "staged")
    assert [path.read_bytes() for path in outside.iterdir()] == [b"the only copy"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no sparse files here")
def test_a_file_that_claims_to_be_huge_is_skipped(folder: Path, tmp_path: Path) -> None:
    with (folder / "grün" / "huge.png").open("wb") as file:
        file.truncate(64 * 2**30)
    (reason,) = _stage(folder, tmp_path / "staged").skipped
    assert reason.endswith("huge.png' is too large: give files of at most 1,073,741,824 bytes")


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes as POSIX has them")
def test_a_pipe_that_takes_a_photos_place_is_not_waited_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is swapped in after the folder was listed."""
    photo = folder / "grün" / "00.png"
    listed = Path.is_file

    def is_file(path: Path) -> bool:
        found = listed(path)
        if path == photo and found:
            photo.unlink()
            os.mkfifo(photo)
        return found

    monkeypatch.setattr(Path, "is_file", is_file)
    (reason,) = _stage(folder, tmp_path / "staged").skipped
    assert reason.endswith("00.png' cannot be read (not a regular file)")


@pytest.mark.skipif(sys.platform == "win32", reason="builds the folders with POSIX's calls")
def test_folders_may_be_nested_as_deeply_as_the_system_allows(folder: Path, tmp_path: Path) -> None:
    descriptor = os.open(folder / "grün", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    try:
        assert len(_stage(folder, tmp_path / "staged").train) == 18
    finally:
        # Python 3.11 cannot remove such a tree, so pytest would fail.
        subprocess.run(["rm", "-rf", folder / "grün" / "d"], check=True)
