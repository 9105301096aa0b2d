"""Methods that follow the gradient down to the image, or average gradients over changed images."""

from __future__ import annotations

import numpy as np

from ...arrays import Doubles, Floats
from .table import Evidence, Method, Rows, Setting, Settings

_SAMPLES = Setting(25, 1, 10_000, "noisy copies of the image")
_NOISE = Setting(0.15, 0.0, 10.0, "standard deviation of the noise, as a share of the image's range of values")
_SEED = Setting(0, 0, 2**32 - 1, "the seed of the random numbers")
_NOISY = {"samples": _SAMPLES, "noise": _NOISE, "seed": _SEED}


def _saliency(evidence: Evidence, settings: Settings) -> Doubles:
    """Return the largest magnitude over the colours of the gradient of the image (section 3.1)."""
    return _largest(evidence, evidence.image_gradients(lambda rows: evidence.image[None], 1, np.ones(1)))


def _smooth_grad(evidence: Evidence, settings: Settings) -> Doubles:
    """Average the gradients of noisy copies of the image (section 3), and take magnitudes as `_saliency` does."""
    count = settings["samples"]
    gradients = evidence.image_gradients(_noisy(evidence, settings), count, np.full(count, 1 / count))
    return _largest(evidence, gradients)


def _integrated_gradients(evidence: Evidence, settings: Settings) -> Doubles:
    """Integrate the gradients on the way from 0 to the image, and multiply by the image (eq. 1), summed over colours.

    By Gauss-Legendre quadrature: exact for polynomials of degree 2n - 1.
    """
    points, weights = np.polynomial.legendre.leggauss(settings["steps"])
    shares = ((points + 1) / 2).astype(np.float32)
    image = evidence.image

    def between(rows: slice) -> Floats:
        return np.asarray(image * shares[rows].reshape(-1, 1, 1, 1))

    gradients = evidence.image_gradients(between, len(shares), weights / 2)
    return np.asarray((gradients * image).sum(axis=evidence.layout.index("C")))


def _expected_gradients(evidence: Evidence, settings: Settings) -> Doubles:
    """Average integrated gradients over a background (eq. 3): each sample takes one of its images and one point.

    The images take turns, in random order; the points are drawn evenly from the way between them and the image.
    """
    random = np.random.default_rng(settings["seed"])
    count, background, image = settings["samples"], evidence.background, evidence.image
    rounds = -(-count // len(background))
    order = np.concatenate([random.permutation(len(background)) for _ in range(rounds)])[:count]
    shares = random.random((count, *[1] * image.ndim))

    def between(rows: slice) -> Floats:
        start = background[order[rows]]
        return np.asarray(start + shares[rows] * (image - start), np.float32)

    weights = (image - background[order]).astype(np.float64) / count
    gradients = evidence.image_gradients(between, count, weights)
    return np.asarray(gradients.sum(axis=evidence.layout.index("C")))


def _guided_backpropagation(evidence: Evidence, settings: Settings) -> Doubles:
    """Return the largest magnitude over the colours of the guided gradients of the image (section 3.4)."""
    return _largest(evidence, evidence.output("guided_gradients"))


def _guided_grad_cam(evidence: Evidence, settings: Settings) -> Doubles:
    """Multiply the guided gradients by Grad-CAM's map, resized to the image (section 3.2)."""
    maps = np.maximum(np.einsum("kc,chw->khw", evidence.weights, evidence.activations), 0)
    large = evidence.resize(np.asarray(maps, np.float32), evidence.size)
    return np.asarray(_largest(evidence, evidence.output("guided_gradients")) * large)


def _full_gradient(evidence: Evidence, settings: Settings) -> Doubles:
    """Return the maps of the image and of all biases, added up in the file (eq. 6)."""
    return evidence.output("bias_maps")


def _smooth_grad_cam(evidence: Evidence, settings: Settings) -> Doubles:
    """Weigh as Grad-CAM++ does, with derivatives that are means over noisy copies of the image (eq. 9 and 10)."""
    first, second, third = evidence.layer_gradients(_noisy(evidence, settings), settings["samples"])
    activations = evidence.activations.astype(np.float64)
    total = activations.sum(axis=(1, 2), keepdims=True)
    denominator = 2 * second + total * third
    alpha = np.divide(second, denominator, out=np.zeros_like(second), where=denominator != 0)
    weights = (alpha * np.maximum(first, 0)).sum(axis=(2, 3))
    return np.asarray(np.einsum("kc,chw->khw", weights, activations))


def _noisy(evidence: Evidence, settings: Settings) -> Rows:
    random = np.random.default_rng(settings["seed"])
    image = evidence.image
    deviation = settings["noise"] * float(image.max() - image.min())

    def rows_of(rows: slice) -> Floats:
        noise = random.normal(0, deviation, (rows.stop - rows.start, *image.shape))
        return np.asarray(image + noise, np.float32)

    return rows_of


def _largest(evidence: Evidence, gradients: Doubles) -> Doubles:
    return np.asarray(np.abs(gradients).max(axis=evidence.layout.index("C")))


METHODS = {
    "smoothgradcam++": Method(
        "Omeiza et al. 2019, Smooth Grad-CAM++, eq. 9 and 10", reruns=_smooth_grad_cam, settings=_NOISY
    ),
    "saliency": Method(
        "Simonyan et al. 2014, Deep Inside Convolutional Networks, section 3.1",
        reads=("image_gradients",),
        reruns=_saliency,
    ),
    "smoothgrad": Method(
        "Smilkov et al. 2017, SmoothGrad, section 3", reads=("image_gradients",), reruns=_smooth_grad, settings=_NOISY
    ),
    "integratedgradients": Method(
        "Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks, eq. 1",
        reads=("image_gradients",),
        reruns=_integrated_gradients,
        settings={"steps": Setting(50, 1, 10_000, "points of the quadrature")},
    ),
    "expectedgradients": Method(
        "Erion et al. 2021, Improving performance of deep learning models with axiomatic attribution priors, eq. 3",
        reads=("image_gradients",),
        reruns=_expected_gradients,
        settings={
            "samples": Setting(200, 1, 10_000, "points between the image and those of the background"),
            "seed": _SEED,
        },
    ),
    "guidedbackprop": Method(
        "Springenberg et al. 2015, Striving for Simplicity, section 3.4",
        reads=("guided_gradients",),
        reruns=_guided_backpropagation,
    ),
    "guidedgradcam": Method(
        "Selvaraju et al. 2017, Grad-CAM, section 3.2",
        reads=("weights", "guided_gradients"),
        reruns=_guided_grad_cam,
    ),
    "fullgrad": Method(
        "Srinivas and Fleuret 2019, Full-Gradient Representation, eq. 6", reads=("bias_maps",), reruns=_full_gradient
    ),
}
