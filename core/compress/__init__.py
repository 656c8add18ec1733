import os

# ONNX Runtime reads this variable when it is imported, here or by onnxscript. Otherwise ONNX Runtime writes identifiers to disk and sends
# telemetry over the network.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
