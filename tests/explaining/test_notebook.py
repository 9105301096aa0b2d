"""What a notebook shows: the pictures in the HTML are the overlays, and a click changes the class."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import open_browser
from networks import Array, small_classifier
from PIL import Image

import fastcam
from fastcam.errors import ArgumentError, MissingExtraError

_CLASSES = ["<b>beagle</b>", "pug & co", "boxer", "collie", "husky"]


@pytest.fixture(scope="module")
def explainer(tmp_path_factory: pytest.TempPathFactory) -> fastcam.Explainer:
    path = tmp_path_factory.mktemp("notebook") / "dogs.onnx"
    fastcam.export(
        small_classifier().to_model(), path, classes=_CLASSES, preprocess="symmetric", score_activation="softmax"
    )
    return fastcam.Explainer(path, threads=1, device="cpu")


@pytest.fixture
def photo() -> Array:
    """Smooth, so that JPEG changes it little."""
    rows, columns = np.mgrid[:60, :90]
    return np.stack([rows * 4, columns * 2, 255 - rows * 2], axis=-1).astype(np.uint8)


def _pictures(html: str) -> list[Array]:
    encoded = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in encoded]


def _difference(one: Array, other: Array) -> float:
    return float(np.abs(one.astype(np.float64) - other).mean())


def test_html_holds_the_picture_and_each_heatmap(explainer: fastcam.Explainer, photo: Array) -> None:
    image = explainer(photo, target=[0, 1])[0]
    html = image._repr_html_()
    shown = _pictures(html)
    expected = [photo, image.overlay(0, alpha=1.0), image.overlay(1, alpha=1.0)]
    assert len(shown) == 3
    for one, other in zip(shown, expected, strict=True):
        # Ten times what JPEG changes, a tenth of what another picture would.
        assert _difference(one, other) < 4
    assert _difference(expected[1], expected[2]) > 40
    assert "&lt;b&gt;beagle&lt;/b&gt; " in html
    assert "<b>beagle" not in html


def test_large_pictures_are_shrunk(explainer: fastcam.Explainer, photo: Array) -> None:
    large = np.asarray(Image.fromarray(photo).resize((3000, 2000)))
    image = explainer(large)[0]
    assert all(max(picture.shape) <= 960 for picture in _pictures(image._repr_html_()))
    assert len(image._repr_html_()) < 200_000


def test_png_is_the_overlay(explainer: fastcam.Explainer, photo: Array) -> None:
    image = explainer(photo, target=2)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image._repr_png_()))), image.overlay())


def test_without_a_picture_the_heatmap_is_shown(explainer: fastcam.Explainer, rng: np.random.Generator) -> None:
    image = explainer(rng.normal(size=(1, 3, 12, 12)).astype(np.float32), target=1)[0]
    blank = np.zeros((12, 12, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image._repr_png_()))), image.overlay(image=blank))
    assert [picture.shape for picture in _pictures(image._repr_html_())] == [(12, 12, 3)] * 2


def test_many_images_are_counted(explainer: fastcam.Explainer, photo: Array) -> None:
    found = explainer([photo] * 14)
    assert len(_pictures(found._repr_html_())) == 24
    assert "and 2 more" in found._repr_html_()
    assert "more" not in explainer([photo] * 12)._repr_html_()


def test_a_click_shows_the_heatmap_of_the_class(explainer: fastcam.Explainer, photo: Array, tmp_path: Path) -> None:
    image = explainer(photo, target=[0, 1])[0]
    page = tmp_path / "output.html"
    page.write_text(f"<!doctype html><meta charset='utf-8'>{image._repr_html_()}{image._repr_html_()}")
    with open_browser(tmp_path) as browser:
        browser.get(page.as_uri())
        heats = browser.find_elements("css selector", ".heat")
        assert [heat.value_of_css_property("visibility") for heat in heats] == ["visible", "hidden"] * 2
        browser.find_elements("css selector", "label")[1].click()
        # The second copy of the output keeps its class.
        assert [heat.value_of_css_property("visibility") for heat in heats] == [
            "hidden",
            "visible",
            "visible",
            "hidden",
        ]
        slider = browser.find_element("css selector", "input[type=range]")
        browser.execute_script("arguments[0].value = 0.2; arguments[0].oninput();", slider)
        assert heats[1].value_of_css_property("opacity") == "0.2"


def test_plot_draws_on_given_axes(explainer: fastcam.Explainer, photo: Array) -> None:
    from matplotlib.figure import Figure

    image = explainer(photo, target=[0, 1])[0]
    axes = list(Figure().subplots(1, 3))
    assert image.plot(axes=axes) == axes
    np.testing.assert_array_equal(axes[2].images[0].get_array(), image.overlay(1))
    with pytest.raises(ArgumentError, match="give 3, one for the picture and one per target"):
        image.plot(axes=axes[:2])


def test_dataframe_has_one_row_per_image_and_target(
    explainer: fastcam.Explainer, photo: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pandas", reason="needs pandas: pip install pandas")
    found = explainer([photo, photo[::-1]], target="top2")
    table = found.to_dataframe()
    assert list(table.columns) == ["image", "target", "label", "logit", "probability", "evidence"]
    assert table["image"].tolist() == [0, 0, 1, 1]
    for row in table.itertuples():
        image = found[row.image]
        k = image.targets.tolist().index(row.target)
        assert row.label == image.labels[k] == _CLASSES[row.target]
        assert row.logit == image.logits[row.target]
        assert row.probability == image.probabilities[row.target]
        assert row.evidence == image.evidence[k]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match="pip install pandas"):
        found.to_dataframe()


def test_repr_tells_what_is_explained(explainer: fastcam.Explainer) -> None:
    assert repr(explainer) == (
        f"<Explainer {str(explainer.path)!r}: explains {explainer.layers[0]}, 5 classes, on CPUExecutionProvider>"
    )
