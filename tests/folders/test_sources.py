"""The named inputs become a list of pictures: each once, in order, with its own id."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fastcam.errors import ArgumentError, ImageError
from fastcam.folders.sources import find_sources, slug


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "photos/b.jpg",
        "photos/a.PNG",
        "photos/deep/er/a.PNG",
        "photos/notes.md",
        "photos/.hidden.jpg",
        "c.gif",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    Path("photos/.cache").mkdir()
    Path("photos/.cache/d.jpg").write_bytes(b"")
    return tmp_path


def _paths(*inputs: str | Path, stdin: bytes = b"") -> list[str]:
    return [source.path for source in find_sources(inputs, stdin=io.BytesIO(stdin))]


def test_a_folder_gives_its_pictures_sorted_and_nothing_else() -> None:
    assert _paths("photos") == ["photos/a.PNG", "photos/b.jpg", "photos/deep/er/a.PNG"]
    assert _paths(Path("photos/")) == _paths("photos")


def test_files_keep_the_order_in_which_they_are_named() -> None:
    assert _paths("c.gif", "photos/b.jpg") == ["c.gif", "photos/b.jpg"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("photos/*.jpg", ["photos/b.jpg"]),
        ("photos/**/*.PNG", ["photos/a.PNG", "photos/deep/er/a.PNG"]),
        ("photos/*", ["photos/a.PNG", "photos/b.jpg"]),
        ("[c-d].gif", ["c.gif"]),
        ("?.gif", ["c.gif"]),
    ],
)
def test_patterns_are_expanded(pattern: str, found: list[str]) -> None:
    assert _paths(pattern) == found


def test_a_file_whose_name_looks_like_a_pattern_is_a_file() -> None:
    Path("[c].gif").write_bytes(b"")
    assert _paths("[c].gif") == ["[c].gif"]


@pytest.mark.parametrize(
    "data", [b"c.gif\nphotos\n\n", b"c.gif\r\nphotos\r\n", b"c.gif\0photos\0", b"c.gif\nphotos/*.*\nphotos"]
)
@pytest.mark.parametrize("way", ["list", "stdin"])
def test_lists_name_files_folders_and_patterns(data: bytes, way: str) -> None:
    Path("list.txt").write_bytes(data)
    found = _paths("list.txt") if way == "list" else _paths("-", stdin=data)
    assert found == ["c.gif", "photos/a.PNG", "photos/b.jpg", "photos/deep/er/a.PNG"]


def test_a_picture_that_is_named_twice_is_done_once() -> None:
    assert _paths("photos/b.jpg", "./photos", Path("photos/b.jpg").absolute()) == [
        "photos/b.jpg",
        "./photos/a.PNG",
        "./photos/deep/er/a.PNG",
    ]


def test_the_jobs_own_output_is_no_input() -> None:
    Path("photos/out/overlays").mkdir(parents=True)
    Path("photos/out/overlays/a.jpg").write_bytes(b"")
    found = find_sources(["photos"], [Path("photos/out")])
    assert [source.path for source in found] == ["photos/a.PNG", "photos/b.jpg", "photos/deep/er/a.PNG"]
    with pytest.raises(ImageError, match=r"the pattern 'photos/out/overlays/\*.jpg' contains no pictures"):
        find_sources(["photos/out/overlays/*.jpg"], [Path("photos/out")])


def test_what_does_not_exist_is_listed_so_that_it_is_reported() -> None:
    assert _paths("gone.jpg", "c.gif") == ["gone.jpg", "c.gif"]


def test_names_that_are_no_text_survive() -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    Path("list.txt").write_bytes(b"caf\xe9.jpg\n")
    assert _paths("list.txt") == [name]
    assert len(find_sources([name])[0].id) > 16


@pytest.mark.parametrize("name", ["missing.txt", "-", "photos/deep", "*.tiff"])
def test_nothing_to_explain_is_refused_by_name(name: str) -> None:
    Path("photos/deep/er/a.PNG").unlink()
    said = {
        "missing.txt": "the list 'missing.txt' cannot be read: No such file",
        "-": "there are no pictures to explain",
        "photos/deep": "the folder 'photos/deep' contains no pictures",
        "*.tiff": r"the pattern '\*.tiff' contains no pictures",
    }
    with pytest.raises(ImageError, match=said[name]):
        _paths(name)


def test_ids_tell_same_names_apart_and_are_the_same_in_every_run() -> None:
    first = find_sources(["photos"])
    assert len({source.id for source in first}) == 3
    alone = find_sources(["photos/deep/er/a.PNG"])
    assert alone == first[2:]
    assert alone[0].id.startswith("a-")


def test_ids_are_names_that_every_file_system_takes() -> None:
    awkward = f"photos/{'ü' * 100}: a \n b.jpg"
    id_ = find_sources([awkward])[0].id
    assert len(id_.encode()) < 128
    assert slug(id_.rsplit("-", 1)[0]) == id_.rsplit("-", 1)[0]
    assert slug("a b/c:*?<>|\"'\n") == "a_b_c"


def test_an_id_tells_where_a_picture_is_and_not_how_it_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    relative = find_sources(["photos/b.jpg"])[0]
    assert find_sources([Path("photos/b.jpg").absolute()])[0].id == relative.id
    Path("other").mkdir()
    monkeypatch.chdir("other")
    assert find_sources(["../photos/b.jpg"])[0].id == relative.id
    assert find_sources(["photos/b.jpg"])[0].id != relative.id


def test_a_link_and_two_dots_lead_where_the_system_says() -> None:
    Path("far/inner").mkdir(parents=True)
    Path("far/c.gif").write_bytes(b"")
    Path("link").symlink_to("far/inner")
    assert _paths("link/../c.gif", "c.gif") == ["link/../c.gif", "c.gif"]
    assert len({source.id for source in find_sources(["link/../c.gif", "c.gif"])}) == 2


@pytest.mark.parametrize("out", ["photos/../photos/overlays", "link/overlays"])
def test_the_output_is_no_input_however_it_is_named(out: str) -> None:
    Path("photos/overlays").mkdir()
    Path("photos/overlays/a.jpg").write_bytes(b"")
    Path("link").symlink_to("photos")
    found = [source.path for source in find_sources(["photos"], [Path(out)])]
    assert found == ["photos/a.PNG", "photos/b.jpg", "photos/deep/er/a.PNG"]


def test_a_loop_of_links_gives_each_picture_once() -> None:
    Path("photos/deep/loop").symlink_to(Path("photos").absolute())
    assert _paths("photos/**/*.*") == ["photos/a.PNG", "photos/b.jpg", "photos/deep/er/a.PNG"]


@pytest.mark.parametrize("item", ["", None, b"c.gif", 3, "c\0.gif"])
def test_what_is_no_path_is_refused(item: Any) -> None:
    with pytest.raises(ArgumentError, match="does not name a picture"):
        find_sources([item])


def test_what_may_not_be_read_or_leads_nowhere_is_listed_so_that_it_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("deep"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    Path("photos/lost.jpg").symlink_to("nowhere.jpg")
    assert _paths("photos") == ["photos/a.PNG", "photos/b.jpg", "photos/deep", "photos/lost.jpg"]
    long = "x" * 300 + ".jpg"
    assert _paths(long) == [long]


def test_standard_input_is_asked_for_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert [source.path for source in find_sources(["c.gif"])] == ["c.gif"]
    with pytest.raises(ImageError, match="no standard input"):
        find_sources(["-"])


def test_the_byte_order_mark_of_a_list_is_no_part_of_a_name() -> None:
    Path("list.txt").write_bytes(b"\xef\xbb\xbfc.gif\r\n")
    assert _paths("list.txt") == ["c.gif"]


def test_slugs_are_bounded_by_bytes() -> None:
    assert len(slug("蓝" * 100).encode()) <= 80
    assert slug("𠀀" * 100) == "𠀀" * 20
