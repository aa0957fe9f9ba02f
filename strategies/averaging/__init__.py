"""Averages of clients: robust ones, private ones, and steps of a server along them."""
