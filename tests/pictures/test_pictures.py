"""Pictures in and out, on real files of every colour mode and on damaged ones."""

from __future__ import annotations

import io
import json
import os
import struct
import threading
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from fastcam.errors import ArgumentError, FastcamError, ImageError, WriteError
from fastcam.pictures.preparing import prepare
from fastcam.pictures.reading import PICTURE_SUFFIXES, read_image
from fastcam.pictures.writing import palette, write_image
from fastcam.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastcam.arrays import Pixels

RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)
# Asymmetric on purpose: every rotation and mirroring gives a different picture.
UPRIGHT = np.array([[RED, GREEN, BLUE], [WHITE, (0, 0, 0), GREY]], np.uint8)


def _save(folder: Path, image: Image.Image, name: str = "picture.png", **options: Any) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def test_path_string_pil_and_array_agree(tmp_path: Path) -> None:
    path = _save(tmp_path, Image.fromarray(UPRIGHT))
    for source in (path, str(path), Image.open(path), UPRIGHT):
        pixels = read_image(source)
        np.testing.assert_array_equal(pixels, UPRIGHT)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous


def test_arrays_of_1_3_and_4_channels() -> None:
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    expected = np.stack([grey] * 3, axis=-1)
    np.testing.assert_array_equal(read_image(grey), expected)
    np.testing.assert_array_equal(read_image(grey[..., None]), expected)
    turned = UPRIGHT.transpose(1, 0, 2)[::-1]
    assert not turned.flags.c_contiguous
    np.testing.assert_array_equal(read_image(turned), turned)
    assert read_image(turned).flags.c_contiguous
    rgba = np.array([[[0, 0, 0, 0], [10, 20, 30, 255], [0, 0, 0, 102]]], np.uint8)
    # 102/255 = 0.4 black on white: 0.6 * 255 = 153.
    np.testing.assert_array_equal(read_image(rgba), [[WHITE, (10, 20, 30), (153, 153, 153)]])


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 4), np.float32),
        np.zeros((4, 4, 4), np.uint16),
        np.zeros((4, 4, 3), bool),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        None,
        3,
    ],
    ids=lambda source: f"{getattr(source, 'dtype', source)}{getattr(source, 'shape', '')}",
)
def test_other_sources_are_refused_with_what_is_accepted(source: Any) -> None:
    with pytest.raises(
        ImageError, match=r"Accepted: a path, the bytes of a file, a PIL image, or a uint8 array \(H,W\), \(H,W,1\)"
    ):
        read_image(source)


def test_arrays_of_floats_are_0_to_1() -> None:
    """As scikit-image and matplotlib have them."""
    values = np.array([[0, 0.4 / 255, 0.6 / 255, 0.5, 1]])
    np.testing.assert_array_equal(read_image(values)[0, :, 1], [0, 0, 1, 128, 255])
    np.testing.assert_array_equal(read_image(np.stack([values] * 3, -1).astype(np.float32)), read_image(values))
    for outside in (1.001, -0.001, 255.0, np.nan, np.inf):
        with pytest.raises(
            ImageError, match=r"holds floats .* not 0\.\.1\. State .* preprocessed needs its batch axis"
        ):
            read_image(np.array([[0, outside]]))
    np.testing.assert_array_equal(read_image(np.array([[0, 100.4]]), value_range=(0, 255))[0, :, 0], [0, 100])


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_the_bytes_of_a_file_are_the_file(tmp_path: Path, kind: Any) -> None:
    path = _save(tmp_path, _palette_image())
    np.testing.assert_array_equal(read_image(kind(path.read_bytes())), read_image(path))
    with pytest.raises(ImageError, match="the picture in memory is empty or not a picture of a known format"):
        read_image(kind(b"no picture"))
    with pytest.raises(ImageError, match="the picture in memory is damaged"):
        read_image(kind(_save(tmp_path, Image.new("RGB", (64, 64), RED), "cut.jpg").read_bytes()[:-200]))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_gradient_is_scaled(tmp_path: Path, suffix: str, order: str) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65406, 65407, 65535]], np.uint16)
    path = _save(tmp_path, Image.fromarray(values.astype(order)), f"deep.{suffix}")
    # value / 257, rounded: 128.5 is the first that is nearer to 1; 32768 / 257 = 127.502; 65406.5 the first 255.
    expected = np.array([[0, 0, 1, 1], [128, 254, 255, 255]], np.uint8)
    np.testing.assert_array_equal(read_image(path), np.stack([expected] * 3, axis=-1))


