"""Runs as jobs of a cluster: what a job asks for, its submission, its state, its requeueing."""
