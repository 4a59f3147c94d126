"""Directions: which subspaces weights and answers span. It knows tensors, and no room."""
