"""What ``sslx data check`` finds in a source's images before a run."""
