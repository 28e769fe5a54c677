"""One fold of classify.py while it is trained: network, optimiser, schedule, batches, and the state they are in.

As in the same group's classifier of these data (FDDM, MICCAI 2023): SGD, binary cross-entropy with logits, the
learning rate halved when the validation score stalls.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import ReduceLROnPlateau

from classification import network as classifiers
from classification.batches import Batches, ImageStore, prefetch
from classification.dropout import DropoutByImage
from core import schema
from core.errors import UserError
from core.files import refused
from core.random import generator
from core.schema import Number
from core.tensors import all_finite
from metrics.classification import all_scores

MOMENTUM = 0.9
STALL, FROM_EPOCH = 5, 5  # the learning rate is halved after 5 epochs without progress, counted from epoch 5 on
MIN_LR = 1e-7  # below it training ends
STATE = {"opt": {}, "schedule": {}, "scaler": {}, "step": Number(), "best_epoch": Number(),
         "best": Number(-math.inf, math.inf, False)}  # schema of `Training.state`


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained, whatever the images; the names are those of classify.py's flags."""

    backbone: str
    pretrained: bool
    pretrained_file: Path | None
    image_size: int  # pixels
    augment: str
    epochs: int  # at most
    steps_per_epoch: int | None  # None: as many as the training images fill
    early_stopping: int | None  # epochs without a better validation mAP; None: never
    global_batch_size: int  # over all processes
    optimizer: str
    lr: float
    weight_decay: float
    global_seed: int
    cache_gb: float
    num_workers: int
    eval_batch_size: int

    def network(self, labels):
        """The network before its training, with one output for each label. Raises UserError."""
        return classifiers.build(self.backbone, labels, self.image_size, self.global_seed, self.pretrained,
                                 self.pretrained_file)

    def optimiser(self, net):
        if self.optimizer == "sgd":
            return torch.optim.SGD(net.parameters(), lr=self.lr, momentum=MOMENTUM, weight_decay=self.weight_decay)
        return torch.optim.AdamW(net.parameters(), lr=self.lr, weight_decay=self.weight_decay)


