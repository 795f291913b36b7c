"""The same network with DistributedDataParallel, for `gpu.py`.

Prints what was found so far, a line of JSON after each method.
"""

import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpu_hybrid import counted
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

RATE, MOMENTUM = 0.01, 0.9


def dense(model):
    """DistributedDataParallel as it comes."""


def bf16(model):
    model.register_comm_hook(None, default_hooks.bf16_compress_hook)


def power_sgd(model):
    state = powerSGD_hook.PowerSGDState(
        process_group=None, matrix_approximation_rank=4, start_powerSGD_iter=2
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


METHODS = {"torch dense": dense, "torch bf16": bf16, "torch power_sgd 4": power_sgd}


def train(rank, settings, port, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    n, width = settings["gpus"], settings["width"]
    torch.cuda.set_device(rank)
    torch.set_float32_matmul_precision("high")  # as JAX's default on a GPU
    dist.init_process_group("nccl", rank=rank, world_size=n)
    generator = torch.Generator().manual_seed(rank)
    shape = (settings["batch"] // n, width)
    x, y = (torch.randn(shape, generator=generator).cuda() for _ in range(2))
    results = {}
    for name in settings["methods"]:
        torch.manual_seed(0)
        layers = []
        for _ in range(settings["layers"]):
            layers += [nn.Linear(width, width), nn.ReLU()]
        model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers).cuda())
        METHODS[name](model)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
        seconds = []
        for i in range(max(settings["steps"], 48) + 5):
            if i == 5:
                before = counted()
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss = ((model(x) - y) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        dist.barrier()
        results[name] = {"step_seconds": statistics.median(seconds[5:])}
        if before is not None:
            sent = (counted() - before) / len(seconds[5:])
            results[name]["bytes_counted"] = sent / n
        if rank == 0:
            queue.put(results)
        del model, optimizer
    dist.barrier()
    dist.destroy_process_group()


def main():
    settings, port = json.loads(sys.argv[1]), int(sys.argv[2])
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    workers = mp.spawn(
        train, (settings, port, queue), nprocs=settings["gpus"], join=False
    )
    for _ in settings["methods"]:
        found = {"device": f"torch {torch.__version__}", "methods": queue.get()}
        print(json.dumps(found), flush=True)
    workers.join()


if __name__ == "__main__":
    main()
