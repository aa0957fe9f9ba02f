"""Differential privacy: what is protected, what it costs, and who keeps the books."""
