"""Networks of other packages, with random weights: a swap keeps the results, and the report is exact.

Skipped where a package is not installed; tests/support/packages.txt says how to run them all.
"""

import collections
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from support import packages

import fastseg
from fastseg.verification import equivalence

POOL, CONV, SEQUENCE = "max_pool2d", "conv_transpose2d", "batch_norm_relu"
CLASSES = 5


@dataclass(frozen=True)
class Network:
    """One network: its package, how it is built, and what swap, swap_functions and a compiled graph find in it.

    swapped, left: the number of layers that swap does and does not swap, by op and by (class, reason). calls: the
    number of functional calls. compiled: what is put into the first graph. labels: whether it takes labels, with the
    argument names of Hugging Face. interpreted: whether it is small enough to run on the interpreter.
    """

    package: str
    build: Callable[..., torch.nn.Module]
    swapped: dict[str, int]
    left: dict[tuple[str, str], int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    compiled: dict[str, int] = field(default_factory=dict)
    labels: bool = False
    size: int = 64
    interpreted: bool = False

    def model(self):
        return self.build(packages.need(self.package))

    def inputs(self):
        picture = torch.randn(2, 3, self.size, self.size)
        if not self.labels:
            return (picture,), {}
        return (), {"pixel_values": picture, "labels": torch.randint(CLASSES, (2, self.size, self.size))}


def smp(name, **more):
    return lambda package: getattr(package, name)("resnet18", encoder_weights=None, classes=CLASSES, **more)


def torchvision(name):
    def build(package):
        from torchvision.models import segmentation

        return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES)

    return build


def monai(name, **arguments):
    def build(package):
        from monai.networks import nets

        return getattr(nets, name)(spatial_dims=2, in_channels=3, out_channels=CLASSES, **arguments)

    return build


def segformer(transformers):
    config = transformers.SegformerConfig(
        num_labels=CLASSES, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def upernet(transformers):
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=CLASSES, auxiliary_channels=8, auxiliary_in_channels=24
    )
    return transformers.UperNetForSemanticSegmentation(config)


def beit(transformers):
    config = transformers.BeitConfig(
        image_size=64, patch_size=16, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        out_indices=[1, 2, 3, 4], num_labels=CLASSES,
    )  # fmt: skip
    return transformers.BeitForSemanticSegmentation(config)


