"""What a file says of quantization: one dialect a file, all of them behind one protocol."""
