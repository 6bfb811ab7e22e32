"""The classes of the field's data sets: their names and the colours in which their authors draw them."""

from __future__ import annotations

Colour = tuple[int, int, int]

CAMVID_CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
CAMVID_COLOURS = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (0, 0, 192),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
CAMVID_CLASS_WEIGHTS = (0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 9.6446, 1.8418, 0.6823, 6.2478, 7.3614)
"""The loss weights that SegNet's authors published, in the order of CAMVID_CLASSES."""

DIGIT_CLASSES = (*"0123456789", "ground")
"""The classes of digit scenes: class k is the digit k, class 10 the background."""

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
CITYSCAPES_COLOURS = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142),
    (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
CITYSCAPES_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The numbers of CITYSCAPES_CLASSES in files called labelIds; the other numbers are not evaluated."""


def voc_colours(count: int) -> tuple[Colour, ...]:
    """Return the colours of the first `count` classes of Pascal VOC.

    The bits of a class number are dealt to the highest bits of red, green and blue in turn.

    Example::

        >>> from fastseg.training.class_names import voc_colours
        >>> voc_colours(4)
        ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    """
    return tuple(
        tuple(sum((number >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3))
        for number in range(count)
    )


COLOURS = {
    CAMVID_CLASSES: CAMVID_COLOURS,
    CITYSCAPES_CLASSES: CITYSCAPES_COLOURS,
    VOC_CLASSES: voc_colours(len(VOC_CLASSES)),
}
"""The colours of the data sets that have some of their own, by their classes."""

DISTINCT_COLOURS = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (227, 119, 194),
    (127, 127, 127), (188, 189, 34), (23, 190, 207), (43, 43, 43),
)  # fmt: skip
"""Colours for a few classes that are easy to tell apart: matplotlib's, and a dark grey."""
