"""The same bits, fast: plans, programs, kernels, one pass over the inputs."""
