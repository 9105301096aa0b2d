"""Methods that run the model again, or follow gradients to the image, against captum, torchcam and pytorch-grad-cam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import relative_error

import fastcam
from bench import shims
from fastcam.explaining.methods import METHODS

torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[peers]")

# What a peer warns about while it runs is not our concern.
pytestmark = pytest.mark.filterwarnings("ignore")

_CLASS = 2
_SIDE = 24


def _peer(module: str) -> Any:
    """Import a peer only when a test runs: it imports most of torch, and TensorFlow must not be loaded before that."""
    shims.install()
    return pytest.importorskip(module, reason=f"needs {module.partition('.')[0]}: see [peers] in pyproject.toml")


def _vgg_like() -> Any:
    """Pooling, flattening and two dense layers behind the explained layer."""
    nn = torch.nn
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 10, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(360, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    ).eval()


def _averaged() -> Any:
    """A network for CAM: average pooling and one dense layer."""
    nn = torch.nn
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 10, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 5),
    ).eval()


_LAYER = "4"


@pytest.fixture(scope="module")
def images() -> Any:
    return torch.rand(2, 3, _SIDE, _SIDE, generator=torch.Generator().manual_seed(3)) - 0.4


@pytest.fixture(scope="module")
def explainer(tmp_path_factory: pytest.TempPathFactory, images: Any) -> fastcam.Explainer:
    return _explainer(_vgg_like(), tmp_path_factory.mktemp("methods"), images)


def _explainer(network: Any, folder: Path, images: Any, **options: Any) -> fastcam.Explainer:
    evidence = ["guided_gradients", "bias_maps"]
    fastcam.export(
        network,
        folder / "small.onnx",
        example_input=images[:1],
        gradients="image",
        evidence=evidence,
        layer=_LAYER,
    )
    return fastcam.Explainer(folder / "small.onnx", device="cpu", **options)


def _maps(explainer: fastcam.Explainer, images: Any, method: str, **settings: Any) -> Any:
    found = explainer(images.numpy(), _CLASS, method=method, normalize=None, size="layer", settings=settings)
    assert found.maps[:, 0].max() > 0
    return found.maps[:, 0]


def _torchcam(method: str, network: Any, images: Any, **options: Any) -> Any:
    """One image at a time: some of the peer's methods differ for batches."""
    maps = []
    for image in images:
        with getattr(_peer("torchcam.methods"), method)(
            network, _LAYER, input_shape=(3, _SIDE, _SIDE), **options
        ) as cam:
            scores = network(image[None].requires_grad_(requires_grad=True))
            maps.append(cam(_CLASS, scores, normalized=False)[0][0].detach().numpy())
    return np.stack(maps)


