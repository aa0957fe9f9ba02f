"""The adapter in a model: what it is, where it sits, how it begins, and how it leaves."""
