"""Moving adapters to another base model with synthetic data (Trans-LoRA, arXiv 2405.17258)."""
