"""Client side: the Flower ClientApp that trains the adapter on rows that stay where they are."""
