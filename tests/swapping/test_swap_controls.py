"""The options of swap, its log line, temporary undo, and offsets in place of indices."""

import copy
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from support.swap_common import FUSED, MyPool, Net, assert_same, kinds, operators, reasons, results, twins
from torch import nn

import fastseg


class Whole(nn.Module):
    """Has every kind of candidate."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.body = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x, target):
        return self.net(self.body(x), target)


OPS = {
    "max_pool2d": "net.pool",
    "max_unpool2d": "net.unpool",
    "conv_transpose2d": "net.up",
    "cross_entropy": "net.loss",
    "batch_norm_relu": "body",
}


# --- ops, filter_fn, strict ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_ops_selects_the_operators(op):
    model = Whole()
    report = fastseg.swap(model, ops=iter([op]))
    assert [(layer.op, layer.names) for layer in report.swapped] == [(op, (OPS[op],))]
    assert reasons(report) == {name: "is not in ops" for other, name in OPS.items() if other != op}
    assert sum(type(m).__module__.startswith("fastseg") for m in model.modules()) == 1
    rest = fastseg.swap(model, ops=OPS.keys() - {op}, strict=True)
    assert len(rest.swapped) == 4 and reasons(rest)[OPS[op]] == "is not in ops"
    assert fastseg.swap(Whole()).as_dict() == fastseg.swap(Whole(), ops=list(OPS)).as_dict()


@pytest.mark.parametrize(
    "ops, error, message",
    [
        (["max_pool2d", "pool"], ValueError, "ops must be names out of 'max_pool2d', .*, but has 'pool'"),
        (["max_pool2d", 3], ValueError, "ops must be names out of .*, but has 3"),
        ("max_pool2d", TypeError, "ops must be an iterable of names, such as .*, but is 'max_pool2d'"),
        (7, TypeError, "ops must be an iterable of names, such as .*, but is 7"),
    ],
)
def test_wrong_ops(ops, error, message):
    model = Whole()
    before = kinds(model)
    with pytest.raises(error, match=message):
        fastseg.swap(model, ops=ops)
    assert kinds(model) == before


def test_a_transposed_convolution_that_ops_excludes_stays_torchs_in_its_sequence(device, triton_backend):
    up = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    plain, model, report = twins(up.to(device), ops=["batch_norm_relu"])
    assert report.swapped[0].together == (("1", "2"),)
    x = torch.randn(2, 3, 4, 4, device=device)
    for training in (True, False):
        plain.train(training), model.train(training)
        assert operators(model, x) == ["batch_norm_relu"]
        assert_same(results(model, x), results(plain, x))


def test_filter_fn_is_called_for_each_name():
    pool = nn.MaxPool2d(2)
    model = nn.ModuleDict(
        {"a": pool, "head": nn.ModuleDict({"b": pool, "c": nn.MaxPool2d(3)}), "conv": nn.Conv2d(1, 1, 1)}
    )
    asked = []

    def outside_head(module, name):
        asked.append((module, name))
        return not name.startswith("head.b")

    report = fastseg.swap(model, filter_fn=outside_head, strict=True)
    assert asked == [(pool, "a"), (pool, "head.b"), (model["head"]["c"], "head.c")]
    assert reasons(report) == {"a": "is excluded by filter_fn", "head.b": "is excluded by filter_fn"}
    assert type(pool) is nn.MaxPool2d and type(model["head"]["c"]) is fastseg.nn.MaxPool2d
    asked.clear()
    fastseg.swap(pool, filter_fn=lambda module, name: asked.append(name) or True)
    assert asked == [""] and type(pool) is fastseg.nn.MaxPool2d


def test_filter_fn_and_sequences():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    report = fastseg.swap(model, filter_fn=lambda _, name: name == "1")
    assert [type(m).__module__.startswith("fastseg") for m in model] == [False, True]
    assert reasons(report) == {"0": "is excluded by filter_fn"} and report.left[0].together == ()


@pytest.mark.parametrize("wrong", ["head", 3, ["a"]])
def test_a_filter_fn_that_is_not_callable(wrong):
    with pytest.raises(TypeError, match="filter_fn must be callable as filter_fn"):
        fastseg.swap(Whole(), filter_fn=wrong)


def test_an_error_in_filter_fn_leaves_the_model_as_it_was():
    model = Whole()
    before = kinds(model)
    with pytest.raises(ZeroDivisionError):
        fastseg.swap(model, filter_fn=lambda module, name: 1 / (not name.startswith("body")))
    assert kinds(model) == before


def test_strict_names_all_candidates_that_would_not_be_swapped_and_changes_nothing():
    hooked = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    hooked[0].register_forward_hook(lambda *_: None)
    model = nn.ModuleDict({"mine": MyPool(2), "hooked": hooked, "pool": nn.MaxPool2d(2)})
    before = kinds(model)
    with pytest.raises(RuntimeError) as raised:
        fastseg.swap(model, strict=True)
    assert str(raised.value).split("\n  ")[1:] == [
        "mine (support.swap_common.MyPool): is a subclass with its own forward",
        "hooked (torch.nn.modules.container.Sequential): has hooks on 0 + 1, which need tensors that the fused kernel "
        "never creates",
    ]
    assert kinds(model) == before
    fastseg.swap(model, strict=True, filter_fn=lambda _, name: name == "pool")
    fastseg.swap(model, strict=True, ops=["conv_transpose2d"])
    assert type(model["pool"]) is fastseg.nn.MaxPool2d
    whole = Whole()
    for _ in range(2):  # the second time the layers are already fastseg's
        fastseg.swap(whole, strict=True)


# --- log and report --------------------------------------------------------------------------------------------------


def test_the_summary_is_logged_in_one_line(caplog):
    model = nn.ModuleDict({"net": Whole(), "mine": MyPool(2)})
    with caplog.at_level(logging.INFO, logger="fastseg"):
        report = fastseg.swap(model)
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "fastseg",
            "INFO",
            "ModuleDict: 5 of 6 layers swapped (1 batch_norm_relu, 1 conv_transpose2d, 1 cross_entropy, 1 max_pool2d, "
            "1 max_unpool2d); not swapped: mine (is a subclass with its own forward)",
        )
    ]
    assert report.summary == caplog.records[0].getMessage()


def test_the_report_lists_candidates_in_the_order_of_the_model():
    model = Whole()
    report = fastseg.swap(model)
    assert [layer.names[0] for layer in report.candidates] == ["net.pool", "net.unpool", "net.up", "net.loss", "body"]
    found = json.loads(json.dumps(report.as_dict()))["layers"][-1]
    assert found["op"] == "batch_norm_relu" and found["together"] == [["0", "1"]] and found["swapped"]
    assert "yes: 0 + 1" in str(report)


# --- temporary undo --------------------------------------------------------------------------------------------------


def test_undone_restores_the_plain_model_for_a_block(device):
    model = Whole().to(device)
    before = kinds(model)
    report = fastseg.swap(model)
    during = kinds(model)
    with pytest.raises(KeyError), report.undone():
        assert kinds(model) == before
        raise KeyError
    assert kinds(model) == during != before
    report.undo()
    with report.undone():
        assert kinds(model) == before
    assert kinds(model) == before


def test_undone_does_not_affect_another_swap():
    model = Whole()
    first, second = fastseg.swap(model, ops=["max_pool2d"]), fastseg.swap(model)
    with first.undone():
        assert type(model.net.pool) is nn.MaxPool2d and type(model.net.up) is fastseg.nn.ConvTranspose2d
    with second.undone():
        assert type(model.net.pool) is fastseg.nn.MaxPool2d and type(model.net.up) is nn.ConvTranspose2d
    assert len(second.swapped) == 4 and type(model.net.up) is fastseg.nn.ConvTranspose2d


# --- compact indices -------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Two pools and their unpools, for odd sizes."""

    def __init__(self, unpool=None, second=None, stem=None):
        super().__init__()
        self.stem = stem or nn.Identity()
        self.first, self.second = (
            nn.MaxPool2d(2, return_indices=True),
            second or nn.MaxPool2d(2, 2, return_indices=True),
        )
        self.unpools = nn.ModuleList([nn.MaxUnpool2d((2, 2)), unpool or nn.MaxUnpool2d(2)])
        self.dtypes = []

    def forward(self, x):
        x = self.stem(x)
        a, i = self.first(x)
        b, j = self.second(a)
        self.dtypes.append((i.dtype, j.dtype))
        return self.unpools[1](self.unpools[0](b, j, a.shape), i, output_size=x.shape[-2:])


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_pools_return_offsets_to_the_unpools(backend, device):
    plain, model, report = twins(Pooled(stem=nn.MaxPool2d(3, 1, 1)), compact_indices=True, strict=True)
    assert report.compact_indices and report.compact_reason is None and "the pools return uint8 offsets" in str(report)
    assert type(model.stem) is fastseg.nn.MaxPool2d and type(model.first) is fastseg.nn.MaxPool2dWithOffsets
    x = torch.randn(2, 3, 9, 11, device=device)
    with fastseg.backend(backend):
        found = results(model, x)
    assert model.dtypes == [(torch.uint8, torch.uint8)]
    want = results(plain, x)
    assert_same(found, want, exactly=True)
    twin = copy.deepcopy(model)
    assert kinds(twin) == kinds(model)
    with report.undone():
        assert_same(results(model, x), want, exactly=True)
    assert kinds(twin) == kinds(model)
    report.undo()
    assert kinds(model) == kinds(plain)
    assert plain.dtypes[-1] == model.dtypes[-1] == (torch.int64, torch.int64)