def test_16_bit_gradient_equals_division(tmp_path: Path) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 65535.0 * 255).astype(np.uint8)
    np.testing.assert_array_equal(read_image(_save(tmp_path, Image.fromarray(values)))[..., 1], expected)


def test_32_bit_integers_hold_16_bits() -> None:
    np.testing.assert_array_equal(read_image(Image.fromarray(np.array([[0, 65535]], np.int32))), [[[0] * 3, WHITE]])
    for value in (-1, 65536):
        with pytest.raises(ImageError, match="not 16 bits"):
            read_image(Image.fromarray(np.array([[0, value]], np.int32)))


def test_float_pictures(tmp_path: Path) -> None:
    path = _save(tmp_path, Image.fromarray(np.array([[0, 99.6, 255]], np.float32)), "float.tif")
    np.testing.assert_array_equal(read_image(path)[0, :, 0], [0, 100, 255])
    for values in ([0, 1], [0, 256], [-1, 9], [np.nan, 1], [0, np.inf]):
        with pytest.raises(
            ImageError,
            match=r"holds floats .*, which are not 0\.\.255\. State the values of black and white",
        ):
            read_image(Image.fromarray(np.array([values], np.float32)))
    np.testing.assert_array_equal(read_image(Image.fromarray(np.zeros((1, 2), np.float32))), np.zeros((1, 2, 3)))


def test_grey_alpha(tmp_path: Path) -> None:
    image = Image.merge("LA", [Image.fromarray(np.array([row], np.uint8)) for row in ([50, 50, 0], [255, 0, 102])])
    np.testing.assert_array_equal(read_image(_save(tmp_path, image))[0, :, 0], [50, 255, 153])


def test_rgba_hides_the_colour_under_full_transparency(tmp_path: Path) -> None:
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    np.testing.assert_array_equal(read_image(_save(tmp_path, image)), [[WHITE]])


def _palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([*RED, *GREEN, *BLUE])
    return image


def test_palette(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(_save(tmp_path, _palette_image())), [[RED, GREEN, BLUE]])


def test_palette_with_transparency(tmp_path: Path) -> None:
    one_colour = _save(tmp_path, _palette_image(), "one.png", transparency=1)
    np.testing.assert_array_equal(read_image(one_colour), [[RED, WHITE, BLUE]])
    per_colour = _save(tmp_path, _palette_image(), "each.png", transparency=bytes([255, 0, 102]))
    np.testing.assert_array_equal(read_image(per_colour), [[RED, WHITE, (153, 153, 255)]])


def test_grey_with_a_transparent_value(tmp_path: Path) -> None:
    path = _save(tmp_path, Image.fromarray(np.array([[7, 8]], np.uint8)), transparency=7)
    np.testing.assert_array_equal(read_image(path)[0, :, 0], [255, 8])


def test_one_bit(tmp_path: Path) -> None:
    path = _save(tmp_path, Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))
    np.testing.assert_array_equal(read_image(path), [[(0, 0, 0), WHITE]])


def test_cmyk(tmp_path: Path) -> None:
    path = _save(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "print.tif")
    np.testing.assert_array_equal(read_image(path), np.full((8, 8, 3), RED))


def test_animation_gives_the_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    for name in ("moving.gif", "moving.png", "pages.tif"):
        path = _save(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(read_image(path), np.full((4, 4, 3), RED))


# -- read_image: orientation ----------------------------------------------------------------------------------------

# What the camera stores, by EXIF orientation, when the scene is `upright` (EXIF 2.32, table 6).
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT)))
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    path = _save(tmp_path, stored, f"turned.{suffix}", exif=exif, **options)
    np.testing.assert_array_equal(read_image(path), UPRIGHT)
    with Image.open(path) as image:
        np.testing.assert_array_equal(read_image(image), UPRIGHT)


# Orientation 6 next to a maker's name of the wrong type: MM, 2 entries, then what they point to.
BAD_MAKER = b"MM\x00*\x00\x00\x00\x08\x00\x02" + bytes.fromhex(
    "01170002000000060000002601120003000000010006000000000000" + b"maker\x00".hex()
)


