import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.train_common import trained_checkpoint

from fastseg.crf import CRFOptions, dense_crf
from fastseg.training import checkpoint, networks, pictures
from fastseg.training.instance_wise import COMBINE, Box, InstanceOptions
from fastseg.training.segmenter import Segmenter

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")

from support.folders import write_scene  # noqa: E402


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint that tells some digits from the background."""
    return trained_checkpoint(tmp_path_factory.mktemp("run"), steps=20)


def network(weights):
    """The network of the checkpoint, in evaluation mode."""
    model = networks.build_model("segnet-basic", 11, 0.125)
    model.load_state_dict(checkpoint.load_checkpoint(weights)["model"])
    return model.eval()


def test_the_segmenter_applies_the_network_to_the_normalised_image(weights, tmp_path):
    image = pictures.read_image(write_scene(tmp_path, (40, 48))[0])
    segmenter = Segmenter(weights)
    labels = segmenter(image)
    assert labels.shape == (40, 48) and labels.dtype == np.uint8
    small = pictures.to_tensor(image.resize((32, 32), Image.Resampling.BILINEAR))
    with torch.no_grad():
        logits = network(weights)((small[None] - 0.5) / 0.25)
    want = F.interpolate(logits, (40, 48), mode="bilinear")[0].argmax(0)
    assert np.array_equal(labels, want.numpy())
    assert not np.array_equal(segmenter(image, size=(40, 48)), labels)


def test_instance_wise_prediction_combines_the_probabilities_of_proposals(weights, tmp_path):
    segmenter, image = Segmenter(weights), pictures.read_image(write_scene(tmp_path, (60, 80))[0])
    options = InstanceOptions(min_side=1)
    whole = segmenter.instance_wise(image, [Box(0, 0, 80, 60)], options)
    assert whole.shape == (60, 80) and whole.dtype == np.uint8
    seen = F.interpolate(pictures.to_tensor(image)[None], (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = network(weights)((seen - 0.5) / 0.25)
        probabilities = F.interpolate(logits.softmax(1), (60, 80), mode="bilinear")
    assert np.array_equal(whole, probabilities[0].argmax(0).numpy()) and len(np.unique(whole)) > 1
    for combine in COMBINE:  # pixels in no box are predicted from the whole image
        part = segmenter.instance_wise(image, [Box(-10, 20, 30, 30)], InstanceOptions(min_side=1, combine=combine))
        assert np.array_equal(part[:, 20:], segmenter(image)[:, 20:])
        assert not np.array_equal(part[20:50, :20], segmenter(image)[20:50, :20])
    with torch.no_grad():
        segmenter.model.classifier.bias -= 100  # changes no probability
    assert np.array_equal(segmenter.instance_wise(image, [Box(0, 0, 80, 60)], options), whole)


def test_a_crf_refines_the_labels_at_the_size_of_the_image(weights, tmp_path):
    """Also instance-wise, where pixels in no proposal start from the whole image's probabilities."""
    image, options = pictures.read_image(write_scene(tmp_path, (40, 48))[0]), CRFOptions(bilateral=(3.0, 10.0, 10.0))
    segmenter, picture = Segmenter(weights), torch.from_numpy(np.array(image)).movedim(-1, 0)[None]
    with torch.no_grad():
        logits = F.interpolate(
            segmenter.logits(pictures.to_tensor(image.resize((32, 32), 2))[None]), (40, 48), mode="bilinear"
        )
    want = dense_crf(logits, picture, options)[0].argmax(0).numpy()
    assert np.array_equal(segmenter(image, crf=options), want) and not np.array_equal(segmenter(image), want)
    whole = InstanceOptions(size=(32, 32), min_side=8)
    silent = CRFOptions(gaussian=None, bilateral=None)
    for boxes in ([Box(0, 0, 48, 40)], [Box(4, 6, 20, 24)]):
        plain = segmenter.instance_wise(image, boxes, whole)
        assert np.array_equal(segmenter.instance_wise(image, boxes, whole, crf=silent), plain)
        assert not np.array_equal(segmenter.instance_wise(image, boxes, whole, crf=options), plain)
