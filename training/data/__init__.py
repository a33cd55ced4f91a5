"""Examples: reading them from files, turning them into token ids, collating them into batches."""
