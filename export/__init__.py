"""Writes a bundle (ONNX graphs, weights, tokenizer, manifest) from a PyTorch model."""
