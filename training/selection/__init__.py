"""Choosing which examples to train on."""