def dpt(transformers):
    config = transformers.DPTConfig(
        image_size=64, patch_size=16, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.DPTForSemanticSegmentation(config)


def mask2former(transformers):
    backbone = transformers.SwinConfig(
        image_size=64, embed_dim=12, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=5,
        num_labels=CLASSES,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config)


ASPP = {("ASPPPooling", "is a subclass with its own forward"): 1}
SMP, HF, TV = "segmentation_models_pytorch", "transformers", "torchvision"
SMALL = {"decoder_channels": (16, 8, 8, 8, 8)}
NETWORKS = {
    "smp.Unet": Network(
        SMP, smp("Unet", **SMALL), {POOL: 1, SEQUENCE: 10}, calls={POOL: 1}, compiled={POOL: 1, "batch_norm_relu": 19},
        interpreted=True, size=32,
    ),
    "smp.UnetPlusPlus": Network(SMP, smp("UnetPlusPlus"), {POOL: 1, SEQUENCE: 22}, calls={POOL: 1}),
    "smp.MAnet": Network(SMP, smp("MAnet"), {POOL: 1, SEQUENCE: 18}, calls={POOL: 1}),
    "smp.Linknet": Network(
        SMP, smp("Linknet"), {POOL: 1, CONV: 5, SEQUENCE: 15}, calls={POOL: 1, CONV: 5},
        compiled={POOL: 1, CONV: 5, "batch_norm_relu": 24, "input_bias": 5},
    ),
    "smp.FPN": Network(SMP, smp("FPN"), {POOL: 1}, calls={POOL: 1}, compiled={POOL: 1, "batch_norm_relu": 9}),
    "smp.PSPNet": Network(SMP, smp("PSPNet"), {POOL: 1, SEQUENCE: 4}, calls={POOL: 1}),
    "smp.DeepLabV3Plus": Network(
        SMP, smp("DeepLabV3Plus"), {POOL: 1, SEQUENCE: 8}, ASPP, calls={POOL: 1},
        compiled={POOL: 1, "batch_norm_relu": 18},
    ),
    "smp.UPerNet": Network(
        SMP, smp("UPerNet"), {POOL: 1, SEQUENCE: 12}, calls={POOL: 1}, compiled={POOL: 1, "batch_norm_relu": 21}
    ),
    "smp.Segformer": Network(
        SMP, smp("Segformer"), {POOL: 1, SEQUENCE: 1}, calls={POOL: 1}, compiled={POOL: 1, "batch_norm_relu": 10}
    ),
    "transformers.Segformer": Network(
        HF, segformer, {}, calls={"cross_entropy": 1}, labels=True,
        compiled={"batch_norm_relu": 1, "upsample_cross_entropy": 1},
    ),
    "transformers.UperNet": Network(
        HF, upernet, {POOL: 1}, calls={POOL: 1, "cross_entropy": 2}, labels=True, interpreted=True,
        compiled={POOL: 1, "batch_norm_relu": 22, "cross_entropy": 1, "upsample_cross_entropy": 1},
    ),
    "transformers.Beit": Network(
        HF, beit, {POOL: 1, CONV: 3}, calls={POOL: 1, CONV: 3, "cross_entropy": 2}, labels=True,
        compiled={POOL: 1, CONV: 3, "batch_norm_relu": 13, "upsample_cross_entropy": 2},
    ),
    "transformers.DPT": Network(
        HF, dpt, {CONV: 2, SEQUENCE: 2}, calls={CONV: 2, "cross_entropy": 2}, labels=True,
        compiled={CONV: 2, "batch_norm_relu": 2, "upsample_cross_entropy": 2},
    ),
    "transformers.Mask2Former": Network(HF, mask2former, {}),
    "torchvision.fcn": Network(
        TV, torchvision("fcn_resnet50"), {POOL: 1, SEQUENCE: 1}, calls={POOL: 1},
        compiled={POOL: 1, "batch_norm_relu": 34},
    ),
    "torchvision.deeplabv3": Network(
        TV, torchvision("deeplabv3_resnet50"), {POOL: 1, SEQUENCE: 6}, ASPP, calls={POOL: 1},
        compiled={POOL: 1, "batch_norm_relu": 40},
    ),
    "torchvision.lraspp": Network(TV, torchvision("lraspp_mobilenet_v3_large"), {SEQUENCE: 12}),
    "monai.UNet": Network(
        "monai", monai("UNet", channels=(8, 16, 32), strides=(2, 2), num_res_units=2), {CONV: 2}, calls={CONV: 2}
    ),
    "monai.BasicUNet": Network(
        "monai", monai("BasicUNet", features=(8, 8, 16, 32, 32, 8)), {POOL: 4, CONV: 4}, calls={POOL: 4, CONV: 4},
        interpreted=True, size=32,
    ),
    "monai.DynUNet": Network(
        "monai", monai("DynUNet", kernel_size=[3] * 3, strides=[1, 2, 2], upsample_kernel_size=[2, 2]), {CONV: 2},
        calls={CONV: 2},
    ),
    "monai.AttentionUnet": Network(
        "monai", monai("AttentionUnet", channels=(8, 16, 32), strides=(2, 2)), {CONV: 2}, calls={CONV: 2}
    ),
    "monai.SwinUNETR": Network("monai", monai("SwinUNETR", feature_size=12), {CONV: 5}, calls={CONV: 5}),
    "timm.resnet18": Network(
        "timm", lambda timm: timm.create_model("resnet18", num_classes=CLASSES), {POOL: 1}, calls={POOL: 1}
    ),
    "timm.vgg11_bn": Network(
        "timm", lambda timm: timm.create_model("vgg11_bn", num_classes=CLASSES), {POOL: 5, SEQUENCE: 1},
        calls={POOL: 5},
    ),
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_swap_keeps_the_results_and_the_report_is_exact(network, training):
    model = network.model().train(training)
    inputs, named = network.inputs()
    keys, plain = list(model.state_dict()), equivalence.outcome(model, inputs, named)
    report = fastseg.swap(model)
    assert collections.Counter(layer.op for layer in report.swapped) == network.swapped
    left = collections.Counter((layer.found.__name__, layer.reason) for layer in report.left)
    assert left == network.left
    assert list(model.state_dict()) == keys
    assert equivalence.equal(equivalence.outcome(model, inputs, named), plain)
    if network.interpreted:
        truth = equivalence.in_float64(model, inputs, named)
        with fastseg.backend("triton"):
            found = equivalence.outcome(model, inputs, named)
        assert equivalence.failures(equivalence.compare_outcomes(found, plain, truth, 1e-3)) == []
    report.undo()
    assert equivalence.equal(equivalence.outcome(model, inputs, named), plain)


def test_functional_calls_are_replaced(network):
    model = network.model()
    inputs, named = network.inputs()
    plain = equivalence.outcome(model, inputs, named)
    with fastseg.swap_functions() as swapped:
        found = equivalence.outcome(model, inputs, named)
    assert swapped.calls == network.calls and not swapped.left
    assert equivalence.equal(found, plain)


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.compiled])
def test_what_is_put_into_a_compiled_graph(name):
    network = NETWORKS[name]
    model = network.model()
    inputs, named = network.inputs()
    with torch.no_grad():
        model(*inputs, **named)  # in their first call, networks of transformers do what would break the graph
    reports = []
    torch.compiler.reset()

    class Compiled(Exception):
        """Raised once the graph is rewritten: running it on the interpreter would take minutes."""

    def inner(graph, _):
        raise Compiled

    options = {"inner": inner, "report": reports.append}
    compiled = torch.compile(model, backend=fastseg.compile_backend, options=options)
    with fastseg.backend("triton"), pytest.raises(Exception, match="Compiled"):
        compiled(*inputs, **named)
    assert [report.rewritten for report in reports] == [network.compiled]
