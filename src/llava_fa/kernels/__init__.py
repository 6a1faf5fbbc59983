"""One op, several implementations, one place that chooses."""
