"""Everything that touches tensors: base models, methods, data, trainer, evaluation. Imports kernels and infra."""
