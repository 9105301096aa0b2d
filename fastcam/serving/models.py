"""The files that a server explains with, opened, warmed up, and replaced when they change."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..arguments import shown
from ..errors import ArgumentError, FastcamError
from ..explaining.explainer import Explainer
from ..files import file_state

_LOG = logging.getLogger("fastcam.serving")
# Seconds between two looks at a file.
_LOOK = 1.0


class UnknownModelError(ArgumentError):
    """There is no model of that name."""


class ServedModel:
    """One file.

    Parameters
    ----------
    path : Path
    device : str
    threads : int or None

    Attributes
    ----------
    name : str
        The file's name without its suffix.
    """

    def __init__(self, path: Path, device: str, threads: int | None) -> None:
        self.name = path.stem
        self._path = path
        self._options = {"device": device, "threads": threads}
        self._state = file_state(path)
        self._explainer = self._open()
        self._next_look = time.monotonic() + _LOOK
        self._looking = threading.Lock()

    @property
    def explainer(self) -> Explainer:
        """The file as it was opened last; calls that have begun keep the one that they began with."""
        return self._explainer

    def refresh(self) -> None:
        """Open the file again if it has changed; if that fails, keep the one that is open."""
        if time.monotonic() < self._next_look or not self._looking.acquire(blocking=False):
            return
        try:
            self._next_look = time.monotonic() + _LOOK
            state = file_state(self._path)
            # None in the middle of a replacement, or where it is gone: the open one stays.
            if state in (None, self._state):
                return
            self._explainer = self._open()
            _LOG.info("model %s: reloaded", self.name)
            self._state = state
        except FastcamError as error:
            # Not tried again before the file changes once more.
            self._state = state
            _LOG.error("model %s: it changed, and cannot be opened: %s. The earlier one is kept", self.name, error)
        finally:
            self._looking.release()

    def _open(self) -> Explainer:
        explainer = Explainer(self._path, **self._options)  # type: ignore[arg-type]  # names and types as declared
        warm_up(explainer)
        return explainer


class ModelStore:
    """All files of a server, by name.

    Parameters
    ----------
    paths : sequence of path
    device : str
    threads : int or None

    Raises
    ------
    ArgumentError
        Two files have the same name, or one has a name that cannot be a part of a URL.
    FastcamError
        A file cannot be opened.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], *, device: str, threads: int | None) -> None:
        self._models: dict[str, ServedModel] = {}
        for path in map(Path, paths):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", path.stem):
                raise ArgumentError(f"{path}: its name becomes a part of URLs: use letters, digits, '.', '_' and '-'")
            if path.stem in self._models:
                raise ArgumentError(f"{path}: another model is called {path.stem!r}, too: rename one of the files")
            self._models[path.stem] = ServedModel(path, device, threads)
        if not self._models:
            raise ArgumentError("there is no model to serve: give at least one file")

    @property
    def names(self) -> list[str]:
        """The models' names, in the order in which they were given."""
        return list(self._models)

    def find(self, name: str | None) -> ServedModel:
        """Return the model of that name, or the only one.

        Raises
        ------
        UnknownModelError
            There is none, or there are several and no name.
        """
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise UnknownModelError(f"model {shown(name)}: choose one of {', '.join(self._models)}")
        return self._models[name]


def warm_up(explainer: Explainer) -> None:
    """Run a grey picture, or an empty input where the file does not say how pictures are prepared."""
    height, width = explainer.input_size
    grey = np.full((height, width, 3), 128, np.uint8)
    try:
        explainer(grey)
    except FastcamError as error:
        # A picture of one colour may have no finite explanation; a model that cannot run says so to its clients.
        _LOG.info("%s: the warm-up picture was not explained: %s", explainer.path.name, error)
