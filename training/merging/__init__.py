"""Merging adapters of one base model: tensors in, tensors out; the methods by name are in merge.py."""
