"""What a client does in a round, and how its result is scored."""
