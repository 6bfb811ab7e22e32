#!/usr/bin/env bash
# OpenVINO's max-pooling of minus infinity is a finite number, with index 0 for every window.
#
# Expected: the maximum of a window that holds only -inf is -inf, and its index points into that window, as in PyTorch
#           and ONNX Runtime.
# Happens:  OpenVINO returns -3.4028235e+38, the most negative finite float32, and index 0 for all windows, wherever
#           they are. Windows with a finite maximum are right.
# Versions: openvino 2026.4.1 (CPU, INFERENCE_PRECISION_HINT f32), onnxruntime 1.32.0 as the control, onnx 1.23.2.
# Source:   observed: this is what a search gives that starts at std::numeric_limits<float>::lowest() and index 0, and
#           takes only what is strictly larger. The specification of the operation, MaxPool-8, does not say so.
# Means:    networks that set pixels to -inf to keep them out of a pooling get finite values back: a later
#           isinf() test fails, a softmax over such scores is uniform instead of NaN, and an unpooling with the indices
#           writes all masked windows to the top left pixel. Use a finite mask value such as -1e4.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet openvino==2026.4.1 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper

node = helper.make_node("MaxPool", ["X"], ["Y", "Indices"], kernel_shape=[2, 2], strides=[2, 2])
graph = helper.make_graph(
    [node],
    "pool",
    [helper.make_tensor_value_info("X", TensorProto.FLOAT, [1, 1, 4, 4])],
    [
        helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1, 1, 2, 2]),
        helper.make_tensor_value_info("Indices", TensorProto.INT64, [1, 1, 2, 2]),
    ],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
core = openvino.Core()
compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def run(image):
    """Values and indices from ONNX Runtime and from OpenVINO, flat."""
    results = compiled([image])
    pairs = session.run(None, {"X": image}), [results[output] for output in compiled.outputs]
    return [[part.ravel().tolist() for part in pair] for pair in pairs]


image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
(runtime, vino) = run(image)
assert runtime == vino == [[5, 7, 13, 15], [5, 7, 13, 15]], (runtime, vino)  # the control: finite values

image[:, :, 2:] = -np.inf  # the two lower windows are masked
(runtime, vino) = run(image)
print("onnxruntime:", *runtime)
print("openvino:   ", *vino)
assert runtime == [[5, 7, -np.inf, -np.inf], [5, 7, 8, 10]], runtime  # what one would expect
lowest = float(np.finfo(np.float32).min)
assert vino == [[5, 7, lowest, lowest], [5, 7, 0, 0]], vino  # the surprise
PY
