"""How the files of each ecosystem lay their tensors out: from an inert tree to arrays and QTensors."""
