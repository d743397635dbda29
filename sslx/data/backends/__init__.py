"""What reads, decodes and augments: DALI, torchvision, images in memory, and none at all.  One file each."""
