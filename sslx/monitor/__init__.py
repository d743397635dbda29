"""Monitoring of an encoder while it trains: the health of its features, and an online probe if there are labels."""
