"""Photos whose annotators stopped half-way down the tree are worth having."""

import torch

from utils.losses import LOSSES

FINE, COARSE, VAL = 24, 600, 2000  # pixels labelled with parts, with halves only, and to score
FEATURES = 24


def test_half_labelled_pixels_help_at_their_level(tree):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(tree.num_nodes, FEATURES, generator=generator)
    labels = torch.tensor(tree.leaves)[torch.randint(len(tree.leaves), (FINE + COARSE + VAL,), generator=generator)]
    pixels = means[labels] + 2.5 * torch.randn(len(labels), FEATURES, generator=generator)
    halves = torch.tensor(tree.level_of(labels.numpy(), level=1))

    def score(used: int) -> float:
        """Accuracy at the level of halves after training on the first pixels."""
        given = torch.cat([labels[:FINE], halves[FINE:used]])
        weights = torch.zeros(FEATURES, tree.num_nodes, requires_grad=True)
        optimizer = torch.optim.AdamW([weights], lr=0.05, weight_decay=0.1)
        for _ in range(150):
            logits = (pixels[:used] @ weights).T[None, :, None]  # (1, N, 1, pixels)
            optimizer.zero_grad()
            LOSSES["ce"](logits, given[None, None], tree).backward()
            optimizer.step()
        scores = (pixels[-VAL:] @ weights)[:, list(tree.leaves)]
        found = torch.tensor(tree.leaves)[scores.argmax(1)]
        return (torch.tensor(tree.level_of(found.numpy(), level=1)) == halves[-VAL:]).double().mean().item()

    alone, together = score(FINE), score(FINE + COARSE)
    assert together > alone + 0.1, (alone, together)
