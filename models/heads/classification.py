"""Logits -> scores of all nodes."""

from torch import Tensor, nn


class ClassificationHead(nn.Module):
    """An independent sigmoid for each node: nodes on one path are true together, so a softmax would be wrong."""

    def forward(self, logits: Tensor) -> Tensor:
        """Shape: (B, N, H, W) logits -> (B, N, H, W) scores in [0, 1]."""
        return logits.sigmoid()
