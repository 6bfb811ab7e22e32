"""The classes that swap sets: for a user's subclasses, and for classes that torch has wrapped."""

import abc
import copy
import io
import pickle

import pytest
import torch
from support.swap_common import assert_same, operators, results, twins
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastseg

# --- subclasses ------------------------------------------------------------------------------------------------------


class Tagged(nn.MaxPool2d, abc.ABC):
    """Has a metaclass, an attribute, a registry of subclasses that must not change, and a strict __setattr__."""

    registry: list = []  # noqa: RUF012

    def __init__(self, kernel_size, tag):
        super().__init__(kernel_size)
        self.tag = tag

    def __init_subclass__(cls, *, name, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.registry.append(name)

    def __setattr__(self, name, value):
        if name == "__class__":
            raise AttributeError(name)
        super().__setattr__(name, value)

    def extra_repr(self):
        return f"{self.tag}: {super().extra_repr()}"


class Named(nn.MaxUnpool2d):
    forward = nn.MaxUnpool2d.forward


class Deeper(Named):
    def __reduce__(self):
        return Deeper, (self.kernel_size,), self.__dict__


class Bilinear(nn.ConvTranspose2d):
    def reset_parameters(self):
        nn.init.ones_(self.weight)


class Focal(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return super().forward(input, target) ** 2


def subclassed():
    return nn.ModuleDict(
        {"pool": Tagged(2, "x"), "again": Tagged(3, "y"), "unpool": Deeper(2), "up": Bilinear(2, 3, 2, bias=False)}
    )


def test_subclasses_with_torchs_forward_are_swapped():
    model = subclassed()
    report = fastseg.swap(model)
    assert len(report.swapped) == 4
    pairs = (("pool", Tagged, "MaxPool2d"), ("unpool", Deeper, "MaxUnpool2d"), ("up", Bilinear, "ConvTranspose2d"))
    for name, found, fused in pairs:
        cls = type(model[name])
        assert cls.__name__ == found.__name__ and cls.__module__ == found.__module__
        assert cls.__mro__.index(found) < cls.__mro__.index(getattr(fastseg.nn, fused))
    assert type(model["pool"]) is type(model["again"])
    assert repr(model["pool"]) == "Tagged(x: kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)"
    assert Tagged.registry == []
    assert fastseg.swap(model).swapped == []
    report.undo()
    assert [type(m) for m in model.values()] == [Tagged, Tagged, Deeper, Bilinear]


def test_subclasses_run_on_the_kernels(device, triton_backend):
    plain, model, _ = twins(subclassed().to(device))
    x = torch.randn(1, 2, 6, 6, device=device)
    for name, operator in (("pool", "max_pool2d"), ("again", "max_pool2d"), ("up", "conv_transpose2d")):
        assert operators(model[name], x) == [operator]
        assert_same(results(model[name], x), results(plain[name], x))
    values, indices = nn.functional.max_pool2d(x, 2, return_indices=True)
    assert operators(model["unpool"], values, indices) == ["max_unpool2d"]
    assert torch.equal(model["unpool"](values, indices), plain["unpool"](values, indices))


def test_swapped_subclasses_can_be_copied_and_saved():
    model = subclassed()
    report = fastseg.swap(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(model, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for twin in (*copies, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert [type(m) for m in twin.values()] == [type(m) for m in model.values()]
        assert twin["pool"].tag == "x" and twin["again"].kernel_size == 3 and twin["pool"] is not model["pool"]
        assert torch.equal(twin["up"].weight, model["up"].weight)
    report.undo()
    assert type(copies[0]["pool"]) is not Tagged and b"fastseg" not in pickle.dumps(model)


def test_a_subclass_with_its_own_forward_is_not_swapped():
    model = Focal()
    assert fastseg.swap(model).left[0].reason == "is a subclass with its own forward"
    assert type(model) is Focal


def test_a_class_that_cannot_be_extended_is_not_swapped():
    class Final(type):
        def __new__(cls, name, bases, namespace, **kwargs):
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("Final classes have no subclasses")
            return super().__new__(cls, name, bases, namespace)

    class Pool(nn.MaxPool2d, metaclass=Final):
        pass

    model = nn.Sequential(Pool(2), nn.MaxPool2d(2))
    report = fastseg.swap(model)
    assert type(model[0]) is Pool and type(model[1]) is fastseg.nn.MaxPool2d
    assert report.left[0].reason == "is of a class that cannot be extended: Final classes have no subclasses"


# --- parametrizations ------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


def up(cls=nn.ConvTranspose2d):
    return cls(3, 4, 2, 2)


def twice():
    layer = parametrizations.weight_norm(up())
    parametrize.register_parametrization(layer, "bias", Doubled())
    return layer


WRAPPED = {
    "weight norm": lambda: parametrizations.weight_norm(up()),
    "spectral norm": lambda: parametrizations.spectral_norm(up()).eval(),  # in training its vectors change at each call
    "two": twice,
    "subclass": lambda: parametrizations.weight_norm(up(Bilinear)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_parametrized_layers(name, device, triton_backend):
    layer = WRAPPED[name]().to(device)
    found, keys = type(layer), list(layer.state_dict())
    plain, layer, report = twins(layer)
    assert isinstance(layer, fastseg.nn.ConvTranspose2d) and parametrize.is_parametrized(layer)
    assert type(layer).__name__ == found.__name__ and list(layer.state_dict()) == keys
    x = torch.randn(2, 3, 3, 4, device=device)
    assert operators(layer, x) == ["conv_transpose2d"]
    assert_same(results(layer, x), results(plain, x))
    assert_same(results(copy.deepcopy(layer), x), results(plain, x))
    with report.undone():
        assert type(layer) is found
    assert isinstance(layer, fastseg.nn.ConvTranspose2d)
    report.undo()
    assert type(layer) is found
    assert_same(results(layer, x), results(plain, x), exactly=True)


def test_parametrizations_removed_after_the_swap(device, triton_backend):
    layer = twice().to(device)
    report = fastseg.swap(layer)
    parametrize.remove_parametrizations(layer, "bias")
    x = torch.randn(1, 3, 2, 2, device=device)
    want = layer(x)
    with report.undone():
        assert not isinstance(layer, fastseg.nn.ConvTranspose2d) and parametrize.is_parametrized(layer, "weight")
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is fastseg.nn.ConvTranspose2d
    report.undo()
    assert type(layer) is nn.ConvTranspose2d
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


def test_parametrizations_added_after_the_swap(device, triton_backend):
    layer = up().to(device)
    report = fastseg.swap(layer)
    parametrizations.weight_norm(layer)
    parametrize.register_parametrization(layer, "bias", Doubled())
    x = torch.randn(1, 3, 2, 2, device=device)
    want = layer(x)
    assert operators(layer, x) == ["conv_transpose2d"]
    report.undo()
    assert not isinstance(layer, fastseg.nn.ConvTranspose2d) and parametrize.is_parametrized(layer, "bias")
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
    for name in ("weight", "bias"):
        parametrize.remove_parametrizations(layer, name)
    assert type(layer) is nn.ConvTranspose2d


def test_copies_of_a_parametrized_layer_keep_their_class():
    layer = WRAPPED["weight norm"]()
    twin = copy.deepcopy(layer)
    found = type(twin)
    report = fastseg.swap(layer)
    assert type(twin) is found and not isinstance(twin, fastseg.nn.ConvTranspose2d)
    report.undo()
    assert type(layer) is type(twin) is found


def test_a_copy_made_after_the_swap_does_not_prevent_undo():
    layer = WRAPPED["weight norm"]()  # copying sets __slotnames__ on its class
    found = type(layer)
    report = fastseg.swap(layer)
    assert type(copy.deepcopy(layer)) is type(layer)
    report.undo()
    assert type(layer) is found


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weight_norms_that_use_hooks(norm, device, triton_backend):
    plain, layer = (norm(up().to(device)).eval() for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    report = fastseg.swap(layer)
    x = torch.randn(1, 3, 2, 2, device=device)
    assert type(layer) is fastseg.nn.ConvTranspose2d
    for _ in range(2):
        for each in (plain, layer):
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.mul_(3)
        assert_same(results(layer, x), results(plain, x))
        report.undo()


def test_a_lazy_layer_is_swapped_once_it_knows_its_channels(device):
    model = nn.Sequential(nn.LazyConvTranspose2d(4, 2)).to(device)
    assert fastseg.swap(model).left[0].reason == "is lazy; swap after the first call of the model"
    model(torch.randn(1, 3, 4, 4, device=device))
    assert type(model[0]) is nn.ConvTranspose2d
    fastseg.swap(model, strict=True)
    assert type(model[0]) is fastseg.nn.ConvTranspose2d
