"""The moments of what layers are called with, over data."""
