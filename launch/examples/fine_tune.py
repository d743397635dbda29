"""Fine-tune a trained encoder with labels: python launch/examples/fine_tune.py RUN [FOLDER]

FOLDER has a subfolder of images for each class; without it, the images are scikit-learn's digits.
"""

import sys
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder

import sslx


def main(run: str, folder: str = "") -> None:
    """Train the encoder and a linear layer on 80 % of the images, and print the accuracy on the others."""
    trained = sslx.load(run)
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype("uint8").repeat(3, axis=3)
    digits = [(trained.transform(image), int(label)) for image, label in zip(images, labels, strict=True)]
    data: Any = ImageFolder(folder, trained.transform) if folder else digits
    train, test = random_split(data, [0.8, 0.2])
    model = nn.Sequential(trained.encoder, nn.LazyLinear(len(data.classes) if folder else 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for epoch in range(3):
        for x, y in DataLoader(train, 64, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            right = sum(int((model.eval()(x).argmax(1) == y).sum()) for x, y in DataLoader(test, 256))
        print(f"epoch {epoch + 1}: {right / len(test):.1%} of {len(test)} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
