"""One fold of classify.py while it is trained: network, optimiser, schedule, batches, and where they stand.

As in the same group's classifier of these data (FDDM, MICCAI 2023): SGD, binary cross-entropy with logits, the rate
halved when the validation score stalls.
"""

import math

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import ReduceLROnPlateau

from classification import network as classifiers
from classification.batches import Batches, ImageStore, ahead
from core.errors import UserError
from core.random import generator
from metrics.classification import all_scores

OPTIMISERS = {"sgd": {"lr": 1e-3, "weight_decay": 1e-4}, "adamw": {"lr": 1e-4, "weight_decay": 1e-2}}
MOMENTUM = 0.9
STALL, FROM_EPOCH, MIN_LR = 5, 5, 1e-7  # halve the rate after 5 epochs without progress, from epoch 5; stop below 1e-7


class Training:
    """One fold: the network, its optimiser and schedule, and where they stand."""

    def __init__(self, args, accelerator, fold):
        self.args, self.accelerator, self.fold = args, accelerator, fold
        net = classifiers.build(args.backbone, len(fold.label_names), args.image_size, args.global_seed,
                                args.pretrained, args.pretrained_file)
        if accelerator.num_processes > 1:
            net = classifiers.synchronise_batch_norm(net)
        kind = torch.optim.SGD if args.optimizer == "sgd" else torch.optim.AdamW
        momentum = {"momentum": MOMENTUM} if args.optimizer == "sgd" else {}
        optimiser = kind(net.parameters(), lr=args.lr, weight_decay=args.weight_decay, **momentum)
        # torch lets `patience` epochs pass and acts after one more
        self.schedule = ReduceLROnPlateau(optimiser, "max", factor=0.5, patience=STALL - 1, threshold=0)
        self.net, self.optimiser = accelerator.prepare(net, optimiser)
        limit = args.cache_gb * 1e9
        store = ImageStore(fold.training.paths, args.image_size, limit)
        self.validation = ImageStore(fold.validation.paths, args.image_size, limit)
        self.batch = min(args.global_batch_size, len(fold.training))
        self.batches = Batches(store, self.batch, args.augment, args.global_seed, fold.number)
        self.steps_per_epoch = args.steps_per_epoch or self.batches.per_pass
        self.step, self.best, self.best_epoch = 0, -math.inf, 0

    @property
    def epoch(self):
        return self.step // self.steps_per_epoch

    @property
    def lr(self):
        return self.optimiser.param_groups[0]["lr"]

    @property
    def finished(self):
        stalled = self.args.early_stopping and self.epoch - self.best_epoch >= self.args.early_stopping
        return self.epoch >= self.args.epochs or self.lr < MIN_LR or stalled

    def epoch_of_batches(self):
        """What this process sees from here to the end of the epoch."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        end = (self.epoch + 1) * self.steps_per_epoch
        return ahead(lambda s: self.batches(s, rank, processes), range(self.step, end), self.args.num_workers)

    def train_step(self, numbers, pixels):
        """One optimiser step; returns this process's share of the mean loss, so that the sum is the mean."""
        self.net.train()
        where = generator(self.args.global_seed, "dropout", self.fold.number, self.step, self.accelerator.process_index)
        torch.manual_seed(where.initial_seed())  # backbones with dropout draw from the global stream
        labels = torch.as_tensor(self.fold.training.labels[numbers]).to(self.accelerator.device)
        logits = self.net(pixels.to(self.accelerator.device))
        share = binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")
        share = share / (self.batch * labels.shape[1])
        self.accelerator.backward(share * self.accelerator.num_processes)  # DDP averages over the processes
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return share.detach()

    def validate(self):
        """mAP of the validation images after an epoch; adjusts the learning rate. Is it the best so far?"""
        net = self.accelerator.unwrap_model(self.net).eval()

        @torch.inference_mode()
        def scores(images):
            return net(torch.from_numpy(images).to(self.accelerator.device)).float().sigmoid().cpu().numpy()

        found = self.predict(scores, self.validation)
        if not np.isfinite(found).all():
            raise UserError(f"the network is not finite at step {self.step}; lower --lr or use bf16 for fp16")
        value = all_scores(found, self.fold.validation.labels, self.fold.label_names)["macro"]["ap"]
        value = broadcast_object_list([value])[0]  # the processes must agree on what is best
        if self.epoch >= FROM_EPOCH:
            self.schedule.step(value)
        if value > self.best:
            self.best, self.best_epoch = value, self.epoch
        return value, self.best_epoch == self.epoch

    def predict(self, scores, store):
        """`scores(uint8 (n, S, S, 3)) -> (n, K)` of all images of a store, in order; each process does its share."""
        mine = list(range(len(store.paths)))[self.accelerator.process_index::self.accelerator.num_processes]
        made, size = [], self.args.eval_batch_size
        for part in (mine[i:i + size] for i in range(0, len(mine), size)):
            made += zip(part, scores(store.stack(part, self.args.num_workers)), strict=True)
        return np.stack([row for _, row in sorted(gather_object(made), key=lambda pair: pair[0])])

    def state(self):
        scaler = self.accelerator.scaler
        return {"opt": self.optimiser.state_dict(), "schedule": self.schedule.state_dict(), "step": self.step,
                "scaler": scaler.state_dict() if scaler else {}, "best": self.best, "best_epoch": self.best_epoch}

    def save(self, file, **more):
        if self.accelerator.is_main_process:
            net = self.accelerator.unwrap_model(self.net)
            classifiers.save(file, net, self.args.backbone, self.fold.label_names, method=self.args.method,
                             fold=self.fold.number, epoch=self.epoch, validation_map=self.best, **more)
        self.accelerator.wait_for_everyone()

    def restore(self, file):
        found = classifiers.read(file, "last checkpoint")
        state = found["training"]
        self.accelerator.unwrap_model(self.net).backbone.load_state_dict(found["model"])
        self.optimiser.load_state_dict(state["opt"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.best_epoch = state["step"], state["best"], state["best_epoch"]
