"""What a person sees: text as one line, standard streams that hold, what a process is busy with, the live display."""
