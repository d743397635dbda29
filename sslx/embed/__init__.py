"""Features of many images: written to a file (``sslx embed``), and searched (``sslx neighbors``)."""
