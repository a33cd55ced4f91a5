"""Measuring a model: exact match, multiple choice, perplexity; with intervals and paired tests."""
