"""Checkpoints, masks and model families; torch to ONNX. Needs torch."""
