#!/usr/bin/env bash
# MaxUnpool with output_shape: ONNX's own reference and ONNX Runtime read the same indices in different pictures.
#
# Expected: a flat index of MaxUnpool means row * width + column in the picture that the operator returns, whose size
#           the input output_shape gives (as in torch.nn.functional.max_unpool2d with output_size).
# Happens:  so it is in ONNX Runtime. ONNX's reference evaluator reads it in the picture of the size that MaxUnpool
#           would have *without* output_shape, here 4x4, and pads the result with zeros at the right and below to 5x5.
#           Index 5 is pixel (1, 0) for the one and (1, 1) for the other; index 18, which a pooling of a 5x5 picture
#           does return, is an IndexError in the reference.
# Versions: onnx 1.23.2, onnxruntime 1.32.0.
# Source:   onnx/reference/ops/op_max_unpool.py, the test case maxunpool_export_with_output_shape of
#           onnx/backend/test/case/node/maxunpool.py, and the text of MaxUnpool ("output_shape").
# Means:    checking an exported SegNet on odd sizes with the reference evaluator, or with a converter that follows it,
#           fails or moves pixels, while PyTorch and ONNX Runtime agree. Check with ONNX Runtime, or pad pictures to
#           multiples of the total stride, where both readings are the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, checker, helper
from onnx.reference import ReferenceEvaluator

node = helper.make_node("MaxUnpool", ["X", "I", "output_shape"], ["Y"], kernel_shape=[2, 2], strides=[2, 2])
graph = helper.make_graph(
    [node],
    "unpool",
    [
        helper.make_tensor_value_info("X", TensorProto.FLOAT, [1, 1, 2, 2]),
        helper.make_tensor_value_info("I", TensorProto.INT64, [1, 1, 2, 2]),
        helper.make_tensor_value_info("output_shape", TensorProto.INT64, [4]),
    ],
    [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["n", "c", "h", "w"])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
checker.check_model(model, full_check=True)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
reference = ReferenceEvaluator(model)


def pixels(engine, indices, side):
    """(row, column) of the values 1, 2, 3, 4 after unpooling to side x side."""
    values = np.arange(1, 5, dtype=np.float32).reshape(1, 1, 2, 2)
    feeds = {"X": values, "I": np.array(indices).reshape(1, 1, 2, 2), "output_shape": np.array([1, 1, side, side])}
    picture = engine.run(None, feeds)[0][0, 0]
    return [tuple(int(i) for i in np.argwhere(picture == value)[0]) for value in range(1, 5)]


even = [pixels(engine, [5, 7, 13, 15], 4) for engine in (session, reference)]
odd = [pixels(engine, [5, 7, 13, 15], 5) for engine in (session, reference)]
print("indices 5 7 13 15 to 4x4: onnxruntime", even[0], "reference", even[1])
print("indices 5 7 13 15 to 5x5: onnxruntime", odd[0], "reference", odd[1])
print("indices 6 8 16 18 to 5x5: onnxruntime", pixels(session, [6, 8, 16, 18], 5), end=" ")
try:
    pixels(reference, [6, 8, 16, 18], 5)
    raised = ""
except IndexError as error:
    raised = str(error)
print("reference IndexError:", raised)

corners = [(1, 1), (1, 3), (3, 1), (3, 3)]
assert even == [corners, corners], even  # the control: where the sizes agree, so do the engines
assert pixels(session, [6, 8, 16, 18], 5) == corners  # what one would expect: row * 5 + column
assert odd == [[(1, 0), (1, 2), (2, 3), (3, 0)], corners], odd  # the surprise
assert "out of bounds" in raised, raised
PY
