"""What the tests of swap share: a model beside its plain copy."""

import copy

import torch

import fastseg


def twins(model, **options):
    """(plain copy, swapped model, report), with batch norms that have lived."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            tensor.normal_()
    plain = copy.deepcopy(model)
    return plain, model, fastseg.swap(model, **options)


def results(model, *inputs):
    """Output, gradients of inputs and parameters by name, and buffers behind it."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    model.zero_grad()
    output = model(*inputs)
    generator = torch.Generator().manual_seed(0)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    found = {"output": output.detach()}
    found |= {f"input {i}": x.grad for i, x in enumerate(inputs) if x.requires_grad}
    found |= {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return found | {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found, want, exactly=False):
    assert found.keys() == want.keys()
    for name, expected in want.items():
        if exactly or expected is None:
            assert found[name] is expected is None or torch.equal(found[name], expected), name
        else:
            scale = max(1.0, expected.double().abs().max().item()) if expected.numel() else 1.0
            # A bias before a norm has a gradient of zero, for which torch's sums give their rounding.
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4 * scale, msg=name)


def operators(model, *inputs):
    return [choice.operator for choice in fastseg.explain(model, *inputs)]
