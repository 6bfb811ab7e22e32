#!/usr/bin/env bash
# Mask2Former's image processor turns void pixels into an object of class 254.
#
# Expected: with ignore_index=255 and do_reduce_labels=True (ADE20K's numbering: 0 is "other", classes start at 1) label
#           255 stays ignored, as SegFormer's processor of the same library keeps it.
# Happens:  only label 0 becomes ignore_index; all others are lowered by 1, also 255. Void pixels become a mask of class
#           254, which the model is trained to find, or which is out of range in its loss.
# Versions: transformers 5.24.0 (the processors that need Pillow and numpy alone; those on torchvision have
#           the same lines), numpy 2.4.6, Pillow 12.0.0.
# Source:   convert_segmentation_map_to_binary_masks in the image processors of MaskFormer, Mask2Former, OneFormer and
#           EoMT (where(map == 0, ignore_index, map - 1)). reduce_label of the SegFormer processor has a line more that
#           sends 254 back to 255.
# Means:    data with both a class 0 to drop and 255 for void (padding after augmentation, annotators' void) needs
#           labels[labels == 255] = 0 before the processor, which then ignores both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 numpy==2.4.6 pillow==12.0.0

"$work/venv/bin/python" - <<'PY'
import numpy as np
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

labels = np.array([[0, 1], [2, 255]], np.uint8).repeat(16, 0).repeat(16, 1)
image = np.zeros((32, 32, 3), np.uint8)
mask2former = Mask2FormerImageProcessorPil(ignore_index=255, do_reduce_labels=True, do_resize=False)
segformer = SegformerImageProcessorPil(do_reduce_labels=True, do_resize=False)


# copy(): SegFormer's processor also writes 255 over the zeros of the array that it is given.
def classes(labels):
    """The classes of the masks that Mask2Former is trained on."""
    return mask2former([image], segmentation_maps=[labels.copy()], return_tensors="np")["class_labels"][0].tolist()


dense = np.unique(segformer([image], segmentation_maps=[labels.copy()], return_tensors="np")["labels"]).tolist()
as_zero = np.where(labels == 255, 0, labels).astype(np.uint8)
print("labels in the file:", np.unique(labels))
print("SegFormer's labels:", dense)
print("Mask2Former's classes:", classes(labels), "and with 255 set to 0 before:", classes(as_zero))

assert dense == [0, 1, 255], dense  # the control: 255 stays ignored
assert classes(as_zero) == [0, 1]  # what to do
assert classes(labels) == [0, 1, 254]  # the surprise
PY
