"""Fair comparisons of normalization: arms, data, training, results, verdict and report, one module each."""