def _target() -> Any:
    return _peer("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(_CLASS)


@pytest.mark.parametrize("build", [_vgg_like, _averaged])
def test_score_cam_is_torchcams(build: Any, images: Any, tmp_path: Path) -> None:
    network = build()
    found = _maps(_explainer(network, tmp_path, images), images, "scorecam")
    assert relative_error(found, _torchcam("ScoreCAM", network, images)) < 1e-4


def test_smoothed_score_cam_without_noise_is_torchcams(explainer: fastcam.Explainer, images: Any) -> None:
    expected = _torchcam("SSCAM", _vgg_like(), images, num_samples=2, std=1e-9)
    assert relative_error(_maps(explainer, images, "sscam", samples=2, noise=0.0), expected) < 1e-4


def test_smooth_grad_cam_is_the_papers_formula(explainer: fastcam.Explainer, images: Any) -> None:
    """Autograd's derivatives at images with the same noise. torchcam differs: it takes the last copy's gradient for the
    mean, and weights the third derivatives by the activation at their own place.
    """
    found = _maps(explainer, images[:1], "smoothgradcam++", samples=4, noise=0.1, seed=7)
    network, image = _vgg_like(), images[:1].numpy()
    noise = np.random.default_rng(7).normal(0, 0.1 * (image.max() - image.min()), (4, *image.shape[1:]))
    activations = network[:5](torch.tensor((image + noise).astype(np.float32))).detach().requires_grad_()
    network[5:](activations)[:, _CLASS].sum().backward()
    gradients = activations.grad.double().numpy()
    first, second, third = ((gradients**power).mean(axis=0) for power in (1, 2, 3))
    kept = network[:5](images[:1]).detach().double().numpy()[0]
    expected = np.zeros(kept.shape[1:])
    for channel, activation in enumerate(kept):
        weight = 0.0
        for place in np.ndindex(*activation.shape):
            d1, d2, d3 = (values[(channel, *place)] for values in (first, second, third))
            if d2 > 0:
                weight += d2 / (2 * d2 + activation.sum() * d3) * max(d1, 0)
        expected += weight * activation
    assert relative_error(found[0], np.maximum(expected, 0)) < 1e-4


def test_cam_is_torchcams(images: Any, tmp_path: Path) -> None:
    network = _averaged()
    explainer = _explainer(network, tmp_path, images)
    expected = _torchcam("CAM", network, images, fc_layer="7")
    assert relative_error(_maps(explainer, images, "cam"), expected) < 1e-5


def test_cam_needs_a_linear_head(explainer: fastcam.Explainer, images: Any) -> None:
    with pytest.raises(fastcam.ArgumentError, match="global average pooling and one dense layer"):
        explainer(images.numpy(), _CLASS, method="cam")


@pytest.mark.parametrize("build", [_vgg_like, _averaged])
def test_ablation_weights_are_those_of_pytorch_grad_cam(build: Any, images: Any, tmp_path: Path) -> None:
    network = build()
    explainer = _explainer(network, tmp_path, images)
    found = explainer(images.numpy(), _CLASS, method="ablationcam", normalize="signed", size="layer").maps[:, 0]
    layer = network[int(_LAYER)]
    for number, image in enumerate(images):
        with _peer("pytorch_grad_cam").AblationCAM(model=network, target_layers=[layer]) as cam:
            cam.batch_size = 4
            cam(image[None], [_target()])
            activations = cam.activations_and_grads.activations[0].numpy()
            weights = cam.get_cam_weights(image[None], layer, [_target()], activations, None)
        score = float(network(image[None])[0, _CLASS])
        # Their weights are divided by the score, whose sign turns the map around.
        expected = np.sign(score) * np.einsum("c,chw->hw", weights[0], activations[0])
        assert relative_error(found[number], expected / np.abs(expected).max()) < 1e-4


def test_ablation_of_heads_without_a_dense_layer(images: Any, tmp_path: Path) -> None:
    """Each channel is set to 0 in a copy of the activations: here a convolution follows."""
    nn = torch.nn
    torch.manual_seed(2)
    network = nn.Sequential(
        *list(_averaged())[:5], nn.Conv2d(10, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    ).eval()
    explainer = _explainer(network, tmp_path, images)
    found = explainer(images[:1].numpy(), _CLASS, method="ablationcam", normalize="signed", size="layer", batch_size=3)
    with torch.no_grad():
        activations = network[:5](images[:1])
        score = network(images[:1])[0, _CLASS]
        expected = torch.zeros(activations.shape[2:])
        for channel in range(activations.shape[1]):
            changed = activations.clone()
            changed[:, channel] = 0
            expected += (score - network[5:](changed)[0, _CLASS]) * activations[0, channel]
    assert relative_error(found.maps[0, 0], (expected / expected.abs().max()).numpy()) < 1e-4


def test_kernel_components_are_those_of_pytorch_grad_cam(explainer: fastcam.Explainer, images: Any) -> None:
    """Up to their sign, which the decomposition leaves open."""
    network = _vgg_like()
    with torch.no_grad():
        # In double precision, so that theirs is the reference.
        activations = network[:5](images).double().numpy()
    projection = _peer("pytorch_grad_cam.utils.svd_on_activations")
    expected = projection.get_2d_projection_kernel(activations)
    found = explainer(images.numpy(), _CLASS, method="kpcacam", normalize="signed", size="layer").maps[:, 0]
    for ours, projected in zip(found, expected, strict=True):
        theirs = projected / np.abs(projected).max()
        assert min(np.abs(ours - theirs).max(), np.abs(ours + theirs).max()) < 1e-4


def test_refine_cam_is_the_product_over_layers_of_pytorch_grad_cam(images: Any, tmp_path: Path) -> None:
    """Before the peer's resizing, which is OpenCV's, and with layers of the same size."""
    nn = torch.nn
    torch.manual_seed(4)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4608, 5),
    ).eval()
    fastcam.export(network, tmp_path / "small.onnx", example_input=images[:1], gradients="full", layer=["1", "3"])
    found = fastcam.Explainer(tmp_path / "small.onnx", device="cpu")(
        images[:1].numpy(), _CLASS, method="refinecam", size="layer"
    )
    product = np.ones((_SIDE, _SIDE))
    for layer in (network[1], network[3]):
        with _peer("pytorch_grad_cam").GradCAMPlusPlus(model=network, target_layers=[layer]) as cam:
            cam(images[:1], [_target()])
            kept = cam.activations_and_grads
            activations, gradients = kept.activations[0].numpy(), kept.gradients[0].numpy()
            weights = cam.get_cam_weights(images[:1], layer, None, activations, gradients)
        # Their epsilon, 1e-6, is added to denominators of this size.
        single = np.maximum(np.einsum("c,chw->hw", weights[0], activations[0]), 0)
        product *= single / single.max()
    assert relative_error(found.maps[0, 0], product / product.max()) < 1e-2


