"""The network and what changes it: one optimiser step, and all of it that a checkpoint holds."""

import contextlib
import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs.config import Config
from manage import distributed
from manage.inference import autocast, chosen_amp
from manage.network import build_network, load_start_weights, load_weights
from manage.training_report import say
from utils.dataset import Sample
from utils.hierarchy import Hierarchy
from utils.losses import build_criterion


class Learner:
    """Network, averaged weights, criterion, optimiser and scaler. `pixels` has the train photos' pixels of each node.

    Raises: UserError where the config asks for what cannot be.
    """

    def __init__(self, config: Config, hierarchy: Hierarchy, pixels: Sequence[int], device: torch.device) -> None:
        self.config, self.hierarchy, self.device = config, hierarchy, device
        self.amp = chosen_amp(device, config.amp)
        on_gpu_in_half = device.type == "cuda" and self.amp != "off"
        is_channels_last = on_gpu_in_half if config.channels_last == "auto" else config.channels_last
        self.layout = torch.channels_last if is_channels_last else torch.preserve_format
        self.network = build_network(config, hierarchy)
        counts = torch.tensor(pixels, dtype=torch.float64)
        self.network.segmentation_head.start_at(counts / counts[list(hierarchy.roots)].sum().clamp(min=1))
        self.network.to(device, memory_format=self.layout)
        self.ema = EMA(self.network, config.ema_decay) if config.ema_decay else None
        self.criterion = build_criterion(config.criterion, hierarchy, config.gamma, config.compile)
        if config.compile:  # makes the tree's tables, whose making inside would have it compiled twice
            with torch.no_grad():
                logits = torch.zeros(1, hierarchy.num_nodes, 1, 1, device=device)
                self.criterion(logits, torch.zeros(1, 1, 1, device=device))
        self.optimizer = build_optimizer(self.network, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")
        self.trained: nn.Module = torch.compile(self.network) if config.compile else self.network
        if distributed.world() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.trained = DistributedDataParallel(self.trained, device_ids=ids)

    def start(self) -> None:
        """Takes the weights that a training starts from. Raises: UserError when they cannot be had."""
        load_start_weights(self.network, self.hierarchy, self.config, say)
        if self.ema:
            self.ema = EMA(self.network, self.config.ema_decay)

    @property
    def scored(self) -> nn.Module:
        """The network that is validated and kept: that of the averaged weights, if there are any."""
        return self.ema.module if self.ema else self.network

    def set_train_mode(self, is_frozen: bool) -> None:
        """`is_frozen`: the encoder learns nothing, not even the statistics of BatchNorm."""
        self.trained.train()
        if is_frozen:
            self.network.encoder.eval()
        if self.config.freeze_batchnorm:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def step(self, group: Sequence[Sample], lr: float, is_frozen: bool = False) -> Tensor:
        """Forward, loss, backward, optimiser step; returns loss, norm of the gradient and scale of fp16.

        The loss of each part is weighted by its share of known pixels, so that batches, accumulated batches and
        processes add up to the gradient of one large batch. Nothing here waits for the device: whether the step was
        finite is read some steps later, and before anything is saved.
        """
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr * (self.config.encoder_lr_factor if parameters["is_encoder"] else 1.0)
        shares = self._shares([batch.labels for batch in group])
        step_loss, world = torch.zeros((), device=self.device), distributed.world()
        self.optimizer.zero_grad(set_to_none=True)
        for part, batch in enumerate(group):
            with contextlib.nullcontext() if part == len(group) - 1 or world == 1 else self.trained.no_sync():
                with autocast(self.device, self.amp):
                    logits = self.trained(batch.image.to(memory_format=self.layout))
                loss = self.criterion(logits.float(), batch.labels) * shares[part]
                self.scaler.scale(loss * world).backward()  # DDP averages, we want the sum
            step_loss += loss.detach()
        distributed.sum_over_processes([step_loss])
        if is_frozen:  # no step without a gradient, and none in the norm that is clipped
            self.network.encoder.zero_grad(set_to_none=True)
        norm = self._clip()
        self.scaler.step(self.optimizer)
        scale = self.scaler.scale(torch.ones_like(step_loss)) * self.scaler.is_enabled()
        self.scaler.update()
        if self.ema:
            self.ema.update(self.network)
        return torch.stack([step_loss, norm, scale])

    def state(self) -> dict:
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "ema_updates": self.ema.updates if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        }

    def load_state(self, state: dict, source: str) -> None:
        load_weights(self.network, state["model"], source)
        if self.ema:
            load_weights(self.ema.module, state["ema"], source)
            self.ema.updates = int(state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"]["torch"])
        if self.device.type == "cuda" and state["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)

    def _shares(self, labels: list[Tensor]) -> Tensor:
        """The share of each part in the known pixels of all parts and processes."""
        known = torch.stack([(part != self.hierarchy.ignore_index).sum() for part in labels])
        total = known.sum()
        distributed.sum_over_processes([total])
        return known / total.clamp(min=1)

    def _clip(self) -> Tensor:
        """The norm of the gradient before it is clipped."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
        return norm


class EMA:
    """`module` is the average: validated, kept in checkpoints and used for prediction.

    In its first updates the decay grows as (1 + n) / (10 + n) up to `decay`, so that a short run does not average in
    its random start. The number of updates is a plain number: nothing waits for the device.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Takes the network's weights of now into the average; counters are copied."""
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [*zip(self.module.state_dict().values(), network.state_dict().values(), strict=True)]
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([own for own, _ in averaged], [new for _, new in averaged], weight)
        for own, new in pairs:
            if not own.is_floating_point():
                own.copy_(new)
        self.updates += 1


def seed_everything(config: Config) -> None:
    """Of the weights, and of encoders that drop by chance; loading has seeds of its own."""
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)


def build_optimizer(network: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW; biases and normalisation are not decayed."""
    encoder = {*network.encoder.parameters()}
    groups = [
        {"params": params, "weight_decay": decay, "is_encoder": is_encoder}
        for is_encoder in (False, True)
        for decay, of_kind in ((config.weight_decay, lambda p: p.ndim > 1), (0.0, lambda p: p.ndim <= 1))
        if (params := [p for p in network.parameters() if (p in encoder) == is_encoder and of_kind(p)])
    ]
    # fused: one pass over the weights (a fifth of the time on a CPU), and fp16 need not wait for its overflow flag
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
        for parameter in network.parameters():  # left uninitialised by a first step that overflows in fp16
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


@dataclass
class Step:
    """The numbers of one optimiser step: known at once, and (`values`) on their way from the device."""

    number: int
    lr: float
    photos: list[Tensor]  # indices of its photos
    values: Tensor

    def __post_init__(self) -> None:
        self.on_host, self.copied = self.values.to("cpu", non_blocking=True), None
        if self.values.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> tuple[float, float, bool]:
        """Loss, norm of the gradient, and whether they are finite.

        In fp16 an overflow lowers the scale; it counts where that has fallen below 1, which is no help.
        """
        if self.copied is not None:
            self.copied.synchronize()  # some steps ago: the device has work left meanwhile
        loss, norm, scale = self.on_host.tolist()
        is_overflow = 1 <= scale < math.inf
        return loss, norm, math.isfinite(loss) and (math.isfinite(norm) or is_overflow)