def test_a_subclass_returns_offsets_too(device):
    class Mine(nn.MaxPool2d):
        pass

    plain, model, _ = twins(Pooled(second=Mine(2, return_indices=True)), compact_indices=True)
    x = torch.randn(1, 2, 8, 8, device=device)
    assert_same(results(model, x), results(plain, x), exactly=True)
    assert model.dtypes == [(torch.uint8, torch.uint8)] and isinstance(model.second, Mine)
    model.first.return_indices = False
    assert torch.equal(model.first(x), F.max_pool2d(x, 2))


def test_offsets_in_a_model_that_already_has_layers_of_fastseg(device):
    x = torch.randn(1, 2, 8, 8, device=device)
    with_unpools = Pooled(fastseg.nn.MaxUnpool2d(2))
    assert fastseg.swap(with_unpools, compact_indices=True, strict=True).compact_indices
    for _ in range(2):  # nothing left to do
        assert fastseg.swap(with_unpools, compact_indices=True, strict=True).compact_reason is None
    with_unpools(x)
    assert with_unpools.dtypes == [(torch.uint8, torch.uint8)]
    swapped = Pooled()
    first = fastseg.swap(swapped)
    report = fastseg.swap(swapped, compact_indices=True)
    assert report.compact_reason == "first is already a layer of fastseg; undo that swap first"
    first.undo()
    assert fastseg.swap(swapped, compact_indices=True).compact_indices


