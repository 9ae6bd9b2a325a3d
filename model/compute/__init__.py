"""How a step is computed: batches, precision, kernels, processes, optimizers."""
