"""Random calls of batch normalization, judged by float64 mathematics, with guarded memory."""
