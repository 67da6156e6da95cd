"""Features -> one logit per node and pixel."""

from torch import Tensor, nn


class SegmentationHead(nn.Conv2d):
    """A biased 3 x 3 convolution; nothing after it, since losses and decoding take logits."""

    def __init__(self, in_channels: int, num_nodes: int) -> None:
        super().__init__(in_channels, num_nodes, kernel_size=3, padding=1, bias=True)

    def start_at(self, shares: Tensor) -> None:
        """Sets the bias to the logit of each node's share, so that training starts from the data's class balance."""
        self.bias.data.copy_(shares.clamp(1e-4, 1 - 1e-4).logit())
        self.weight.data.mul_(0.1)
