"""dense_crf: known values, the exact reference, gradients, invariances, the permutohedral package, arguments."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.crf_common import BACKENDS, picture

import fastseg
from fastseg.crf import PRESETS, CRFOptions, DenseCRF, dense_crf, mean_field_exact

# Minus the logits of 3 classes at 2 pixels, and their mean field by an independent implementation: the pixels are 0.8
# apart in units of sigma, the weight is 1.5.
ENERGIES = [[0.2, 1.0], [1.1, 0.3], [0.7, 0.9]]
KNOWN = [
    ("raw", 1, [[0.553474, 0.247458], [0.18907, 0.522871], [0.257455, 0.229671]]),
    ("raw", 10, [[0.686207, 0.336669], [0.153899, 0.498025], [0.159894, 0.165306]]),
    ("symmetric", 10, [[0.552244, 0.256038], [0.193593, 0.514941], [0.254163, 0.229021]]),
]


@pytest.mark.parametrize("normalise, steps, known", KNOWN)
@pytest.mark.parametrize("infer", [dense_crf, mean_field_exact])
def test_two_pixels(infer, normalise, steps, known):
    logits = -torch.tensor(ENERGIES).view(1, 3, 1, 2)
    options = CRFOptions(gaussian=(1.5, 1 / 0.8), bilateral=None, steps=steps, normalise=normalise)
    q = infer(logits, None, options).softmax(1)
    torch.testing.assert_close(q.view(3, 2).float(), torch.tensor(known), rtol=0, atol=1e-6)


@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize("normalise", ["symmetric", "after", "raw"])
@pytest.mark.parametrize("radius", [None, 2.0])
def test_equals_the_exact_reference(normalise, self_term, radius):
    """In float64, on a batch of two different pictures."""
    logits, image = torch.randn(2, 4, 9, 11, dtype=torch.float64), picture(2, 3, 9, 11)
    options = CRFOptions((0.7, 1.5), (0.9, 3.0, 20.0), 4, normalise, self_term, radius)
    found, exact = dense_crf(logits, image, options), mean_field_exact(logits, image, options)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found, logits.log_softmax(1), atol=0.1)  # it does something


@BACKENDS
def test_backends_agree_with_the_exact_reference(backend, device):
    logits, image = torch.randn(1, 5, 8, 18, device=device), picture(1, 3, 8, 18, device=device)
    options = CRFOptions((1.0, 1.0), (2.0, 2.0, 20.0), steps=3)
    with fastseg.backend(backend):
        found = dense_crf(logits, image, options)
    exact = mean_field_exact(logits, image, options)
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_gradients_of_logits_and_weights():
    logits = torch.randn(1, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (0.8, 1.2)]
    image = picture(1, 3, 6, 7)

    def infer(logits, gaussian, bilateral):
        return dense_crf(logits, image, CRFOptions((gaussian, 1.0), (bilateral, 2.0, 30.0), steps=2))

    assert torch.autograd.gradcheck(infer, (logits, *weights))


def test_invariances():
    logits, image, order = torch.randn(1, 4, 7, 8), picture(1, 3, 7, 8), torch.tensor([2, 0, 3, 1])
    options = CRFOptions((1.0, 1.0), (1.0, 3.0, 20.0), steps=3)
    found = dense_crf(logits, image, options)
    torch.testing.assert_close(dense_crf(logits[:, order], image, options), found[:, order])
    torch.testing.assert_close(dense_crf(logits + 5, image, options), found)  # a constant says nothing
    flat = dense_crf(torch.zeros(1, 4, 7, 8), torch.full((1, 3, 7, 8), 128.0), options).softmax(1)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.25))
    silent = CRFOptions((0.0, 1.0), (0.0, 3.0, 20.0), steps=3)
    torch.testing.assert_close(dense_crf(logits, image, silent), logits.log_softmax(1))
    torch.testing.assert_close(dense_crf(logits, image, CRFOptions(steps=0)), logits.log_softmax(1))


def test_labels_follow_the_colours():
    """Noisy logits of a picture of two colours: the CRF's labels are those of the picture."""
    truth = torch.zeros(1, 16, 20, dtype=torch.long)
    truth[:, 4:12, 6:15] = 1
    image = (60 + 120 * truth[:, None] + torch.randn(1, 3, 16, 20) * 3).to(torch.uint8)
    logits = F.one_hot(truth, 2).movedim(-1, 1).float() + torch.randn(1, 2, 16, 20)
    before = (logits.argmax(1) == truth).float().mean()
    after = (dense_crf(logits, image, CRFOptions((1.0, 1.0), (5.0, 5.0, 20.0))).argmax(1) == truth).float().mean()
    assert before < 0.85 and after > 0.99


def test_the_module_trains_its_weights():
    logits, image = torch.randn(1, 3, 6, 7), picture(1, 3, 6, 7)
    crf = DenseCRF(gaussian=(1, 1), bilateral=(2, 2, 20), steps=2)
    options = CRFOptions((1.0, 1.0), (2.0, 2.0, 20.0), steps=2)
    torch.testing.assert_close(crf(logits, image), dense_crf(logits, image, options))
    before, optimizer = dict(crf.state_dict()), torch.optim.SGD(crf.parameters(), 0.1)
    before = {name: value.clone() for name, value in before.items()}
    F.cross_entropy(crf(logits, image), torch.zeros(1, 6, 7, dtype=torch.long)).backward()
    optimizer.step()
    assert set(before) == {"gaussian_weight", "bilateral_weight"}
    assert all(not torch.equal(value, before[name]) for name, value in crf.state_dict().items())
    alone = DenseCRF(bilateral=None)
    assert alone(logits).shape == logits.shape and list(alone.state_dict()) == ["gaussian_weight"]


def test_half_precision_logits_are_computed_in_float32():
    logits, image = torch.randn(1, 3, 6, 7), picture(1, 3, 6, 7)
    found = dense_crf(logits.bfloat16(), image)
    assert found.dtype == torch.bfloat16 and torch.equal(found, dense_crf(logits.bfloat16().float(), image).bfloat16())


@pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf is not installed (pip install pydensecrf2)"
)
@pytest.mark.parametrize("preset", [CRFOptions(bilateral=(5, 20, 13)), CRFOptions(bilateral=(10, 20, 20), steps=5)])
def test_labels_are_those_of_the_permutohedral_package(preset):
    """At least 98 % of them; its lattice approximates what is exact here, best where colours come in patches."""
    from pydensecrf import densecrf

    height, width, classes = 40, 56, 6
    image = picture(1, 3, height, width, patch=8, mode="nearest")
    logits = F.interpolate(torch.randn(1, classes, 6, 8) * 3, (height, width), mode="bilinear")
    crf = densecrf.DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(np.ascontiguousarray(-logits[0].log_softmax(0).flatten(1).numpy()))
    crf.addPairwiseGaussian(sxy=preset.gaussian[1], compat=preset.gaussian[0])
    weight, sigma, sigma_color = preset.bilateral
    rgb = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    crf.addPairwiseBilateral(sxy=sigma, srgb=sigma_color, rgbim=rgb, compat=weight)
    theirs = torch.from_numpy(np.array(crf.inference(preset.steps))).view(classes, height, width)
    ours = dense_crf(logits, image, preset)[0].softmax(0)
    assert (ours.argmax(0) == theirs.argmax(0)).float().mean() >= 0.98
    assert (ours - theirs).abs().mean() <= 0.005


LOGITS = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: dense_crf(torch.zeros(2, 3, 4), None), r"\(N, K, H, W\), but is \(2, 3, 4\)"),
        (lambda: dense_crf(torch.zeros(1, 1, 3, 4), None), "at least 2 classes, but have shape"),
        (lambda: dense_crf(LOGITS, None), "image must be given for the bilateral kernel"),
        (lambda: dense_crf(LOGITS, torch.zeros(1, 3, 4, 3)), r"width of the logits, .* has shape \(1, 3, 4, 3\)"),
        (lambda: dense_crf(LOGITS, torch.zeros(3, 3, 4)), r"\(N, channels, H, W\), but is \(3, 3, 4\)"),
        (lambda: CRFOptions(gaussian=(1, 2, 3)), r"gaussian must be \(weight, sigma\)"),
        (lambda: CRFOptions(bilateral=(1, 2)), r"bilateral must be \(weight, sigma of positions"),
        (lambda: CRFOptions(bilateral=(1, 2, -3)), "positive standard deviations"),
        (lambda: CRFOptions(gaussian=(torch.ones(2), 3)), "weight must have one element"),
        (lambda: CRFOptions(normalise="before"), "symmetric, after, raw, but is 'before'"),
        (lambda: CRFOptions(steps=-1), "steps must not be negative"),
        (lambda: CRFOptions(radius=0), "radius must be a positive number or None"),
        (lambda: mean_field_exact(torch.zeros(1, 2, 100, 100), None, PRESETS["paper"]), "image must be given"),
        (
            lambda: mean_field_exact(torch.zeros(1, 2, 100, 100), None, CRFOptions(bilateral=None)),
            "at most 8192 pixels, but have 100x100",
        ),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
