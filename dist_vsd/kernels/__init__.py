"""What is computed for millions of points, each in Triton's kernels for GPUs and in plain torch for all else: one function for both."""
