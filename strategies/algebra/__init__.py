"""The linear algebra that methods share."""
