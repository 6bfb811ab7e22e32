"""What the tests of pooling and unpooling share."""

import torch

LAYOUTS = [torch.contiguous_format, torch.channels_last]
GEOMETRIES = [  # shape, kernel_size, stride, padding, ceil_mode: windows that do not overlap
    ((2, 8, 8, 32), 2, 2, 0, False),
    ((2, 3, 9, 15), 2, 2, 0, True),
    ((1, 4, 7, 9), 2, None, 0, False),
    ((2, 3, 9, 16), 2, 2, 0, True),
    ((1, 8, 9, 9), 3, 3, 1, False),
    ((2, 5, 10, 11), 2, 3, 1, True),
    ((2, 3, 7, 8), (1, 2), (3, 2), (0, 1), False),
    ((1, 2, 8, 6), (2, 1), (2, 2), 0, False),
    ((1, 1, 2, 2), 2, 2, 0, False),
    ((0, 3, 4, 4), 2, 2, 0, False),
]
