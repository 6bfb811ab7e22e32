"""softmax_moments against the softmax of all passes in float64: chunks, layouts, certain pixels, arguments."""

import pytest
import torch
from support.cross_entropy_common import BACKENDS, LAYOUTS

import fastseg
from fastseg import functional as FS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def exact(logits):
    p = logits.double().softmax(2)
    entropy = torch.special.entr(p).sum(2)
    total = torch.special.entr(p.mean(0)).sum(1)
    return p.mean(0), p.var(0, unbiased=False), total, total - entropy.mean(0)


def found(moments):
    return moments.mean, moments.variance, moments.predictive_entropy, moments.mutual_information


@BACKENDS
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_any_size_give_the_moments_of_all_passes(dtype, layout, backend, device):
    passes = [
        torch.randn(2, 5, 6, 7, device=device).mul(3).to(dtype).contiguous(memory_format=layout) for _ in range(7)
    ]
    logits = torch.stack(passes)
    with fastseg.backend(backend):
        for chunk in (1, 3, 7):
            state = None
            for part in logits.split(chunk):
                state = FS.softmax_moments(part, state)
            assert state.count == 7 and state.mean.dtype == torch.float32
            for got, want in zip(found(state), exact(logits), strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@BACKENDS
def test_the_variance_of_certain_pixels_keeps_its_digits(backend, device):
    """Sums of squares in float32 are wrong by more than the variance here, 4e-13, and often negative."""
    logits = torch.tensor([0.0, 14.5], device=device).view(1, 1, 2, 1, 1).repeat(20, 1, 1, 4, 4)
    logits += 0.8 * torch.randn_like(logits)
    with fastseg.backend(backend):
        state = FS.softmax_moments(logits[11:], FS.softmax_moments(logits[:11]))
    variance = exact(logits)[1]
    assert variance.max() < 1e-10 and state.variance.min() >= 0
    # The softmax itself is known to 6e-8 in float32 near 1, and exactly near 0.
    torch.testing.assert_close(state.variance[:, 0].double(), variance[:, 0], rtol=1e-4, atol=0)
    p = logits.softmax(2)
    naive = p.square().mean(0) - p.mean(0).square()
    assert (naive[:, 1] - variance[:, 1]).abs().max() > 1e3 * (state.variance[:, 1] - variance[:, 1]).abs().max()


@BACKENDS
def test_equal_passes_have_no_variance_and_no_information(backend, device):
    logits = torch.randn(1, 1, 4, 3, 5, device=device).repeat(4, 1, 1, 1, 1)
    logits[:, :, 2] = -torch.inf  # an impossible class
    with fastseg.backend(backend):
        state = FS.softmax_moments(logits)
    assert state.variance.max() < 1e-13 and state.mutual_information.max() < 1e-6
    torch.testing.assert_close(state.mean, logits[0].softmax(1))


def test_what_the_kernels_do_not_support_falls_back_to_torch():
    with fastseg.backend("triton"), pytest.raises(NotImplementedError, match="300 classes"):
        FS.softmax_moments(torch.zeros(1, 1, 300, 2, 2))
    logits = torch.randn(3, 1, 300, 2, 2, dtype=torch.float64)
    for got, want in zip(found(FS.softmax_moments(logits)), exact(logits), strict=True):
        torch.testing.assert_close(got, want)
    assert FS.softmax_moments(torch.zeros(1, 0, 2, 3, 4)).mean.shape == (0, 2, 3, 4)


LOGITS = torch.zeros(2, 1, 3, 4, 5)


@pytest.mark.parametrize(
    "args, error, words",
    [
        ((LOGITS[0],), ValueError, r"\(T, N, K, H, W\).* but has shape \(1, 3, 4, 5\)"),
        ((LOGITS[:0],), ValueError, "at least one pass"),
        ((LOGITS.long(),), TypeError, "floating-point, but is of torch.int64"),
        ((LOGITS, 3), TypeError, "SoftmaxMoments or None, but is of type int"),
        ((LOGITS, FS.softmax_moments(LOGITS[..., :3])), ValueError, r"shape \(1, 3, 4, 5\).* shape \(1, 3, 4, 3\)"),
        ((LOGITS.double(), FS.softmax_moments(LOGITS)), ValueError, "torch.float64 .* torch.float32"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_bad_arguments(args, error, words):
    with pytest.raises(error, match=words):
        FS.softmax_moments(*args)
