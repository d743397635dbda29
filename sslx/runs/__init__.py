"""What stands in a run folder."""
