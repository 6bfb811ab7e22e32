#!/usr/bin/env bash
# Asking ONNX Runtime for the indices of a max-pooling changes its values.
#
# Expected: the output "Y" of MaxPool does not depend on whether the model also asks for the optional output "Indices".
# Happens:  where the input has NaN, it does. Without indices one window of this picture keeps its NaN and another
#           drops it; with indices it is the other way round. PyTorch keeps both.
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source:   onnxruntime/core/providers/cpu/nn/pool.cc ("Use MLAS pooling if the index output tensor is not used"): one
#           of two implementations runs, a vectorized one or loops that compare with ">". ONNX's text of MaxPool says
#           nothing about NaN.
# Means:    a NaN that PyTorch would carry to the loss may vanish inside an exported encoder, and a SegNet (pooling with
#           indices) hides other NaNs than a plain encoder. Look for NaN before the export, not in its output.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper


def pooled(image, outputs):
    """Y of a 2x2 max-pooling in a model that has the given outputs."""
    kinds = {"Y": TensorProto.FLOAT, "Indices": TensorProto.INT64}
    node = helper.make_node("MaxPool", ["X"], outputs, kernel_shape=[2, 2], strides=[2, 2])
    graph = helper.make_graph(
        [node],
        "pool",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, image.shape)],
        [helper.make_tensor_value_info(name, kinds[name], [1, 2, 2, 2]) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["Y"], {"X": image})[0][0, 0].ravel()


image = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
clean = [pooled(image, ["Y"]), pooled(image, ["Y", "Indices"])]
image[0, 0, 0, 0] = np.nan  # the first element of the first window
image[0, 0, 1, 3] = np.nan  # the last element of the second window
values, values_beside_indices = pooled(image, ["Y"]), pooled(image, ["Y", "Indices"])
print("no NaN:              ", clean[0], clean[1])
print("NaN, Y alone:        ", values)
print("NaN, Y and Indices:  ", values_beside_indices)

# The control: without NaN both models agree.
np.testing.assert_array_equal(clean[0], [5, 7, 13, 15])
np.testing.assert_array_equal(clean[1], [5, 7, 13, 15])
# The surprise.
np.testing.assert_array_equal(values, [5, np.nan, 13, 15])
np.testing.assert_array_equal(values_beside_indices, [np.nan, 6, 13, 15])
PY
