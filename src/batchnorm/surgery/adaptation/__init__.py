"""Batch normalization fitted to data of another distribution, and taken back."""
