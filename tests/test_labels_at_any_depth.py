"""Photos whose annotators stopped half-way down the tree are worth having."""

import numpy as np
import pytest
import torch

from models.hseg import HSEG
from tools.make_sample_data import Settings, draw_sample
from utils.decode import DECODERS
from utils.losses import LOSSES
from utils.metrics import LevelScores

SIZE, STEPS, BATCH = 64, 150, 8
FINE, COARSE, VAL = 16, 16, 60  # photos labelled with parts, photos labelled with upper and lower body only, val photos


@pytest.fixture(scope="module")
def photos(tree):
    """Drawn photos and label maps. Shape: (P, 3, 64, 64), (P, 64, 64) uint8."""
    settings = Settings(train=FINE + COARSE, val=VAL, size=SIZE, seed=5)
    images, labels = [], []
    for index in range(FINE + COARSE + VAL):
        photo, mask = draw_sample(settings, index)
        images.append(np.array(photo)[:SIZE, :SIZE])
        labels.append(np.array(mask)[:SIZE, :SIZE])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(labels))


def level2_score(images, labels, used, tree) -> float:
    """mIoU2 on the val photos after training on the photos `used`: same network, same number of steps."""
    torch.manual_seed(0)
    network = HSEG("resnet18", tree.num_nodes, decoder_channels=(64, 48, 32, 32, 16)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for _ in range(STEPS):
        batch = used[torch.randperm(len(used))[:BATCH]]
        views, targets = images[batch], labels[batch]
        if torch.rand(()) < 0.5:
            views, targets = views.flip(-1), targets.flip(-1)
        loss = LOSSES["ce"](network(views), targets, tree)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    meter = LevelScores(tree)
    with torch.inference_mode():
        for image, label in zip(images[-VAL:, None], labels[-VAL:, None], strict=True):
            logits = network.eval()(image)
            meter.update(DECODERS["leaf"](logits, tree), label)
    return meter.compute()["mIoU2"]


@pytest.mark.slow
def test_half_labelled_photos_help_at_their_level(photos, tree):
    images, labels = photos
    mixed = labels.clone()
    mixed[FINE : FINE + COARSE] = tree.level_of(labels[FINE : FINE + COARSE], level=1)
    assert {*mixed[FINE : FINE + COARSE].unique().tolist()} <= {0, 8, 9}, "only labels of level 2 there"

    alone = level2_score(images, labels, torch.arange(FINE), tree)
    together = level2_score(images, mixed, torch.arange(FINE + COARSE), tree)
    assert together > alone + 0.02
