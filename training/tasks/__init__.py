"""Built-in task generators: seeded, and disjoint between splits by construction."""
