"""What depends on the computer that this is: cores, memory, network, environment, limits, bugs of its libraries."""
