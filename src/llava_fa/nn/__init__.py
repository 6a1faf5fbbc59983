"""Torch modules that hold packed tensors, and the surgery that puts them into a model."""
