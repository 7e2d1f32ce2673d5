"""Running statistics taken anew over data."""
