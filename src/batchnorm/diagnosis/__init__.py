"""What is wrong with a model's batch normalization, and how it is repaired: evidence, then rules that judge it."""
