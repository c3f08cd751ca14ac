"""What makes steps fast, and nothing of the method: loops of CPUs, kernels and graphs of GPUs."""
