"""SegNet and DeconvNet built from torch's layers, for comparison with fastseg's."""

from torch import nn


def conv(i, o, k=3, pad=1):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=pad), nn.BatchNorm2d(o, eps=1e-9), nn.ReLU())


class Plain(nn.Module):
    """Encoder, bottom layers, decoder and classifier, with torch's pooling with indices and unpooling."""

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
        x, pooled = self.norm(x), []
        for stage in self.encoder:
            full = stage(x)
            x, indices = self.pool(full)
            pooled.append((indices, full.size()))
        for name in self.bottom:
            x = self.get_submodule(name)(x)
        for stage, (indices, size) in zip(self.decoder, reversed(pooled), strict=True):
            x = stage(self.unpool(x, indices, output_size=size))
        return self.classifier(x)
