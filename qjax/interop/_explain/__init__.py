"""What a checkpoint means, in words, tables and pictures; and where two of them differ."""