def test_saliency_is_captums(explainer: fastcam.Explainer, images: Any) -> None:
    attributions = _peer("captum.attr").Saliency(_vgg_like()).attribute(images.clone(), target=_CLASS)
    expected = attributions.abs().max(dim=1).values.numpy()
    found = explainer(images.numpy(), _CLASS, method="saliency", normalize=None, size="layer").maps[:, 0]
    assert relative_error(found, expected) < 1e-5


def test_integrated_gradients_are_captums(explainer: fastcam.Explainer, images: Any) -> None:
    expected = (
        _peer("captum.attr")
        .IntegratedGradients(_vgg_like())
        .attribute(images, target=_CLASS, n_steps=50)
        .sum(dim=1)
        .numpy()
    )
    found = explainer(images.numpy(), _CLASS, method="integratedgradients", normalize="signed", size="layer").maps[:, 0]
    expected = expected / np.abs(expected).max(axis=(1, 2), keepdims=True)
    assert relative_error(found, expected) < 1e-4


def test_smooth_grad_is_the_mean_of_noisy_gradients(explainer: fastcam.Explainer, images: Any) -> None:
    """With the same noise: NumPy's generator, as the settings say."""
    found = _maps(explainer, images[:1], "smoothgrad", samples=5, noise=0.1, seed=7)
    image = images[:1].numpy()
    noise = np.random.default_rng(7).normal(0, 0.1 * (image.max() - image.min()), (5, *image.shape[1:]))
    noisy = torch.tensor((image + noise).astype(np.float32), requires_grad=True)
    _vgg_like()(noisy)[:, _CLASS].sum().backward()
    expected = noisy.grad.mean(dim=0).abs().max(dim=0).values.numpy()
    assert relative_error(found[0], expected) < 1e-4


def test_occlusion_is_captums(explainer: fastcam.Explainer, images: Any) -> None:
    """Windows of 5 pixels, 2 apart: the last ones end with the image."""
    occlusion = _peer("captum.attr").Occlusion(_vgg_like())
    expected = occlusion.attribute(images, sliding_window_shapes=(3, 5, 5), strides=(3, 2, 2), target=_CLASS)
    settings = {"window": 5 / _SIDE, "stride": 2 / 5}
    found = explainer(
        images.numpy(), _CLASS, method="occlusion", normalize="signed", size="layer", settings=settings
    ).maps[:, 0]
    expected = expected[:, 0].numpy()
    assert relative_error(found, expected / np.abs(expected).max(axis=(1, 2), keepdims=True)) < 1e-4


def test_guided_backpropagation_is_captums(explainer: fastcam.Explainer, images: Any) -> None:
    attributions = _peer("captum.attr").GuidedBackprop(_vgg_like()).attribute(images.clone(), target=_CLASS)
    expected = attributions.abs().max(dim=1).values.detach().numpy()
    assert relative_error(_maps(explainer, images, "guidedbackprop"), expected) < 1e-5