@pytest.mark.parametrize(
    ("exif", "shape"),
    [(bytes(30), (8, 16)), (b"MM\x00*\x00\x00\x00\x08\x00\x09", (8, 16)), (BAD_MAKER, (16, 8))],
    ids=["zeros", "cut off", "damaged tag"],
)
def test_damaged_exif_does_not_hide_the_picture(tmp_path: Path, exif: bytes, shape: tuple[int, int]) -> None:
    path = _save(tmp_path, Image.new("RGB", (16, 8), GREY), "photo.jpg", exif=b"Exif\x00\x00" + exif)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(read_image(path), np.full((*shape, 3), 128))
    assert not leaked


def _png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


UNREADABLE = {
    "zero bytes": (b"", "is empty or not a picture"),
    "text": (b"hello, world", "is empty or not a picture"),
    "truncated PNG": (_encoded("PNG")[:2000], "damaged, truncated"),
    "truncated JPEG": (_encoded("JPEG")[:900], "damaged, truncated"),
    "truncated TIFF": (_encoded("TIFF")[:2000], "damaged, truncated"),
    "flipped bits": (_encoded("PNG")[:300] + bytes(40) + _encoded("PNG")[340:], "damaged, truncated"),
    "bomb that warns": (_png_claiming(10000, 10000), "more than .* pixels. Resize it first"),
    "bomb that raises": (_png_claiming(50000, 50000), "more than .* pixels. Resize it first"),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_files(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.img"
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(path)
    assert f"'{path}' " in str(caught.value)
    assert caught.value.__suppress_context__, "no Pillow traceback"
    assert not leaked


def test_missing_file_directory_and_forbidden_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match=r"absent\.png' does not exist"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match=r"is a directory\. Pass the pictures in it"):
        read_image(tmp_path)

    def forbidden(_path: str, **_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.png").write_bytes(b"")
    monkeypatch.setattr(Image, "open", forbidden)
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(tmp_path / "secret.png")


def test_empty_pil_image() -> None:
    with pytest.raises(ImageError, match="the PIL image has no pixels"):
        read_image(Image.new("RGB", (0, 4)))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "JPEG", "WEBP", "TIFF", "BMP"])
def test_random_damage_raises_only_image_errors(tmp_path: Path, kind: str) -> None:
    whole, generator, path = _encoded(kind), np.random.default_rng(7), tmp_path / "noise"
    for _ in range(60):
        content = bytearray(whole[: generator.integers(1, len(whole) + 1)])
        for place in generator.integers(0, len(content), 8):
            content[place] = generator.integers(256)
        path.write_bytes(content)
        with suppress(ImageError):
            assert read_image(path).shape[2] == 3


