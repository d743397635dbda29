"""sslx: self-supervised pretraining of image encoders.  Importing it imports nothing heavy."""

__version__ = "0.2.0"
