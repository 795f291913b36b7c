"""One worker of `cluster.py` that trains the same network with PyTorch DDP."""

import os
import sys

import torch
import torch.distributed as dist
from cluster_task import (
    CLASSES,
    LAYERS,
    LEARNING_RATE,
    MOMENTUM,
    PIXELS,
    RANK,
    WARM_UP,
    WIDTH,
    task_of,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook


def dense(model):
    """DistributedDataParallel as it comes."""


def fp16(model):
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)


def powersgd(model):
    state = powerSGD_hook.PowerSGDState(
        process_group=None,
        matrix_approximation_rank=RANK,
        start_powerSGD_iter=WARM_UP - 1,  # dense until then; at least 2
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


METHODS = {
    "torch dense": dense,
    "torch fp16": fp16,
    f"torch powersgd-{RANK}": powersgd,
}


def network():
    sizes = [PIXELS] + LAYERS * [WIDTH] + [CLASSES]
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        linear = nn.Linear(inputs, outputs)
        nn.init.normal_(linear.weight, std=inputs**-0.5)  # as Flax has it
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def training(register_hook):
    """The step of one worker, which returns its own loss."""
    torch.manual_seed(0)
    # All gradients in one bucket: with several, PowerSGD's messages mix up over gloo.
    model = nn.parallel.DistributedDataParallel(network(), bucket_cap_mb=1024)
    register_hook(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def step(batch):
        images, labels = map(torch.from_numpy, batch)
        loss = nn.functional.cross_entropy(model(images), labels.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main():
    task = task_of(sys.argv[1])
    os.environ["GLOO_SOCKET_IFNAME"] = task.interface
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{task.address}",
        world_size=task.workers,
        rank=task.rank,
    )
    task.save({name: task.time(training(METHODS[name])) for name in task.methods})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
