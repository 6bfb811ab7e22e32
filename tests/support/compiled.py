"""For the tests of torch.compile(backend="fastseg"): a compiled function that records its graphs, and chains."""

import torch
import torch.nn.functional as F

import fastseg
from fastseg.torch_internals import lookup_backend
from fastseg.verification.criterion import compare_to_torch


class Compiled:
    """A function compiled by the backend. Records the reports, and the graphs that the inner backend gets."""

    def __init__(self, function, inner="eager", **options):
        torch.compiler.reset()
        self.graphs, self.reports = [], []

        def record(graph, inputs):
            self.graphs.append(graph)
            return lookup_backend(inner)(graph, inputs)

        self.function = torch.compile(
            function, backend=fastseg.compile_backend, options={"inner": record, "report": self.reports.append},
            **options,
        )  # fmt: skip

    def __call__(self, *args):
        return self.function(*args)

    @property
    def rewritten(self):
        return dict(self.reports[-1].rewritten)

    @property
    def reasons(self):
        return [left.reason for left in self.reports[-1].left]

    def targets(self):
        """The names of the functions that the last graph calls."""
        return [getattr(node.target, "__name__", node.target) for node in self.graphs[-1].graph.nodes]


def new_state(device):
    """x; weight and bias of a convolution; weight, bias and running statistics of a batch norm."""
    shapes = (2, 3, 6, 8), (4, 3, 3, 3), (4,), (4,), (4,), (4,)
    *tensors, mean = (torch.randn(shape, device=device) for shape in shapes)
    return [*tensors, mean, torch.rand(4, device=device) + 0.5]


def assert_equal_to_torch(ours, theirs, inputs, poison=False):
    """By the criterion of verify, with a tolerance for chains in which a batch norm cancels a bias."""
    for c in compare_to_torch(ours, theirs, inputs, poison=poison):
        assert c.error <= max(10 * c.allowed, 1e-4 if c.allowed else 0), c


def labels(shape, device):
    return torch.randint(0, 4, shape, device=device)


# --- chains, functions of such a state ------------------------------------------------------------------------------


def conv(x, weight, bias, *norm):
    return torch.conv2d(x, weight, bias, padding=1)


def normed(training, between=conv):
    """A function of `state` that returns a batch norm's output and its running statistics."""

    def run(x, weight, bias, gamma, beta, mean, var):
        mean, var = mean.detach().clone(), var.detach().clone()
        y = F.batch_norm(between(x, weight, bias), mean, var, gamma, beta, training, 0.1, 1e-3)
        return y, mean, var

    return run


def then(head, tail):
    def run(*state):
        y, mean, var = head(*state)
        return *tail(y), mean, var

    return run


def pooled(y):
    y, indices = F.max_pool2d(F.relu(y, inplace=True), 2, return_indices=True)
    return y, indices


def there_and_back(y):
    size = y.shape
    y, indices = F.max_pool2d(y.relu(), 2, return_indices=True)
    return (F.max_unpool2d(torch.sin(y), indices, 2, output_size=size),)


def deconv(x, weight, bias, *norm):
    return F.conv_transpose2d(x, weight.transpose(0, 1), bias, stride=2, output_padding=1)


train, evaluate = normed(True), normed(False)

# What `pooled` and `there_and_back` become after a convolution and its batch norm.
POOLED = {"batch_norm_relu_max_pool2d": 1, "input_bias": 1}
THERE_AND_BACK = POOLED | {"max_unpool2d_with_offsets": 1}