class Training:
    """One fold: the network, its optimiser and schedule, and how far they are."""

    def __init__(self, recipe, accelerator, fold):
        self.recipe, self.accelerator, self.fold = recipe, accelerator, fold
        net = recipe.network(len(fold.label_names))
        if accelerator.num_processes > 1:
            net = classifiers.synchronise_batch_norm(net)
        optimiser = recipe.optimiser(net)
        # torch waits for `patience` epochs without progress and acts after one more.
        self.schedule = ReduceLROnPlateau(optimiser, "max", factor=0.5, patience=STALL - 1, threshold=0)
        self.net, self.optimiser = accelerator.prepare(net, optimiser)
        limit = recipe.cache_gb * 1e9  # bytes
        self.validation = ImageStore(fold.validation.paths, recipe.image_size, limit)
        self.batch = min(recipe.global_batch_size, len(fold.training))
        self.data = Batches(ImageStore(fold.training.paths, recipe.image_size, limit), self.batch, recipe.augment,
                            recipe.global_seed, fold.number)
        self.steps_per_epoch = recipe.steps_per_epoch or self.data.steps_per_epoch
        self.step, self.best, self.best_epoch = 0, -math.inf, 0
        self.drops = True  # until a step shows that the network has no dropout

    @property
    def epoch(self):
        return self.step // self.steps_per_epoch

    @property
    def last_step(self):
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def lr(self):
        return self.optimiser.param_groups[0]["lr"]

    @property
    def finished(self):
        patience = self.recipe.early_stopping
        stalled = patience is not None and self.epoch - self.best_epoch >= patience
        return self.step >= self.last_step or self.lr < MIN_LR or stalled

    @property
    def bare_net(self):
        """The network itself, without what accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.net, keep_torch_compile=False)

    def batches(self):
        """This process's shares of the batches from here to the last step, prefetched: see `Batches.share`."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return prefetch(lambda step: self.data.share(step, rank, processes), range(self.step, self.last_step),
                        self.recipe.num_workers)

    def train_step(self, indices, pixels):
        """One optimiser step -> this process's share of the mean loss: the sum over the processes is the mean."""
        processes = self.accelerator.num_processes
        draws = generator(self.recipe.global_seed, "network", self.fold.number, self.step)
        torch.manual_seed(draws.initial_seed())  # what a network draws once for all images, it draws here
        self.net.train()
        labels = torch.as_tensor(self.fold.training.labels[indices]).to(self.accelerator.device)  # (n, K)
        with self.dropout(len(indices)) as dropout:
            logits = self.net(pixels.to(self.accelerator.device))  # (n, K)
        self.drops = self.drops and dropout.drew
        share = binary_cross_entropy_with_logits(logits, labels, reduction="sum") / (self.batch * labels.shape[1])
        self.accelerator.backward(share * processes)  # DDP averages the gradients over the processes
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        return share.detach()

    def dropout(self, count):
        """A context in which this process's `count` images drop what a function of (seed, fold, step, place) says.

        It slows every operation a little; so it is left out once a step has shown that the network drops nothing.
        """
        if not self.drops:
            return nullcontext()
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        draw = self.recipe.global_seed, "dropout", self.fold.number, self.step
        return DropoutByImage([generator(*draw, rank + i * processes) for i in range(count)])

    def validate(self):
        """After an epoch: score the validation images, adjust the learning rate -> (mAP, whether it is the best)."""
        net = self.bare_net.eval()

        @torch.inference_mode()
        def probabilities(images):
            return net(torch.from_numpy(images).to(self.accelerator.device)).sigmoid().cpu().numpy()

        scores = self.predict(probabilities, self.validation)
        if not np.isfinite(scores).all():
            raise UserError(f"the network is not finite at step {self.step}; lower --lr or use bf16 for fp16")
        value = all_scores(scores, self.fold.validation.labels, self.fold.label_names)["macro"]["ap"]
        value = broadcast_object_list([value])[0]  # the processes must agree on what is best
        if self.epoch >= FROM_EPOCH:
            self.schedule.step(value)
        if value > self.best:
            self.best, self.best_epoch = value, self.epoch
        return value, self.best_epoch == self.epoch

    def predict(self, probabilities, store):
        """`probabilities(uint8 (n, S, S, 3)) -> (n, K)` of a store's images, in order; each process does a share."""
        mine = range(self.accelerator.process_index, len(store.paths), self.accelerator.num_processes)
        rows, size = [], self.recipe.eval_batch_size
        for start in range(0, len(mine), size):
            part = mine[start:start + size]
            rows += zip(part, probabilities(store.stack(part, self.recipe.num_workers)), strict=True)
        return np.stack([row for _, row in sorted(gather_object(rows), key=lambda pair: pair[0])])

    def state(self):
        """What training needs beside the weights to go on."""
        scaler = self.accelerator.scaler
        return {"opt": self.optimiser.state_dict(), "schedule": self.schedule.state_dict(), "step": self.step,
                "scaler": scaler.state_dict() if scaler else {}, "best": self.best, "best_epoch": self.best_epoch}

    def save(self, file, method, **more):
        """Write the network as it is now; with `training=self.state()` it can be trained further from there."""
        if not all_finite(self.bare_net.state_dict().values()):
            raise UserError(f"the network is not finite at step {self.step}; the last checkpoint stays; lower --lr or "
                            "use bf16 for fp16")
        if self.accelerator.is_main_process:
            classifiers.save(file, self.bare_net, self.recipe.backbone, self.fold.label_names, method=method,
                             fold=self.fold.number, epoch=self.epoch, validation_map=self.best, seen=self.fold.seen,
                             synthetic=len(self.fold.training) - self.fold.real, **more)
        self.accelerator.wait_for_everyone()

    def restore(self, file):
        """Go on from a file of `save` with `training`. Raises UserError."""
        checkpoint = classifiers.read(file, "last checkpoint")
        with refused(file, "remove it to train this fold anew"):
            schema.check(checkpoint, {"training": STATE})
            state = checkpoint["training"]
            self.bare_net.backbone.load_state_dict(checkpoint["model"])
            self.optimiser.load_state_dict(state["opt"])
            self.schedule.load_state_dict(state["schedule"])
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, self.best, self.best_epoch = state["step"], state["best"], state["best_epoch"]
