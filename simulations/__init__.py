"""Simulation: many clients on one machine or a Ray cluster, in one run or in several that are compared."""
