"""Benchmarks of g2r_fast against what people do today; see README.md in this folder."""
