import os

# ONNX Runtime reads this when it is imported, by us or by onnxscript. Without it, it writes identifiers to disk and reports over the network.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
