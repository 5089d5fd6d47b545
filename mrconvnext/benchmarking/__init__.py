"""What `benchmark_throughput.py` is made of: rows, models, timing and reports."""
