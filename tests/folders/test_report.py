"""The report page: the contents of the file, and what a person sees and does in a browser."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import open_browser
from networks import Array, small_classifier
from PIL import Image

import fastcam
from fastcam.errors import ArgumentError, WriteError
from fastcam.folders import report
from fastcam.pictures.writing import palette

_LABELS = ["beagle", "pug", "<b>boxer</b>", "collie", "husky"]
_RUN = {
    "model": "models/dogs.onnx",
    "method": "gradcam",
    "layers": ["block5_conv3"],
    "colormap": "jet",
    "alpha": 0.4,
    "images": 0,
    "started": "2026-01-02T03:04:05+00:00",
}


def _corner_map(corner: int) -> Array:
    heat = np.zeros((4, 4), np.uint8)
    heat[(slice(0, 2), slice(2, 4))[corner // 2], (slice(0, 2), slice(2, 4))[corner % 2]] = 255
    return heat


def _entry(number: int, folder: Path, path: str | None = None) -> dict[str, Any]:
    """Return a result whose class, confidence and hot corner follow from its number; 3 of 4 share a thumbnail size."""
    best = number % len(_LABELS)
    probability = 0.3 + 0.07 * (number % 10)
    size = (60, 80) if number % 4 else (80, 40)
    name = f"thumbnails/{number % 4}.jpg"
    if not (folder / name).exists():
        (folder / "thumbnails").mkdir(exist_ok=True, parents=True)
        Image.new("RGB", size[::-1], "white").save(folder / name)
    classes = [
        {
            "index": index,
            "label": _LABELS[index],
            "probability": probability / (rank + 1),
            "file": f"overlays/{number}.{rank + 1} ü#.jpg",
            "map": base64.b64encode(_corner_map((number + rank) % 4).tobytes()).decode(),
        }
        for rank, index in enumerate([best, (best + 1) % len(_LABELS)])
    ]
    return {
        "path": path or f"photos/{'even' if number % 2 == 0 else 'odd'}/dog{number}.jpg",
        "id": str(number),
        "image_size": list(size),
        "classes": classes,
        "map_size": [4, 4],
        "top": [{key: item[key] for key in ("index", "label", "probability")} for item in classes],
        "thumbnail": name,
        "notes": ["the file holds several frames"] if number == 1 else [],
    }


def _write_results(folder: Path, entries: list[dict[str, Any]], **run: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "run.json").write_text(json.dumps({**_RUN, "images": len(entries), **run}), encoding="utf-8")
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "results.jsonl").write_text(lines, encoding="utf-8")
    return folder


def _data(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text.split('<script id="data" type="application/json">')[1].split("</script>")[0])
    return data


# The file


def test_a_job_writes_a_page_with_all_its_images(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "m.onnx", classes=_LABELS, preprocess="scale")
    for number in range(3):
        Image.new("RGB", (1000, 30 + number), (80 * number, 100, 0)).save(tmp_path / f"{number}.png")
    result = fastcam.explain_files(tmp_path / "m.onnx", str(tmp_path / "*.png"), tmp_path / "out", top_k=2)
    assert result.report == tmp_path / "out" / "report.html"
    data = _data(result.report)
    entries = [json.loads(line) for line in result.results.read_text(encoding="utf-8").splitlines()]
    assert [image["path"] for image in data["images"]] == [entry["path"] for entry in entries]
    assert data["images"][1]["classes"][1]["map"] == entries[1]["classes"][1]["map"]
    assert data["palette"] == palette("jet").ravel().tolist()
    for image in data["images"]:
        with Image.open(tmp_path / "out" / image["thumbnail"]) as thumbnail:
            assert 240 <= thumbnail.width < 480


def test_nothing_is_fetched_from_elsewhere(tmp_path: Path) -> None:
    text = fastcam.write_report(_write_results(tmp_path, [_entry(0, tmp_path)])).read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>&amp;\ud800"
    failure = {"path": hostile, "id": "x", "error": f"'{hostile}' is damaged"}
    page = fastcam.write_report(_write_results(tmp_path, [_entry(0, tmp_path, hostile), failure], model=hostile))
    assert "<img src=x" not in page.read_text(encoding="utf-8")
    assert _data(page)["images"][0]["path"] == hostile


def test_links_are_quoted(tmp_path: Path) -> None:
    page = fastcam.write_report(_write_results(tmp_path, [_entry(0, tmp_path)]))
    assert _data(page)["images"][0]["classes"][0]["file"] == "overlays/0.1%20%C3%BC%23.jpg"


def test_a_page_of_more_images_than_it_takes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_IMAGES", 3)
    page = fastcam.write_report(_write_results(tmp_path, [_entry(number, tmp_path) for number in range(5)]))
    assert len(_data(page)["images"]) == 3
    assert "the first 3 of 5 images" in page.read_text(encoding="utf-8")


def _remove_run(folder: Path) -> None:
    (folder / "run.json").unlink()


def _break_run(folder: Path) -> None:
    (folder / "run.json").write_text("[1", encoding="utf-8")


def _remove_results(folder: Path) -> None:
    (folder / "results.jsonl").unlink()


def _break_line(folder: Path) -> None:
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"path": 3\n')


def _leave_out_thumbnail(folder: Path) -> None:
    entry = {key: value for key, value in _entry(0, folder).items() if key != "thumbnail"}
    _write_results(folder, [entry])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_remove_run, r"run\.json: does not contain the settings"),
        (_break_run, r"run\.json: does not contain the settings"),
        (_remove_results, r"results\.jsonl: cannot be read .*: run fastcam\.explain_files first"),
        (_break_line, r"results\.jsonl, line 3: is not a result"),
        (_leave_out_thumbnail, "line 1: was written without a report: run fastcam.explain_files with report=True"),
    ],
)
def test_folders_without_results_are_refused(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    folder = _write_results(tmp_path / "out", [_entry(0, tmp_path / "out"), _entry(1, tmp_path / "out")])
    page = fastcam.write_report(folder)
    before = page.read_bytes()
    damage(folder)
    with pytest.raises(ArgumentError, match=said):
        fastcam.write_report(folder)
    assert page.read_bytes() == before


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = _write_results(tmp_path, [_entry(0, tmp_path)])
    (folder / "report.html").mkdir()
    with pytest.raises(WriteError, match=r"report\.html: cannot be written"):
        fastcam.write_report(folder)


# The page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


_COUNT = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    failure = {"path": "photos/bad.jpg", "id": "bad", "error": "'photos/bad.jpg' is damaged"}
    _write_results(folder, [*(_entry(number, folder) for number in range(_COUNT)), failure])
    fastcam.write_report(folder)
    return folder


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    """The page, freshly loaded; nothing may be logged while a test uses it."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    _resize(browser, 1200, 800)
    browser.get((folder / "report.html").as_uri())
    yield browser
    assert _complaints(browser) == []
    names = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(("file:", "data:")) for name in names)


