#!/usr/bin/env bash
# A label map that is saved as uint8 NIfTI comes back with labels that are no integers.
#
# Expected: set_data_dtype(np.uint8) on an image whose array came from get_fdata() (float64, but holding only integers)
#           casts 0, 3, 200 to uint8 and stores them.
# Happens:  nibabel stretches the float array over all 256 values and stores the scale in the header. Label 3 becomes
#           3.137, label 200 becomes 200.00000328; SimpleITK reads the file as a float32 image. For labels 0, 1, 2 the
#           error is small enough to look right when printed, but one of them is below its integer: a cast with
#           astype(np.uint8) turns it into the class before.
# Versions: nibabel 5.4.2, SimpleITK 2.5.7, numpy 2.4.6.
# Source:   nibabel's guide "Data scaling" (scl_slope; automatic for float to integer conversion) and
#           nibabel/arraywriters.py; integer arrays that fit the type are stored as they are.
# Means:    cast before the image is made: Nifti1Image(labels.astype(np.uint8), affine). When reading masks of others,
#           check that img.dataobj.slope is 1, and use np.rint, never a bare astype.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet nibabel==5.4.2 SimpleITK==2.5.7 numpy==2.4.6

"$work/venv/bin/python" - "$work" <<'PY'
import sys

import nibabel
import numpy as np
import SimpleITK


def stored(labels, name):
    """Save an array with the data type uint8; return the loaded image and SimpleITK's array of the same file."""
    image = nibabel.Nifti1Image(labels, np.eye(4))
    image.set_data_dtype(np.uint8)
    path = f"{sys.argv[1]}/{name}.nii"
    nibabel.save(image, path)
    return nibabel.load(path), SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))


labels = np.zeros((4, 4, 2))
labels[1, 1, 0], labels[2, 2, 1] = 3, 200
floats, floats_itk = stored(labels, "floats")
integers, integers_itk = stored(labels.astype(np.uint8), "integers")
few = np.zeros((4, 4, 2))
few[1, 1, 0], few[2, 2, 1] = 1, 2
cast = stored(few, "few")[0].get_fdata().astype(np.uint8)
print("from float64:", np.unique(floats.get_fdata()), "slope", floats.dataobj.slope, floats_itk.dtype)
print("from uint8:  ", np.unique(integers.get_fdata()), "slope", integers.dataobj.slope, integers_itk.dtype)
print("labels 0 1 2 after astype(np.uint8):", np.unique(cast))

# The control: an integer array is stored as it is.
assert np.unique(integers.get_fdata()).tolist() == [0, 3, 200] and integers_itk.dtype == np.uint8
# The surprise.
assert abs(np.unique(floats.get_fdata())[1] - 3.137255) < 1e-5 and floats_itk.dtype == np.float32
assert (cast != few).sum() == 1, np.unique(cast)
PY
