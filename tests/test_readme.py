"""The README's Python runs as printed, one block after the other, in a folder with the files that it names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from textbook import make_layers_he

from fastcam.vjps import VJPS

_README = Path(__file__).parents[1] / "README.md"
_BLOCKS = re.findall(r"<!-- runs -->\n```python\n(.*?)```", _README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_readmes_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
    monkeypatch.chdir(tmp_path)
    # A block teaches a rule: this takes it back afterwards.
    monkeypatch.setitem(VJPS, "Sin", VJPS["Relu"])
    model = keras.applications.VGG16(weights=None, input_shape=(224, 224, 3), classes=15)
    make_layers_he(model, seed=0)
    model.save("dogs.keras")
    generator = np.random.default_rng(0)
    for name in ("dog.jpg", "two_dogs.jpg"):
        Image.fromarray(generator.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(name)

    assert len(_BLOCKS) == 5
    names: dict[str, object] = {}
    for block in _BLOCKS:
        exec(block, names)

    assert list(tmp_path.glob("why_*.png"))
    heatmap = names["heatmap"]
    assert isinstance(heatmap, np.ndarray)
    assert heatmap.shape == (1, 1, 14, 14)


def test_the_readme_names_its_two_commands() -> None:
    """`.ci/run` takes them from here."""
    text = _README.read_text(encoding="utf-8")
    for marker in ("demo", "test"):
        assert re.search(rf"^<!-- {marker} command -->\n```sh\n\S.*\n```$", text, re.MULTILINE), marker
