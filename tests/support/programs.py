"""Random programs of convolutions, batch norms, pools, unpools and losses, with other reads and writes in between."""

from __future__ import annotations

import linecache
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

C = 4  # channels of all tensors
RUNNING = ("m0", "v0", "m1", "v1")

HEAD = ("x", "w0", "w1", "w2", "b0", "b1", "g0", "g1", "a0", "a1", *RUNNING, "t")


def inputs(generator: torch.Generator) -> dict[str, Tensor]:
    """The inputs of every program: an image, weights, biases, vectors of batch norms, and labels."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {"x": randn(2, C, 7, 8), "w0": randn(C, C, 3, 3) / 6, "w1": randn(C, C, 1, 1), "w2": randn(C, C, 2, 2) / 3}
    made |= {name: randn(C) for name in ("b0", "b1", "g0", "g1", "a0", "a1", "m0", "m1")}
    made |= {name: randn(C).square() + 0.5 for name in ("v0", "v1")}
    made = {name: made[name] for name in HEAD[:-1]}
    made["t"] = torch.randint(0, C, (2, 40, 40), generator=generator)
    return made


KINDS = dict(conv=3, deconv=1, norm=2, relu=2, pool=3, unpool=4, resize=1, loss=1, write=1, read=2, other=1, region=0.5)
CHAINS = [  # what the graph rewrites look for
    ("conv", "norm", "relu"), ("conv", "norm", "relu", "pool"), ("norm", "relu", "unpool"), ("resize", "loss"),
    ("pool", "norm", "relu", "unpool"), ("deconv", "norm", "relu"), ("norm", "pool_of_another", "relu", "unpool"),
]  # fmt: skip


class Writer:
    """Writes a program line by line. Each line is run, and dropped if it fails, so shapes need no rules."""

    def __init__(self, seed: int, given: dict[str, Tensor]) -> None:
        self.random = random.Random(seed)
        inputs = {name: x.clone().requires_grad_(_wants_grad(name, x)) for name, x in given.items()}
        self.values: dict[str, Any] = {"torch": torch, "F": F, **inputs}
        self.trains_both = self.random.random() < 0.4
        self.images, self.pools, self.lines, self.returned = ["x"], [], [], []

    def program(self, length: int) -> str:
        """The source of a function `program` whose arguments are `inputs` by name."""
        for _ in range(length):
            self.step()
        kept = [name for name in self.images[1:] if self.random.random() < 0.15]
        returned = list(dict.fromkeys([*self.returned, *kept, self.images[-1]]))
        body = "".join(f"    {line}\n" for text in self.lines for line in text.splitlines())
        return f"def program({', '.join(HEAD)}):\n{body}    return {', '.join(returned)},\n"

    def one(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def image(self) -> str:
        """A random image, mostly the last one, so that chains form."""
        return self.images[-1] if self.random.random() < 0.88 else self.one(*self.images)

    def new(self) -> str:
        return f"y{len(self.lines)}"

    def keep(self, line: str, *images: str) -> bool:
        """Add the line if it runs and its images have a suitable size; returns whether it was added."""
        trial = dict(self.values)
        try:
            exec(line, trial)
        except (RuntimeError, ValueError):
            return False
        if not all(_fits(trial[name]) for name in images):
            return False
        self.values = trial
        self.lines.append(line)
        self.images += images
        return True

    def step(self) -> None:
        if self.random.random() < 0.4:
            for kind in self.one(*CHAINS):
                getattr(self, kind)()
                if self.random.random() < 0.15:
                    getattr(self, self.one("read", "read", "write", "other", "region"))()
        else:
            getattr(self, self.random.choices(list(KINDS), list(KINDS.values()))[0])()

    def conv(self) -> None:
        y, x, bias = self.new(), self.image(), self.one("b0", "b0", "b1", "None")
        call = self.one(
            f"torch.conv2d({x}, w0, {bias}, padding=1)", f"torch.conv2d({x}, w1, {bias})",
            f"F.conv2d({x}, w0[:, :1], bias={bias}, groups={C}, padding='same')",
            f"torch.conv2d({x}, w0, {bias}, 2, 1)",
        )  # fmt: skip
        self.keep(f"{y} = {call}", y)

    def deconv(self) -> None:
        y, x, bias = self.new(), self.image(), self.one("b0", "b1", "None")
        rest = self.one("stride=2", "stride=2, padding=1", "padding=1, dilation=2")
        self.keep(f"{y} = F.conv_transpose2d({x}, {self.one('w2', 'w0')}, {bias}, {rest})", y)

    def norm(self) -> None:
        # torch's gradient is wrong if a norm in evaluation uses statistics that another one then updates in training.
        y, x, n = self.new(), self.image(), self.one("0", "0", "1")
        training = n == "0" or self.trains_both
        running = f"m{n}, v{n}" if not training or self.random.random() < 0.8 else "None, None"
        affine = self.one(f"g{n}, a{n}", f"g{n}, a{n}", f"g{n}, None", "None, None")
        self.keep(f"{y} = F.batch_norm({x}, {running}, {affine}, {training}, {self.one('0.1', '0.3')}, 1e-3)", y)

    def relu(self) -> None:
        y, x = self.new(), self.image()
        call = self.one("F.relu({})", "F.relu({})", "{}.relu()", "torch.relu({})", "F.relu({}, inplace=True)",
                        "{}.relu_()")  # fmt: skip
        self.keep(f"{y} = {call.format(x)}", y)

    def pool(self) -> None:
        y, x = self.new(), self.image()
        geometry = self.one("2", "2", "2", "(2, 3), (2, 3)", "3, 2, 1", "2, 2, 1", "2, 3", "2, 2, 0, 2")
        if self.random.random() < 0.3:
            self.keep(f"{y} = F.max_pool2d({x}, {geometry}, ceil_mode={self.one(True, False)})", y)
            return
        i = f"i{len(self.lines)}"
        if self.keep(f"{y}, {i} = F.max_pool2d({x}, {geometry}, ceil_mode={self.one(False, False, True)}, "
                     "return_indices=True)", y):  # fmt: skip
            size = self.values[x].shape
            self.pools.append((i, geometry, tuple(size)))

    def pool_of_another(self) -> None:
        """An unpool after a batch norm reads indices that are made after the batch norm."""
        pooled = self.values[self.images[-1]].shape[2:]
        doubled = [n for n in self.images if tuple(side // 2 for side in self.values[n].shape[2:]) == tuple(pooled)]
        if doubled:
            y, x = self.new(), self.one(*doubled)
            i = f"i{len(self.lines)}"
            if self.keep(f"{y}, {i} = F.max_pool2d({x}, 2, return_indices=True)"):
                self.pools.append((i, "2", tuple(self.values[x].shape)))

    def unpool(self) -> None:
        if not self.pools:
            return
        i, geometry, size = self.pools[-1] if self.random.random() < 0.7 else self.one(*self.pools)
        fitting = [name for name in self.images if self.values[name].shape == self.values[i].shape]
        if not fitting:
            return
        y, x = self.new(), fitting[-1] if self.random.random() < 0.8 else self.one(*fitting)
        geometry = geometry if geometry.count(",") < 3 else "4, 2"
        size = self.one(f", output_size={size}", f", output_size={size}", f", output_size={size[2:]}", "")
        if self.random.random() < 0.15:
            i = self.one(f"{i} + 0", f"{i}.contiguous()", f"{i}.view_as({i})")
        self.keep(f"{y} = F.max_unpool2d({x}, {i}, {geometry}{size})", y)

    def resize(self) -> None:
        y, x = self.new(), self.image()
        h, w = self.values[x].shape[2:]
        how = self.one("scale_factor=2", "scale_factor=2, mode='bilinear'", f"size=({h + 3}, {w + 1}), mode='bilinear'",
                       f"size=({h + 2}, {w + 5}), mode='bilinear', align_corners=True",
                       "scale_factor=1.5, mode='bicubic'", "scale_factor=1.5, recompute_scale_factor=True")  # fmt: skip
        self.keep(f"{y} = F.interpolate({x}, {how})", y)

    def loss(self) -> None:
        y, x = self.new(), self.image()
        h, w = self.values[x].shape[2:]
        rest = self.one("", ", ignore_index=1", ", label_smoothing=0.1", ", reduction='sum'", ", reduction='none'",
                        ", weight=v0.detach().clone()")  # fmt: skip
        if self.keep(f"{y} = F.cross_entropy({x}, t[:, :{h}, :{w}]{rest})"):
            self.returned.append(y)

    def write(self) -> None:
        x = self.image()
        self.keep(self.one(f"{x}.add_(1)", f"{x}.mul_(2)", f"{x}.masked_fill_({x}.detach() > 1, 0.5)",
                           f"{x}[:, :1] = 0.25", f"z = {x}.view(-1)\nz.neg_()", f"{x} += 1", f"{x}.detach().mul_(1.5)",
                           "m0.mul_(0.5)", "m0.view(-1).add_(1)"))  # fmt: skip

    def read(self) -> None:
        r, x = f"r{len(self.lines)}", self.image()
        i = self.pools[-1][0] if self.pools else x
        line = self.one(f"{x}.sum()", f"{x}.detach().clone()", f"{i}.sum()", f"{i}", f"{i}.double().mean()",
                        "m0.clone()", "v0.sum()", "m1 * 2", "m0.view(2, -1)[0].sin()", f"{x}.mean((2, 3))",
                        f"{x}")  # fmt: skip
        if self.keep(f"{r} = {line}"):
            self.returned.append(r)

    def other(self) -> None:
        y, x = self.new(), self.image()
        self.keep(f"{y} = " + self.one(f"{x} * 2", f"{x} + {self.one(*self.images)}", f"{x}.detach()", f"{x}.flip(0)",
                                       f"F.leaky_relu({x}, 0.1)", f"{x}.contiguous()", f"{x}.view_as({x})",
                                       f"{x}.sigmoid()"), y)  # fmt: skip

    def region(self) -> None:
        """Add a call under no_grad."""
        y, x = self.new(), self.image()
        call = self.one(f"F.relu({x})", f"F.max_pool2d({x}, 2)", f"{x}.relu_()")
        self.keep(f"with torch.no_grad():\n    {y} = {call}", y)


def random_program(seed: int, length: int = 9) -> str:
    return Writer(seed, inputs(torch.Generator().manual_seed(0))).program(length)


def function_of(source: str) -> Any:
    made: dict[str, Any] = {"torch": torch, "F": F}
    name = f"<program {hash(source)}>"  # Dynamo reads the source
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), made)
    return made["program"]


def outcome(function: Any, given: dict[str, Tensor], seed: int) -> list[Tensor | None]:
    """Results, gradients, and the inputs after the call."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {name: x.clone().requires_grad_(_wants_grad(name, x)) for name, x in given.items()}
    used = {name: x * 1 if _wants_grad(name, x) else x for name, x in leaves.items()}  # may be overwritten
    results = function(**used)
    found = [y.detach().clone() for y in results]
    wanted = [y for y in results if y.requires_grad]
    gradients = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in wanted]
    if wanted:
        torch.autograd.backward(wanted, gradients)
    return [*found, *(x.grad for x in leaves.values()), *(x.detach() for x in used.values())]


def _fits(y: Tensor) -> bool:
    return y.dim() == 4 and y.shape[1] == C and min(y.shape[2:]) > 1 and max(y.shape[2:]) <= 40


def _wants_grad(name: str, x: Tensor) -> bool:
    return x.is_floating_point() and name not in RUNNING
