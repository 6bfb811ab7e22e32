"""Monte-Carlo dropout: which layers change, exact moments, the common part, seeds; Bayesian SegNet."""

import itertools

import pytest
import torch
from torch import nn

import fastseg
from fastseg.functional import softmax_moments
from fastseg.models import BayesianSegNet, BayesianSegNetBasic, SegNet, SegNetBasic
from fastseg.uncertainty import dropout_on, measure, sample

BAYESIAN = pytest.mark.parametrize("bayesian, plain", [(BayesianSegNet, SegNet), (BayesianSegNetBasic, SegNetBasic)])


class Classifier(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(p), nn.Conv2d(8, 4, 1))

    def forward(self, x):
        return self.layers(x)


def test_only_dropout_samples_and_batch_norm_keeps_its_statistics():
    model, x = Classifier(0.5).eval(), torch.randn(2, 3, 4, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with dropout_on(model):
        assert [m.training for m in model.layers] == [False, False, True, False]
        assert not torch.equal(model(x), model(x))
    assert not any(m.training for m in model.modules())
    sample(model, x, passes=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), dropout_on(model):
        _ = 1 / 0
    assert not model.layers[2].training


def test_without_dropout_the_mean_is_the_prediction():
    model, x = Classifier(0.0).eval(), torch.randn(1, 3, 4, 5)
    samples = sample(model, x, passes=5, chunk=2)
    torch.testing.assert_close(samples.mean, model(x).softmax(1))
    assert samples.count == 5 and samples.variance.max() < 1e-12 and samples.mutual_information.max() < 1e-6


def test_samples_approach_the_moments_over_all_masks():
    """A linear head behind dropout of 8 features: all 2^8 masks, each once, give the exact moments."""
    model, x = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, 3, 1)).eval(), torch.randn(1, 8, 1, 1)
    masks = torch.tensor(list(itertools.product((0.0, 2.0), repeat=8)))
    with torch.no_grad():
        every = softmax_moments(torch.stack([model[1](x * mask.view(1, 8, 1, 1)) for mask in masks]))
    drawn = sample(model, x, passes=4000, chunk=1000, seed=0)
    torch.testing.assert_close(drawn.mean, every.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.variance, every.variance, rtol=0.1, atol=1e-3)
    torch.testing.assert_close(drawn.mutual_information, every.mutual_information, rtol=0.1, atol=1e-3)


def test_every_image_and_every_pass_has_its_own_mask():
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(6, 3, 1)).eval()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    sample(model, torch.ones(2, 6, 3, 3), passes=4, chunk=2)
    assert [len(batch) for batch in seen] == [4, 4]
    assert len({tuple(one.flatten().tolist()) for batch in seen for one in batch}) == 8


def test_a_seed_repeats_the_samples_and_leaves_the_random_state():
    model, x = Classifier(0.5).eval(), torch.randn(1, 3, 4, 5)
    state = torch.get_rng_state()
    first, second, other = (sample(model, x, passes=6, seed=seed).mean for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@BAYESIAN
def test_bayesian_segnet_is_segnet_with_dropout(bayesian, plain):
    """The number of parameters of the authors' files, their names, and the same function when dropout is off."""
    count = {BayesianSegNet: 29_449_355, BayesianSegNetBasic: 1_416_587}[bayesian]
    with torch.device("meta"):
        assert sum(p.numel() for p in bayesian().parameters()) == count
    ours, theirs, x = bayesian(width=0.1).eval(), plain(width=0.1).eval(), torch.randn(2, 3, 37, 45)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    fresh = bayesian(width=0.1)
    beta = 0.0 if bayesian is BayesianSegNet else 0.001
    norms = [m.bias.detach() for m in fresh.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(torch.equal(bias, torch.full_like(bias, beta)) for bias in norms)


@BAYESIAN
def test_dropout_is_where_the_authors_have_it(bayesian, plain):
    """Sizes of the dropped maps: behind pools 3, 4 (and 5), and in front of unpools 4, 3 (and 2)."""
    model, sizes = bayesian(width=0.02), []
    model.dropout.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[2:])))
    model.eval()(torch.randn(1, 3, 64, 96))
    deep = [(8, 12), (4, 6), (2, 3), (4, 6), (8, 12), (16, 24)]
    assert sizes == (deep if bayesian is BayesianSegNet else [(8, 12), (4, 6), (8, 12), (16, 24)])


@BAYESIAN
def test_the_part_in_front_of_the_first_dropout_is_computed_once(bayesian, plain):
    """With the same results as when it is computed in every pass."""
    model, x, calls = bayesian(width=0.02).eval(), torch.randn(2, 3, 32, 48), []
    first = model.encoder[0].register_forward_hook(lambda *args: calls.append(len(args[1][0])))
    once = sample(model, x, passes=4, chunk=2, seed=3)
    assert calls == [2]
    first.remove()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    each = sample(Whole().eval(), x, passes=4, chunk=2, seed=3)
    for a, b in zip(once, each, strict=True):
        torch.testing.assert_close(a, b)
    assert once.variance.max() > 1e-4


def test_the_models_train():
    model = BayesianSegNetBasic(num_classes=3, width=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    labels = torch.zeros(2, 24, 32, dtype=torch.long)
    labels[:, 6:18, 8:24] = 1
    x = torch.randn(2, 3, 24, 32) * 0.3 + labels[:, None]
    losses = []
    for _ in range(12):
        loss = fastseg.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_measures():
    samples = sample(Classifier(0.5).eval(), torch.randn(2, 3, 4, 5), passes=5)
    assert torch.equal(measure(samples, "variance"), samples.variance.mean(1))
    assert torch.equal(measure(samples, "entropy"), samples.predictive_entropy)
    assert torch.equal(measure(samples, "information"), samples.mutual_information)
    assert (samples.mutual_information <= samples.predictive_entropy).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: sample(nn.Conv2d(3, 2, 1).eval(), torch.zeros(1, 3, 2, 2)), "dropout layer, .* Conv2d has none"),
        (lambda: sample(Classifier(0.5), torch.zeros(1, 3, 2, 2)), "evaluation mode .* is in training mode"),
        (lambda: sample(Classifier(0.5).eval(), torch.zeros(1, 3, 2, 2), passes=0), "passes must be at least 1"),
        (lambda: sample(Classifier(0.5).eval(), torch.zeros(1, 3, 2, 2), chunk=0), "chunk must be at least 1"),
        (
            lambda: measure(softmax_moments(torch.zeros(1, 1, 2, 2, 2)), "bald"),
            "variance, entropy, information, but is",
        ),
        (lambda: BayesianSegNet(dropout=1.5, width=0.02), "dropout probability"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
