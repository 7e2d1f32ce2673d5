"""Batch normalization computed by the convolution or linear layer next to it."""
