#!/usr/bin/env bash
# A lossless PNG optimiser changes the class numbers of a label mask.
#
# Expected: "lossless" means that a mask reads back as the same array.
# Happens:  oxipng keeps the colours, not the palette indices, and in a palette mask the indices *are* the classes:
#           unused entries are dropped and the rest is reordered, so classes 1, 4, 7 become 1, 2, 0. A greyscale mask
#           with few labels becomes a palette image, whose indices are not its grey values either. Nothing warns, and the
#           new numbers are valid classes.
# Versions: pyoxipng 9.1.1 (oxipng 9, level 2, defaults), Pillow 12.0.0, numpy 2.4.6.
# Source:   oxipng's options color_type_reduction, palette_reduction and grayscale_reduction, all on by default. The PNG
#           specification counts the choice of a palette as encoding, not as content.
# Means:    do not run optimisers (also as a pre-commit hook or in a storage pipeline) over VOC, ADE20K, Cityscapes or
#           CamVid masks, or switch these reductions off as below. Compare np.asarray(Image.open(mask)) before and
#           after.
#           With a coloured palette the classes can be restored from the colours.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pyoxipng==9.1.1 pillow==12.0.0 numpy==2.4.6

"$work/venv/bin/python" - <<'PY'
import io

import numpy as np
import oxipng
from PIL import Image

labels = np.random.default_rng(0).choice(np.array([1, 4, 7], np.uint8), (64, 64))
labels[:, :20] = 7
# The first eight colours of PASCAL VOC.
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128, 128, 128, 128]


def saved(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def renamed(png):
    """What each class of `labels` is called in a PNG file."""
    array = np.asarray(Image.open(io.BytesIO(png)))
    return {int(label): sorted(set(array[labels == label].ravel().tolist())) for label in (1, 4, 7)}


palette = Image.fromarray(labels)
palette.putpalette(VOC)
files = {"palette": saved(palette), "grey": saved(Image.fromarray(labels))}
same = {1: [1], 4: [4], 7: [7]}
found = {}
for kind, png in files.items():
    optimised = oxipng.optimize_from_memory(png, level=2)
    kept = oxipng.optimize_from_memory(
        png, level=2, color_type_reduction=False, palette_reduction=False, grayscale_reduction=False,
        bit_depth_reduction=False,
    )
    colours = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (png, optimised)]
    assert (colours[0] == colours[1]).all()  # lossless in colours
    assert renamed(png) == renamed(kept) == same, (renamed(png), renamed(kept))  # the controls
    found[kind] = renamed(optimised)
    print(f"{kind}: {renamed(png)} -> {found[kind]}, {len(png)} -> {len(optimised)} bytes")

assert found["palette"] != same and set(sum(found["palette"].values(), [])) == {0, 1, 2}, found  # the surprise
assert found["grey"] != same and set(sum(found["grey"].values(), [])) == {0, 1, 2}, found
PY
