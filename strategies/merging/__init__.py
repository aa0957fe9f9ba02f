"""Merging adapters that are there already, without a federation."""