def test_reading_from_many_threads(tmp_path: Path) -> None:
    path = _save(tmp_path, Image.fromarray(UPRIGHT))
    results: list[Pixels] = []
    before = warnings.filters[:]
    threads = [threading.Thread(target=lambda: results.extend(read_image(path) for _ in range(20))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 160
    assert all(np.array_equal(pixels, UPRIGHT) for pixels in results)
    assert warnings.filters == before


@pytest.mark.parametrize(
    ("name", "pixel", "expected"),
    [
        ("vgg16", (10, 20, 30), (30 - 103.939, 20 - 116.779, 10 - 123.68)),
        ("imagenet", (255, 0, 51), ((1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225)),
        ("scale", (0, 51, 255), (0, 0.2, 1)),
        ("symmetric", (0, 51, 255), (-1, -0.6, 1)),
        ("none", (0, 51, 255), (0, 51, 255)),
    ],
)
def test_named_preprocessing(name: str, pixel: tuple[int, ...], expected: tuple[float, ...]) -> None:
    batch = prepare([np.full((4, 4, 3), pixel, np.uint8)], Preprocessing.of(name), (2, 2))
    np.testing.assert_allclose(batch, np.full((1, 2, 2, 3), expected, np.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "mode"), [("vgg16", "caffe"), ("imagenet", "torch"), ("symmetric", "tf")])
def test_equals_keras(name: str, mode: str) -> None:
    pytest.importorskip("tensorflow", reason="needs tensorflow: pip install fastcam[keras]")
    utils = pytest.importorskip(
        "keras.applications.imagenet_utils", reason="needs tensorflow: pip install fastcam[keras]"
    )
    pixels = np.random.default_rng(1).integers(0, 256, (2, 6, 5, 3), np.uint8)
    oracle = utils.preprocess_input(pixels.astype(np.float32), data_format="channels_last", mode=mode)
    ours = prepare(list(pixels), Preprocessing.of(name), (6, 5))
    # One float32 rounding of a product or difference of up to 255, on each side.
    np.testing.assert_allclose(ours, oracle, rtol=1e-6, atol=1e-5)


def test_equals_keras_vgg16() -> None:
    pytest.importorskip("tensorflow", reason="needs tensorflow: pip install fastcam[keras]")
    vgg16 = pytest.importorskip("keras.applications.vgg16", reason="needs tensorflow: pip install fastcam[keras]")
    pixels = np.random.default_rng(1).integers(0, 256, (2, 6, 5, 3), np.uint8)
    ours = prepare(list(pixels), Preprocessing.of("vgg16"), (6, 5))
    np.testing.assert_array_equal(ours, vgg16.preprocess_input(pixels.astype(np.float32)))


def test_of_mapping_and_itself() -> None:
    made = Preprocessing.of({"order": "BGR", "mean": [1, 2, 3], "scale": np.array([4, 5, 6])})
    assert made == Preprocessing("BGR", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert Preprocessing.of(made) is made
    assert made.name is None
    assert Preprocessing.of("symmetric").name == "symmetric"
    assert all(type(value) is float for value in made.mean + made.scale)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vgg", "Allowed: 'vgg16', 'imagenet', .*, or a mapping"),
        (None, "unknown preprocessing None"),
        ({"mean": [0, 0, 0], "scale": [1, 1, 1]}, "Allowed"),
        ({"order": "RGB", "mean": [0, 0, 0], "scale": [1, 1, 1], "std": 1}, "Allowed"),
        ({"order": "GBR", "mean": [0, 0, 0], "scale": [1, 1, 1]}, "order must be 'RGB' or 'BGR', not 'GBR'"),
        ({"order": "RGB", "mean": [0, 0], "scale": [1, 1, 1]}, "mean must be three numbers"),
        ({"order": "RGB", "mean": 0.5, "scale": [1, 1, 1]}, "mean must be three numbers"),
        ({"order": "RGB", "mean": "abc", "scale": [1, 1, 1]}, "mean must be three numbers"),
        ({"order": "RGB", "mean": [0, 0, 0], "scale": [1, float("nan"), 1]}, "scale must be finite"),
        ({"order": "RGB", "mean": [0, 0, 0], "scale": [1, 0, 1]}, "would erase a channel"),
    ],
)
def test_bad_preprocessing(spec: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Preprocessing.of(spec)


@pytest.mark.parametrize("name", ["vgg16", "imagenet", "scale", "symmetric", "none", None])
def test_json_round_trip(name: str | None) -> None:
    spec = name or {"order": "RGB", "mean": [0.1, 1 / 3, 1e-9], "scale": [1e30, -2, 7]}
    made = Preprocessing.of(spec)
    text = made.to_json()
    assert Preprocessing.from_json(text) == made
    assert Preprocessing.from_json(text).to_json() == text
    assert json.loads(text)["name"] == name


def test_json_text_is_fixed() -> None:
    expected = '{"mean": [103.939, 116.779, 123.68], "name": "vgg16", "order": "BGR", "scale": [1.0, 1.0, 1.0]}'
    assert Preprocessing.of("vgg16").to_json() == expected


@pytest.mark.parametrize("text", ["", "[]", "3", '{"name": "vgg16"}', '{"order": 1, "mean": 2, "scale": 3}'])
def test_bad_json(text: str) -> None:
    with pytest.raises(ArgumentError):
        Preprocessing.from_json(text)


def test_prepare_squashes_the_whole_picture() -> None:
    """A 40x20 picture, left half red and right half blue, at 2x2: each column keeps its half; nothing is cropped."""
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :20], picture[:, 20:] = RED, BLUE
    batch = prepare([picture], Preprocessing.of("none"), (2, 2))
    # Triangle filter of radius 20 at x = 10: weights (20 - d) reach 10 pixels into the other half: 50 / 350 = 1/7.
    near, far = batch[0, 0, 0, 0], batch[0, 0, 0, 2]
    assert (near, far) == (219, 36)
    np.testing.assert_array_equal(batch[0, :, 1], batch[0, :, 0][:, ::-1])


def test_prepare_antialiases() -> None:
    """A checkerboard of single pixels shrinks to grey; sampling without a filter would give black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    batch = prepare([read_image(board)], Preprocessing.of("none"), (8, 8))
    assert np.abs(batch - 127.5).max() <= 4


def test_prepare_layouts_sizes_and_batch() -> None:
    generator = np.random.default_rng(3)
    pictures = [generator.integers(0, 256, (*size, 3), np.uint8) for size in ((5, 7), (9, 4), (6, 8))]
    last = prepare(pictures, Preprocessing.of("vgg16"), (6, 8), "NHWC")
    first = prepare(pictures, Preprocessing.of("vgg16"), (6, 8), "NCHW")
    assert last.shape == (3, 6, 8, 3)
    assert last.dtype == first.dtype == np.float32
    assert first.flags.c_contiguous
    assert last.flags.c_contiguous
    np.testing.assert_array_equal(first, last.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(last[2, ..., 0], pictures[2][..., 2] - np.float32(103.939))
    for one, picture in zip(last, pictures, strict=True):
        np.testing.assert_array_equal(one, prepare([picture], Preprocessing.of("vgg16"), (6, 8))[0])


def test_prepare_greyscale_models() -> None:
    batch = prepare([UPRIGHT], Preprocessing.of("scale"), (2, 3), "NCHW", channels=1)
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B.
    np.testing.assert_allclose(batch[0, 0] * 255, [[76, 150, 29], [255, 0, 128]], atol=1e-4)
    with pytest.raises(ArgumentError, match="three equal means"):
        prepare([UPRIGHT], Preprocessing.of("imagenet"), (2, 3), channels=1)


def test_prepare_refuses() -> None:
    unknown: Any = "CHW"
    with pytest.raises(ArgumentError, match="layout must be 'NHWC' or 'NCHW', not 'CHW'"):
        prepare([UPRIGHT], Preprocessing.of("none"), (2, 3), unknown)
    with pytest.raises(ArgumentError, match="1 or 3 channels, not 4"):
        prepare([UPRIGHT], Preprocessing.of("none"), (2, 3), channels=4)


def test_jet_by_its_definition() -> None:
    """Jet is piecewise linear: blue 0.5 at 0, cyan between, yellow, red 0.5 at 1."""
    table = palette()
    assert table.shape == (256, 3)
    assert table.dtype == np.uint8
    np.testing.assert_array_equal(table[[0, 255]], [[0, 0, 128], [128, 0, 0]])
    assert abs(int(table[96, 1]) - 255) <= 2
    assert table[128, 1] == 255
    assert palette("jet") is palette("jet")


@pytest.mark.parametrize("name", ["jet", "viridis", "turbo", "viridis_r"])
def test_palette_equals_matplotlib(name: str) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib: pip install fastcam[demo]")
    oracle = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
    assert np.abs(palette(name).astype(int) - oracle).max() <= 1


def test_palette_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        palette()[0] = 0


@pytest.mark.parametrize(("name", "near"), [("jett", "jet"), ("virids", "viridis"), ("", "turbo")])
def test_unknown_palette(name: str, near: str) -> None:
    with pytest.raises(ArgumentError, match=f"unknown colour map '{name}'. Did you mean one of .*{near}"):
        palette(name)


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.jpeg", "a.webp"])
def test_write_and_read_back(tmp_path: Path, name: str) -> None:
    picture = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    write_image(picture, tmp_path / name)
    assert np.abs(read_image(tmp_path / name).astype(int) - picture).max() <= (0 if "png" in name.lower() else 3)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_write_replaces_and_takes_views(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_image(UPRIGHT, str(path))
    write_image(UPRIGHT[:, ::-1], path)
    np.testing.assert_array_equal(read_image(path), UPRIGHT[:, ::-1])
    write_image(UPRIGHT[..., 0], path)
    np.testing.assert_array_equal(read_image(path)[..., 2], UPRIGHT[..., 0])


@pytest.mark.parametrize("name", ["a.gif", "a", "a.npy"])
def test_unknown_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match=r"Allowed: \.png, \.jpg, \.jpeg, \.webp"):
        write_image(UPRIGHT, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("array", [UPRIGHT / 255.0, np.zeros((2, 2, 4), np.uint8), np.zeros(3, np.uint8)])
def test_unwritable_arrays(tmp_path: Path, array: Any) -> None:
    with pytest.raises(ArgumentError, match="Accepted: uint8"):
        write_image(array, tmp_path / "a.png")


def test_failed_writes_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "taken.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    refused = {"absent/a.png": "does not exist", "file/a.png": "does not exist", "taken.png": "is a folder"}
    for name, reason in refused.items():
        with pytest.raises(WriteError, match=reason) as caught:
            write_image(UPRIGHT, tmp_path / name)
        assert isinstance(caught.value, OSError)
        assert isinstance(caught.value, FastcamError)
        assert name in str(caught.value)
    too_wide = np.zeros((1, 20000, 3), np.uint8)
    with pytest.raises(WriteError, match=r"wide\.webp"):
        write_image(too_wide, tmp_path / "wide.webp")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    write_image(UPRIGHT, path)
    before = path.read_bytes()

    def full(self: Image.Image, file: Any, **_options: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(WriteError, match="No space left"):
        write_image(UPRIGHT, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_no_file_runs_a_program_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript in a .jpg: Pillow would pass it to Ghostscript."""
    ran = tmp_path / "ran"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f'#!/bin/sh\ntouch "{ran}"\n', encoding="ascii")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ImageError, match="not a picture of a known format"):
        read_image(path)
    assert not ran.exists()


