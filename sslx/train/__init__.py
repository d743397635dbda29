"""Training: the loop, one step of it, and what starts ranks and turns their outcome into exit codes."""