def _complaints(browser: Any) -> list[Any]:
    # The browser warns about reading canvases as often as these tests do.
    return [entry for entry in browser.get_log("browser") if entry["source"] != "rendering"]


def _resize(browser: Any, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _settle(page: Any) -> None:
    """Wait until the browser has painted and notified its observers."""
    page.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 50))")


def _canvas(page: Any, selector: str) -> Array:
    """Return the pixels of a canvas, (H,W,4)."""
    _settle(page)
    size, values = page.execute_script(
        """const canvas = document.querySelector(arguments[0]);
        const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return [[canvas.height, canvas.width, 4], Array.from(data)]""",
        selector,
    )
    return np.array(values, np.uint8).reshape(size)


def _hot_corner(pixels: Array) -> int:
    """Return which corner shows the palette's last colour; the three others have to show its first one."""
    corners = [tuple(pixels[y, x, :3].tolist()) for y in (0, -1) for x in (0, -1)]
    hot, cold = (tuple(palette("jet")[index].tolist()) for index in (255, 0))
    assert sorted(corners) == sorted([hot, cold, cold, cold])
    return corners.index(hot)


def _shown(page: Any) -> list[int]:
    """Return the numbers of the visible cards, in order."""
    found: list[str] = page.execute_script(
        "return [...document.querySelectorAll('#images > .card')].map((card) => card.image.path)"
    )
    return [int(name.rsplit("dog", 1)[1].removesuffix(".jpg")) for name in found]


