"""The pixels of scikit-learn's digits as features, in two parts."""

import torch
from sklearn.datasets import load_digits

from sslx.probe.features import Features

_PIXELS, _LABEL = map(torch.from_numpy, load_digits(return_X_y=True))
TRAIN_LABEL, TEST_LABEL = _LABEL[:1200], _LABEL[1200:]
TRAIN = Features(_PIXELS[:1200].float(), TRAIN_LABEL, torch.arange(1200))
TEST = Features(_PIXELS[1200:].float(), TEST_LABEL, torch.arange(len(TEST_LABEL)))
