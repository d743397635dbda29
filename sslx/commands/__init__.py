"""What stands behind ``sslx COMMAND``: argv in, exit code out.  Flags are read before anything heavy is imported."""
