"""Adapters in other tools' formats: read, written, cut down to a LoRA, and merged with proof.

One file per format, each a pure conversion between `lora_layers.LoraLayer`s and what the other tool stores.
"""
