"""What runs a captioner's two halves for the loops of `search`: torch now, ONNX Runtime with `dbcap export`."""
