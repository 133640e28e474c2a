"""From prepared and converted functions to the files of PyTorch, and back into training."""
