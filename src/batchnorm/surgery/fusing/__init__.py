"""Residual and activation computed by the batch normalization before them."""
