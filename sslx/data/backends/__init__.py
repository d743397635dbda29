"""Backends, which read, decode and augment images: DALI, torchvision, images in memory, and synthetic images."""