@pytest.mark.parametrize("suffix", sorted(PICTURE_SUFFIXES - {".avif", ".jp2"}))
def test_every_suffix_that_folders_are_searched_for_can_be_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo{suffix}"
    Image.new("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB", (8, 6), "white").save(path)
    assert read_image(path).shape == (6, 8, 3)
    assert (read_image(path) == 255).all()


_DEEP = np.array([[0, 1, 2047], [2048, 4094, 4095]], np.uint16)
# value * 255 / 4095, rounded: 2047 -> 127.47, 2048 -> 127.53, 4094 -> 254.94.
_DEEP_AS_8_BITS = np.array([[0, 0, 127], [128, 255, 255]], np.uint8)


@pytest.mark.parametrize(
    "kind", ["array", "array with an axis", "colour array", "float array", "png", "tif", "float tif"]
)
def test_pictures_of_12_bits_with_a_stated_range(tmp_path: Path, kind: str) -> None:
    floats = (_DEEP / 4095).astype(np.float32)
    sources: dict[str, Callable[[], Any]] = {
        "array": lambda: _DEEP,
        "array with an axis": lambda: _DEEP[..., None],
        "colour array": lambda: np.stack([_DEEP] * 3, axis=-1),
        "float array": lambda: floats,
        "png": lambda: _save(tmp_path, Image.fromarray(_DEEP), "deep.png"),
        "tif": lambda: _save(tmp_path, Image.fromarray(_DEEP), "deep.tif"),
        "float tif": lambda: _save(tmp_path, Image.fromarray(floats), "float.tif"),
    }
    source = sources[kind]()
    stated = (0, 1) if "float" in kind else (0, 4095)
    np.testing.assert_array_equal(read_image(source, value_range=stated), np.stack([_DEEP_AS_8_BITS] * 3, axis=-1))
    if kind != "float array":
        with pytest.raises(ImageError, match="value_range="):
            read_image(source)


