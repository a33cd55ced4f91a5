"""Loading adapters for use."""
