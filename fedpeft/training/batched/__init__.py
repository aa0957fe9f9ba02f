"""Many clients in one forward: each row goes through its own client's adapter, and the frozen base is run once."""
