"""The gradient rules, grouped by kind of op; importing this package registers them all."""

from . import elementwise, normalization, products, reductions, resize, shapes, windows

__all__ = ["elementwise", "normalization", "products", "reductions", "resize", "shapes", "windows"]
