"""A trained checkpoint -> a bundle of ONNX graphs, each checked against PyTorch; the command `hd-export`."""
