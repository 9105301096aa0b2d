"""Guided backpropagation (Springenberg et al. 2015, section 3.4): rectifiers let only positive gradients pass."""

from __future__ import annotations

from collections import ChainMap

from ...errors import ModelError
from ...graph import Graph, needed_nodes, operator
from ..gradients.autodiff import backpropagate
from ..gradients.table import VJPS, Rule, Step, Vjp
from ..outputs import Asked


def guided_gradients(graph: Graph, asked: Asked) -> str:
    r"""Return the guided gradients of the image, (N,K,\*image)."""
    if not any(operator(node) in ("Relu", "Clip") for node in needed_nodes(graph, [asked.logits])):
        raise ModelError(
            'evidence="guided_gradients": the network has no ReLU, and without one guided gradients are ordinary ones: '
            'take gradients="image"'
        )
    # ReLU6 is a Clip from 0.
    rules = ChainMap({"Relu": Vjp((_guided(VJPS["Relu"]),)), "Clip": Vjp((_clip, None, None))}, VJPS)
    value, gradient = asked.differentiate(graph)
    (found,) = backpropagate(graph, {value: gradient}, [asked.image], rules=rules)
    return graph.emit("Transpose", found, perm=[1, 0, 2, 3, 4], stem="guided/image")


def _guided(vjp: Vjp) -> Rule:
    """Return the rule of a rectifier that drops negative gradients."""
    plain = vjp.rules[0] or _no_rule
    return lambda step: step.emit("Relu", plain(step))


def _clip(step: Step) -> str:
    rectifies = bool((step.fixed_or(1, -1.0) == 0).all())
    plain = VJPS["Clip"].rules[0] or _no_rule
    return (_guided(VJPS["Clip"]) if rectifies else plain)(step)


def _no_rule(step: Step) -> str:
    step.refuse("its rule was removed")
