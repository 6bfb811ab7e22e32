"""ConvTranspose2d."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import functional as F


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d on fastseg.functional.conv_transpose2d: same arguments, parameters, errors.

    forward(input (N, C, H, W) or (C, H, W), output_size=None): output_size, of as many entries as input or of 2, picks
    one of the sizes that `stride` leaves open, in place of `output_padding`.
    """

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if self.padding_mode != "zeros":
            raise ValueError(f"ConvTranspose2d: padding_mode must be 'zeros', but is {self.padding_mode!r}")
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return F.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )
