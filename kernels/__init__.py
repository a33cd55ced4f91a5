"""Triton kernels, each beside its plain-PyTorch reference, behind one dispatch rule. Imports nothing of the project."""
