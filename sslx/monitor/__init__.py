"""What is watched while an encoder trains: the health of its features, and an online probe where there are labels."""
