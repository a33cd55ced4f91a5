"""The regraft command (Typer + Rich)."""
