"""Stand-ins for modules that the peers import but do not need for Grad-CAM, if they cannot be installed.

pytorch-grad-cam imports torchvision for the pictures of its tutorials, and torchvision has no wheel for every build of
torch. xplique imports tensorflow-probability for another method, and pins a TensorFlow that is older than this one.
tf-keras-vis imports a module of scipy by its name before 2022. Empty modules replace them, only if the real ones are
missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

# Module, and the names that are imported from it.
_STAND_INS = {
    "torchvision": (),
    "torchvision.transforms": ("Compose", "Normalize", "ToTensor"),
    "torchvision.transforms.functional": ("resize",),
    "torchvision.ops": (),
    "tensorflow_probability": (),
}


def install() -> None:
    """Install the stand-ins; real modules take precedence."""
    missing = {name for name in _STAND_INS if importlib.util.find_spec(name.partition(".")[0]) is None}
    for name in [name for name in _STAND_INS if name in missing]:
        parent, _, child = name.rpartition(".")
        module = ModuleType(name)
        # A module of the package may be queried for its specification later.
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        for member in _STAND_INS[name]:
            setattr(module, member, None)
        sys.modules[name] = module
        if parent:
            setattr(sys.modules[parent], child, module)
    if importlib.util.find_spec("scipy") is not None:
        _alias("scipy.ndimage.interpolation", "scipy.ndimage")


def _alias(old: str, new: str) -> None:
    sys.modules.setdefault(old, importlib.import_module(new))