def _set(page: Any, id_: str, value: str) -> None:
    page.execute_script(
        """const element = document.getElementById(arguments[0]);
        element.value = arguments[1];
        element.dispatchEvent(new Event("input", {bubbles: true}));
        element.dispatchEvent(new Event("change", {bubbles: true}))""",
        id_,
        value,
    )


def _text(page: Any, selector: str) -> str:
    text: str = page.execute_script("return document.querySelector(arguments[0]).textContent", selector)
    return text


def _press(page: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(page).send_keys(key).perform()


def _focused(page: Any) -> int | None:
    path = page.execute_script("return document.activeElement.closest('.card')?.image.path")
    return None if path is None else int(path.rsplit("dog", 1)[1].removesuffix(".jpg"))


def test_heat_is_drawn_where_the_map_says(page: Any) -> None:
    for number in range(4):
        pixels = _canvas(page, f".card:nth-child({number + 1}) canvas")
        assert _hot_corner(pixels) == number
        assert pixels.shape[:2] == ((180, 240) if number % 4 else (240, 120))
        assert (pixels[..., 3] == 255).all()


def test_the_map_is_enlarged_as_overlays_are(page: Any) -> None:
    from fastcam import kernels

    pixels = _canvas(page, ".card:nth-child(2) canvas")
    heat = kernels.resize(_corner_map(1)[None, None].astype(np.float32), (180, 240))[0, 0]
    colours = palette("jet").astype(int)
    # A value between two colours may be rounded to either.
    neighbour = np.abs(np.diff(colours, axis=0)).max()
    assert np.abs(pixels[..., :3] - colours[np.rint(heat).astype(int)]).max() <= neighbour < 10


def test_a_card_switches_between_its_classes(page: Any) -> None:
    before = _hot_corner(_canvas(page, ".card:nth-child(3) canvas"))
    buttons = page.find_elements("css selector", ".card:nth-child(3) .switch button")
    assert [button.text for button in buttons] == ["<b>boxer</b>", "collie"]
    buttons[1].click()
    assert _hot_corner(_canvas(page, ".card:nth-child(3) canvas")) == before + 1
    assert [button.get_attribute("aria-pressed") for button in buttons] == ["false", "true"]
    assert _hot_corner(_canvas(page, ".card:nth-child(2) canvas")) == 1


def test_all_cards_switch_together(page: Any) -> None:
    _set(page, "rank", "1")
    assert [_hot_corner(_canvas(page, f".card:nth-child({number}) canvas")) for number in (1, 2, 3)] == [1, 2, 3]


def test_the_opacity_slider_and_the_switch_of_the_heatmap(page: Any) -> None:
    def style(name: str) -> str:
        script = "return getComputedStyle(document.querySelector('.card canvas'))[arguments[0]]"
        page.execute_async_script("setTimeout(arguments[0], 200)")
        return str(page.execute_script(script, name))

    assert style("opacity") == "0.4"
    _set(page, "opacity", "0.75")
    assert style("opacity") == "0.75"
    page.find_element("id", "heat").click()
    assert style("visibility") == "hidden"


def test_filters_by_class_confidence_and_path(page: Any) -> None:
    assert _text(page, "#count") == "20 of 20 images"
    options = [option.text for option in page.find_elements("css selector", "#label option")]
    assert sorted(options) == sorted(["every class", *(f"{label} (4)" for label in _LABELS)])
    _set(page, "label", "1")
    assert _shown(page) == [1, 6, 11, 16]
    assert _text(page, "#count") == "4 of 20 images"
    _set(page, "label", "")
    _set(page, "low", "80")
    assert _shown(page) == [8, 9, 18, 19]
    _set(page, "high", "90")
    assert _shown(page) == [8, 18]
    _set(page, "low", "")
    _set(page, "high", "100")
    _set(page, "search", "EVEN/dog1")
    assert _shown(page) == [10, 12, 14, 16, 18]
    _set(page, "search", "nothing is called this")
    assert _shown(page) == []
    page.find_element("id", "reset").click()
    assert len(_shown(page)) == 20


@pytest.mark.parametrize(
    ("order", "key"),
    [
        ("order", lambda number: number),
        ("path", lambda number: (number % 2, number)),
        ("low", lambda number: (number % 10, number)),
        ("high", lambda number: (-(number % 10), number)),
        ("label", lambda number: ([2, 0, 3, 4, 1].index(number % 5), -(number % 10), number)),
    ],
)
def test_sorts(page: Any, order: str, key: Callable[[int], Any]) -> None:
    _set(page, "sort", order)
    assert _shown(page) == sorted(range(_COUNT), key=key)


def test_the_large_view_and_its_neighbours(page: Any) -> None:
    page.find_elements("css selector", ".open")[1].click()
    assert _text(page, "#large-title") == "photos/odd/dog1.jpg"
    assert _text(page, "#large .notes") == "the file holds several frames"
    assert _hot_corner(_canvas(page, "#large canvas")) == 1
    rows = page.find_elements("css selector", "#large .top li")
    assert [row.text.split("\n") for row in rows] == [["pug", "37.0 %"], ["<b>boxer</b>", "18.5 %"]]
    link = page.find_element("css selector", "#large .links a")
    assert link.get_attribute("href").endswith("/overlays/1.1%20%C3%BC%23.jpg")
    page.find_element("id", "next").click()
    assert _text(page, "#large-title") == "photos/even/dog2.jpg"
    page.find_elements("css selector", "#large .switch button")[1].click()
    assert _hot_corner(_canvas(page, "#large canvas")) == 3
    _press(page, "\ue012", "\ue012")
    assert _text(page, "#large-title") == "photos/even/dog0.jpg"
    assert page.find_element("id", "previous").get_attribute("aria-disabled") == "true"
    _press(page, "\ue00c")
    _settle(page)
    assert not page.execute_script("return document.getElementById('large').open")
    assert _focused(page) == 0


def test_keys(page: Any) -> None:
    left, up, right, down, enter, escape = "\ue012", "\ue013", "\ue014", "\ue015", "\ue007", "\ue00c"
    _press(page, right)
    assert _focused(page) == 0
    _press(page, right, right, left)
    assert _focused(page) == 1
    columns = page.execute_script("return cardsInARow()")
    assert columns > 2
    _press(page, down)
    assert _focused(page) == 1 + columns
    _press(page, up, "2")
    assert _hot_corner(_canvas(page, ".card:nth-child(1) canvas")) == 1
    _press(page, "h")
    assert not page.find_element("id", "heat").is_selected()
    _press(page, "+", "+", "-")
    assert float(page.find_element("id", "opacity").get_attribute("value")) == pytest.approx(0.5)
    _press(page, enter)
    assert _text(page, "#large-title") == "photos/odd/dog1.jpg"
    _press(page, escape)
    _settle(page)
    assert _focused(page) == 1
    _press(page, "/", "dog7")
    assert _shown(page) == [7]
    page.find_element("id", "search").clear()
    page.find_element("id", "keys").click()
    assert page.execute_script("return document.getElementById('help').open")


def test_failures_are_listed(page: Any) -> None:
    assert _text(page, "#failed") == "1 not explained"
    assert _text(page, ".failures li") == "'photos/bad.jpg' is damaged"


def test_counts_are_of_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_IMAGES", 2)
    failures = [{"path": f"{n}.jpg", "id": f"x{n}", "error": f"{n} is damaged"} for n in range(3)]
    page = fastcam.write_report(_write_results(tmp_path, [_entry(0, tmp_path), *failures], images=1))
    text = page.read_text(encoding="utf-8")
    assert "<title>dogs.onnx: 1 images explained</title>" in text
    assert "1 images explained, 3 not" in text
    assert "1 is damaged" in text
    assert "2 is damaged" not in text
    assert "The others are in results.jsonl" in text


def test_the_focus_is_never_lost(page: Any) -> None:
    def focused() -> str:
        found: str = page.execute_script("const e = document.activeElement; return e.id || e.textContent")
        return found

    page.find_elements("css selector", ".open")[1].click()
    page.find_elements("css selector", "#large .switch button")[1].send_keys("\ue007")
    assert focused() == "<b>boxer</b>"
    assert page.find_elements("css selector", "#large .switch button")[1].get_attribute("aria-pressed") == "true"
    _press(page, "\ue00c")
    page.execute_script("showLarge(images[18])")
    page.find_element("id", "next").send_keys("\ue007")
    assert focused() == "next"
    assert page.find_element("id", "next").get_attribute("aria-disabled") == "true"
    _press(page, "\ue00c")
    _set(page, "search", "nothing is called this")
    page.find_element("id", "reset").send_keys("\ue007")
    assert focused() == "images"


def test_keys_work_without_images_and_can_be_switched_off(page: Any) -> None:
    _set(page, "search", "nothing is called this")
    page.execute_script("document.activeElement.blur()")
    _press(page, "?")
    assert page.execute_script("return document.getElementById('help').open")
    page.find_element("id", "shortcuts").click()
    _press(page, "\ue00c", "h", "?")
    assert page.find_element("id", "heat").is_selected()
    assert not page.execute_script("return document.getElementById('help').open")


def test_the_header_leaves_a_low_window_to_the_images(page: Any) -> None:
    _resize(page, 1000, 400)
    assert page.execute_script("return getComputedStyle(document.querySelector('header')).position") == "static"
    assert page.find_element("css selector", ".tools").aria_role == "group"


def _luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)" (WCAG 2.1)."""
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("way", ["system", "button"])
def test_light_and_dark_are_readable(page: Any, theme: str, way: str) -> None:
    other = "light" if theme == "dark" else "dark"
    system = theme if way == "system" else other
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": system}]}
    )
    page.refresh()
    if way == "button":
        page.find_element("id", "theme").click()
    colours = page.execute_script(
        """const selectors = [".title p", ".facts b", ".facts small", ".switch [aria-pressed=true]", ".failures li"];
        return selectors.map((selector) => {
            const element = document.querySelector(selector);
            let behind = element;
            const paint = (node) => getComputedStyle(node).backgroundColor;
            while (paint(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            return [selector, getComputedStyle(element).color, paint(behind)];
        })"""
    )
    for selector, text, background in colours:
        light, dark = sorted([_luminance(text), _luminance(background)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, selector
    page_background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (_luminance(page_background) < 0.1) == (theme == "dark")


def _check_names(page: Any, scope: str, at_least: int) -> None:
    controls = page.find_elements("css selector", ", ".join(f"{scope} {tag}" for tag in _NAMED))
    assert len(controls) >= at_least
    for control in controls:
        assert control.accessible_name.strip(), control.get_attribute("outerHTML")[:200]


_NAMED = ("input", "select", "button:enabled", "a[href]", "#images", ".top", "[role=group]")


def test_every_control_has_a_name_for_screen_readers(page: Any) -> None:
    _check_names(page, "header", 9)
    _check_names(page, "main li:nth-child(-n+6)", 18)
    assert page.find_element("id", "count").aria_role == "status"
    # Elements behind an open dialog have no accessible name.
    page.find_elements("css selector", ".open")[0].click()
    _check_names(page, "#large[open]", 8)
    assert page.find_element("id", "large").accessible_name == "photos/even/dog0.jpg"
    assert page.find_element("css selector", "#large img").accessible_name == (
        "photos/even/dog0.jpg, with the heatmap of beagle"
    )


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(page: Any, width: int) -> None:
    _resize(page, width, 700)
    page.refresh()
    assert page.execute_script("const e = document.documentElement; return e.scrollWidth - e.clientWidth") <= 0
    page.find_elements("css selector", ".open")[0].click()
    assert page.execute_script("const l = document.getElementById('large'); return l.scrollWidth - l.clientWidth") <= 0


def test_two_thousand_images_are_drawn_as_they_come_near(browser: Any, tmp_path: Path) -> None:
    folder = _write_results(tmp_path, [_entry(number, tmp_path) for number in range(2000)])
    browser.get(fastcam.write_report(folder).as_uri())
    assert _text(browser, "#count") == "2000 of 2000 images"

    def drawn() -> list[int]:
        _settle(browser)
        found: list[int] = browser.execute_script(
            "return images.filter((image) => image.canvas.width > 0 && image.drawn).map((image) => image.order)"
        )
        return found

    first = drawn()
    assert 0 in first
    assert len(first) < 100
    browser.execute_script("images[1500].card.scrollIntoView()")
    later = drawn()
    assert 1500 in later
    assert 0 not in later
    assert len(later) < 100
    _set(browser, "label", "2")
    _set(browser, "low", "90")
    assert _shown(browser) == [number for number in range(2000) if number % 10 == 9 and number % 5 == 2]
    _set(browser, "low", "50")
    assert _shown(browser) == [number for number in range(2000) if number % 10 == 7]
    assert _complaints(browser) == []
