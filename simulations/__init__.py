"""Simulation: Flower's `Grid` in this process (`inline_grid`) and over Ray's workers (`ray_grid`)."""
