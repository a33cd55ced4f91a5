"""Training on data that stay where they are: shards of clients, and what a server makes of their LoRAs."""