def test_guided_backpropagation_through_relu6_drops_negative_gradients(images: Any, tmp_path: Path) -> None:
    """By a ReLU6 of our own whose reverse pass is the paper's: captum knows only ReLU."""

    class Guided(torch.autograd.Function):  # type: ignore[misc, name-defined]  # torch has no types where lint runs
        @staticmethod
        def forward(context: Any, x: Any) -> Any:
            context.save_for_backward(x)
            return x.clamp(0, 6)

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            (x,) = context.saved_tensors
            return gradient.clamp(min=0) * ((x > 0) & (x < 6))

    network = _vgg_like()
    for place in (1, 4, 8):
        network[place] = torch.nn.ReLU6()
    # Large enough to be cut at 6.
    large = images * 40
    found = _maps(_explainer(network, tmp_path, images), large, "guidedbackprop")
    image = large.clone().requires_grad_()
    x = image
    for layer in network:
        x = Guided.apply(x) if isinstance(layer, torch.nn.ReLU6) else layer(x)
    x[:, _CLASS].sum().backward()
    assert relative_error(found, image.grad.abs().max(dim=1).values.numpy()) < 1e-5


def test_guided_grad_cam_is_captums(explainer: fastcam.Explainer, images: Any) -> None:
    network = _vgg_like()
    peer = _peer("captum.attr").GuidedGradCam(network, network[int(_LAYER)])
    expected = peer.attribute(images.clone(), target=_CLASS, interpolate_mode="bilinear").abs().max(dim=1).values
    assert relative_error(_maps(explainer, images, "guidedgradcam"), expected.detach().numpy()) < 1e-5


def test_networks_without_relu_have_no_guided_gradients(images: Any, tmp_path: Path) -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(1936, 5)
    )
    with pytest.raises(fastcam.ModelError, match="the network has no ReLU"):
        fastcam.export(network, tmp_path / "no.onnx", example_input=images[:1], evidence="guided_gradients")
    assert not list(tmp_path.iterdir())


def test_expected_gradients_follow_the_background(images: Any, tmp_path: Path) -> None:
    """Autograd at the points that the seed gives."""
    network = _vgg_like()
    background = torch.rand(3, 3, _SIDE, _SIDE, generator=torch.Generator().manual_seed(9)).numpy()
    explainer = _explainer(network, tmp_path, images, background=background)
    settings = {"samples": 7, "seed": 5}
    found = explainer(
        images[:1].numpy(), _CLASS, method="expectedgradients", normalize="signed", size="layer", settings=settings
    ).maps[0, 0]
    random = np.random.default_rng(5)
    order = np.concatenate([random.permutation(3) for _ in range(3)])[:7]
    shares = random.random(7)
    expected = torch.zeros(_SIDE, _SIDE)
    for number, share in zip(order, shares, strict=True):
        start = torch.tensor(background[number])
        point = (start + float(share) * (images[0] - start)).requires_grad_()
        network(point[None])[0, _CLASS].backward()
        expected += ((images[0] - start) * point.grad).sum(dim=0)
    assert relative_error(found, (expected / expected.abs().max()).numpy()) < 1e-4


def test_expected_gradients_add_up_to_the_difference_from_the_background(images: Any, tmp_path: Path) -> None:
    """Their sum is the score minus its mean over the background (Erion et al. 2021, section 2), within their noise."""
    network = _vgg_like()
    background = torch.rand(4, 3, _SIDE, _SIDE, generator=torch.Generator().manual_seed(9)) - 0.4
    explainer = _explainer(network, tmp_path, images, background=background.numpy())
    evidence, _ = explainer.evidence(images[:1].numpy(), _CLASS)
    found = METHODS["expectedgradients"].rerun(evidence, {"samples": 4000, "seed": 0}).sum()
    with torch.no_grad():
        expected = float(network(images[:1])[0, _CLASS] - network(background)[:, _CLASS].mean())
    assert found == pytest.approx(expected, rel=0.02)


def test_expected_gradients_need_a_background(explainer: fastcam.Explainer, images: Any) -> None:
    with pytest.raises(
        fastcam.ArgumentError, match=r"compares the image with a background.*pass background= to Explainer"
    ):
        explainer(images.numpy(), _CLASS, method="expectedgradients")


def _scaled_sum(values: Any) -> Any:
    """psi of FullGrad for one image: magnitudes scaled to 0..1 over channels and pixels, enlarged and added up."""
    sizes = values.abs()
    sizes = (sizes - sizes.min()) / (sizes.max() - sizes.min())
    large = torch.nn.functional.interpolate(sizes[None], size=(_SIDE, _SIDE), mode="bilinear")
    return large[0].sum(dim=0)