def test_values_outside_the_stated_range_are_clipped() -> None:
    values = np.array([[900, 1000, 1500, 2000, 2100]], np.uint16)
    np.testing.assert_array_equal(read_image(values, value_range=(1000, 2000))[0, :, 0], [0, 0, 128, 255, 255])
    floats = np.array([[-np.inf, -2, 0, 2, np.inf]])
    np.testing.assert_array_equal(read_image(floats, value_range=(-2, 2))[0, :, 0], [0, 0, 128, 255, 255])
    with pytest.raises(ImageError, match="the array holds NaN"):
        read_image(np.array([[np.nan]]), value_range=(0, 1))


def test_a_stated_range_leaves_8_bits_alone() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(read_image(values, value_range=(0, 4095)), read_image(values))


@pytest.mark.parametrize("stated", [(1, 0), (0, 0), (0,), "ab", 5, (0, np.nan), (0, np.inf), (None, 1), (0, 10**400)])
def test_a_range_is_two_numbers(stated: Any) -> None:
    with pytest.raises(ArgumentError, match="value_range="):
        read_image(_DEEP, value_range=stated)


def test_a_picture_that_becomes_a_pipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapped between check and opening: a reader that waits for a writer would never return."""
    path = _save(tmp_path, Image.new("RGB", (4, 4)), "photo.png")
    regular = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr("fastcam.pictures.reading.os.stat", lambda _: regular)
    with pytest.raises(ImageError, match="is not a regular file but a pipe"):
        read_image(path)


def test_a_picture_is_closed_after_reading(tmp_path: Path) -> None:
    path = _save(tmp_path, Image.new("RGB", (4, 4)), "photo.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        read_image(path)
        with pytest.raises(ImageError):
            read_image(tmp_path / "bad.png")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
