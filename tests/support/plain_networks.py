"""SegNet and DeconvNet as one would write them in torch: what fastseg's are compared with."""

from torch import nn


def conv(i, o, k=3, pad=1):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=pad), nn.BatchNorm2d(o, eps=1e-9), nn.ReLU())


class Plain(nn.Module):
    """Encoder, what lies at the bottom, decoder, classifier: torch's pooling with indices and its unpooling."""

    def __init__(self, encoder, decoder, classifier, norm=None, **bottom):
        super().__init__()
        self.norm = norm or nn.Identity()
        self.encoder = nn.ModuleList(nn.Sequential(*stage) for stage in encoder)
        self.decoder = nn.ModuleList(nn.Sequential(*stage) for stage in decoder)
        self.classifier = classifier
        self.bottom = list(bottom)
        for name, layer in bottom.items():
            self.add_module(name, layer)
        self.pool = nn.MaxPool2d(2, 2, return_indices=True, ceil_mode=True)
        self.unpool = nn.MaxUnpool2d(2, 2)

    def forward(self, x):
        x, trail = self.norm(x), []
        for stage in self.encoder:
            full = stage(x)
            x, indices = self.pool(full)
            trail.append((indices, full.size()))
        for name in self.bottom:
            x = self.get_submodule(name)(x)
        for stage, (indices, size) in zip(self.decoder, reversed(trail), strict=True):
            x = stage(self.unpool(x, indices, output_size=size))
        return self.classifier(x)