def test_full_gradients_add_up_to_the_score_and_make_the_map(images: Any, tmp_path: Path) -> None:
    """Input times gradient, and each bias times its gradient (Srinivas and Fleuret 2019, eq. 2 and 6), by autograd.

    The batch normalisation is folded into the convolution before it when the model is exported: its bias is one.
    """
    nn = torch.nn
    network = _vgg_like()
    network[3] = nn.Sequential(nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)).eval()
    norm = network[3][1]
    for values in (norm.running_mean, norm.weight.data, norm.bias.data):
        values.copy_(torch.randn(10) * 0.3 + 0.5)
    explainer = _explainer(network, tmp_path, images)
    found = _maps(explainer, images, "fullgrad")
    for number, image in enumerate(images):
        x = image[None].clone().requires_grad_()
        kept = []
        value = x
        for layer in network:
            value = layer(value)
            if isinstance(layer, nn.Conv2d | nn.Sequential | nn.Linear):
                value.retain_grad()
                kept.append((layer, value))
        value[0, _CLASS].backward()
        shift = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
        products = [x.grad[0] * x.detach()[0]]
        total = products[0].sum()
        for layer, output in kept:
            bias = (shift if isinstance(layer, nn.Sequential) else layer.bias).detach()
            product = output.grad[0] * bias.reshape(-1, *[1] * (output.ndim - 2))
            total += product.sum()
            products += [product] if product.ndim == 3 else []
        assert float(total) == pytest.approx(float(value[0, _CLASS]), rel=1e-4)
        assert len(products) == 3
        expected = sum(_scaled_sum(product) for product in products)
        assert relative_error(found[number], expected.numpy()) < 1e-4


def _smooth_head() -> Any:
    """A head with curvature: convolution, batch normalisation, pooling, SiLU, GELU, and a softmax in the middle."""
    nn = torch.nn
    torch.manual_seed(5)
    return nn.Sequential(
        *list(_averaged())[:5],
        nn.Conv2d(10, 6, 3),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 12),
        nn.GELU(),
        nn.LayerNorm(12),
        nn.Linear(12, 8),
        nn.Softmax(dim=1),
        nn.Linear(8, 5),
    ).eval()


@pytest.mark.parametrize("build", [_smooth_head, _vgg_like, _averaged])
def test_shapley_cam_is_that_of_pytorch_grad_cam(build: Any, images: Any, tmp_path: Path) -> None:
    """In double precision on their side: products of Hessians lose digits."""
    network = build()
    fastcam.export(network, tmp_path / "m.onnx", example_input=images[:1], evidence="curvatures", layer=_LAYER)
    explainer = fastcam.Explainer(tmp_path / "m.onnx", device="cpu")
    targets = [_CLASS, 4]
    options: Any = {"size": "layer", "normalize": "signed"}
    found = explainer(images.numpy() * 3, targets, method="shapleycam", **options).maps
    plain = explainer(images.numpy() * 3, targets, **options).maps
    network = network.double()
    layer = network[int(_LAYER)]
    for column, target in enumerate(targets):
        with _peer("pytorch_grad_cam").ShapleyCAM(model=network, target_layers=[layer]) as cam:
            wanted = [_peer("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(target)] * 2
            cam.outputs = cam.activations_and_grads(images.double() * 3)
            loss = sum(score(output) for score, output in zip(wanted, cam.outputs, strict=True))
            network.zero_grad()
            torch.autograd.grad(loss, cam.activations_and_grads.activations, retain_graph=True, create_graph=True)
            activations = cam.activations_and_grads.activations[0]
            (gradients,) = torch.autograd.grad(loss, activations, retain_graph=True, create_graph=True)
            weights = cam.get_cam_weights(None, layer, wanted, activations, gradients)
            expected = np.einsum("nc,nchw->nhw", weights, activations.detach().numpy())
        expected = expected / np.abs(expected).max(axis=(1, 2), keepdims=True)
        assert relative_error(found[:, column], expected) < 1e-4
    # A head of ReLUs and dense layers has none.
    assert (relative_error(found, plain) > 1e-2) == (build is _smooth_head)


def test_shapley_cam_explains_the_first_layer(images: Any, tmp_path: Path) -> None:
    fastcam.export(
        _smooth_head(), tmp_path / "m.onnx", example_input=images[:1], evidence="curvatures", layer=["4", "1"]
    )
    explainer = fastcam.Explainer(tmp_path / "m.onnx", device="cpu")
    with pytest.raises(fastcam.ArgumentError, match="explains the first layer of a file"):
        explainer(images.numpy(), layer="1", method="shapleycam")
