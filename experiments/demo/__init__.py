"""The demo: train, quantize, convert to integers and hand to PyTorch; see README.md."""