class MyUnpool(nn.MaxUnpool2d):
    def forward(self, input, indices, output_size=None):
        return super().forward(input, indices, output_size)


UNSUITABLE = {
    "differ": (Pooled(nn.MaxUnpool2d(3)), "first and unpools.1 differ in kernel_size, stride or padding"),
    "pools differ": (Pooled(second=nn.MaxPool2d(2, 1, return_indices=True)), "first and second differ"),
    "unpool not swapped": (
        Pooled(MyUnpool(2)),
        "unpools.1 is not swapped, and torch's MaxUnpool2d only takes int64 indices",
    ),
    "no pools": (nn.MaxPool2d(2), "no MaxPool2d that was swapped has return_indices"),
    "no unpools": (nn.MaxPool2d(2, return_indices=True), "no MaxUnpool2d reads them"),
    "dilated": (
        nn.Sequential(nn.MaxPool2d(2, dilation=2, return_indices=True), nn.MaxUnpool2d(2)),
        "0 is dilated",
    ),
    "large": (
        nn.Sequential(nn.MaxPool2d((17, 16), return_indices=True), nn.MaxUnpool2d((17, 16))),
        "windows of 17x16 have more than 256 elements",
    ),
}


@pytest.mark.parametrize("name", UNSUITABLE)
def test_indices_stay_int64_where_offsets_cannot_replace_them(name):
    model, reason = copy.deepcopy(UNSUITABLE[name])
    with pytest.raises(RuntimeError, match="compact indices: .*" + reason):
        fastseg.swap(model, compact_indices=True, strict=True)
    assert not any(type(m) in FUSED.values() for m in model.modules())
    report = fastseg.swap(model, compact_indices=True)
    assert not report.compact_indices and reason in report.compact_reason and reason in report.summary
    assert f"indices stay int64: {reason}"[:40] in " ".join(str(report).split())
    assert not any(isinstance(m, fastseg.nn.MaxPool2dWithOffsets) for m in model.modules())
    assert report.as_dict()["compact_reason"] == report.compact_reason


def test_unpool_accepts_offsets_and_rejects_other_integers(device):
    x = torch.randn(1, 2, 5, 7, device=device)
    values, offsets = fastseg.functional.max_pool2d_with_offsets(x, 2)
    unpool = fastseg.nn.MaxUnpool2d(2)
    want = fastseg.functional.max_unpool2d_with_offsets(values, offsets, 2, output_size=(5, 7))
    assert torch.equal(unpool(values, offsets, output_size=(1, 2, 5, 7)), want)
    with pytest.raises(RuntimeError, match=r"indices must be of dtype torch.int64"):
        unpool(values, offsets.int())
