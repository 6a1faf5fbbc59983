"""Scoring: the metrics of the benchmarks that the papers use, and the suite of the generated world."""
