"""The first floor: the definition, faster. Plain tensors in, plain tensors out."""
