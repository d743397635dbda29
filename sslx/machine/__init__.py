"""What depends on the computer that this is: its cores, memory, network, environment, limits."""
