"""What a network's outputs mean as scores: one module for each kind, and the table that all of them become.

In: a graph with the model's own outputs. Out: the graph with one table of scores (N,M), and a `ScoreTable` that says
how its entries are ranked, differentiated and described. Imports the ground, `gradients`, `layers`, `ops`, `scores`
and `trials`.
"""

from __future__ import annotations

from .boxes import open_boxes
from .embedding import open_embedding
from .segmentation import open_segmentation
from .table import CLASSES, Scored, ScoreRequest, ScoreTable, open_classes, open_values

__all__ = ["CLASSES", "KINDS", "ScoreRequest", "ScoreTable", "Scored"]

KINDS = {
    "classes": open_classes,
    "values": open_values,
    "segmentation": open_segmentation,
    "boxes": open_boxes,
    "embedding": open_embedding,
}
"""By the name of the kind: from a graph with the model's outputs to one with a table of scores."""
