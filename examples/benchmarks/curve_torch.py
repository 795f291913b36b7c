"""The network of `curve.py` with DistributedDataParallel and its hooks.

The same order of the text, AdamW, and bfloat16 arithmetic. Started by `curve.py`, one
process a GPU; the first prints a line of JSON for each method.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from curve import Text, curve
from gpu_hybrid import serve
from gpu_hybrid_torch import Decoder
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook


def as_in_flax(decoder):
    """Matrices drawn by the law of Flax's dense layers."""
    for layer in decoder.modules():
        if isinstance(layer, nn.Linear):
            std = layer.in_features**-0.5 / 0.8796  # of the normal law before it is cut
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)


class Trained:
    """One of the processes, with one GPU."""

    def __init__(self, index, settings):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(settings["port"])}
        self.settings, self.index = settings, index
        self.kind = "cpu" if settings["cpu"] else "cuda"
        backend = "gloo" if settings["cpu"] else "nccl"
        dist.init_process_group(backend, rank=index, world_size=settings["gpus"])

    def hook(self, model, method):
        if method == "torch bf16":
            model.register_comm_hook(None, default_hooks.bf16_compress_hook)
        if method == "torch power_sgd":
            state = powerSGD_hook.PowerSGDState(
                process_group=None,
                matrix_approximation_rank=self.settings["rank"],
                start_powerSGD_iter=2,
            )
            model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    def train(self, method):
        """Trains by a method, and tells its curve."""
        settings = self.settings
        torch.manual_seed(settings["seed"])
        torch.set_float32_matmul_precision("high")
        with torch.device(self.kind):
            decoder = Decoder(settings)
        as_in_flax(decoder)
        model = nn.parallel.DistributedDataParallel(decoder)
        self.hook(model, method)
        factor = settings["rates"].get("dense f32", 1.0)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            factor * settings["lr"],
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True,
        )
        warm = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda t: min(1.0, t / settings["warm_up"])
        )
        text = Text(settings)
        mine = slice(
            self.index * settings["batch"], (self.index + 1) * settings["batch"]
        )

        def loss_of(rows):
            tokens = torch.from_numpy(rows[mine]).long().to(self.kind)
            with torch.autocast(self.kind, torch.bfloat16):
                logits = model(tokens[:, :-1])
            logits = logits.float().flatten(0, 1)
            return F.cross_entropy(logits, tokens[:, 1:].flatten())

        def wait():
            if self.kind == "cuda":
                torch.cuda.synchronize()

        def step(t):
            optimizer.zero_grad()
            loss_of(text.batch(t)).backward()
            optimizer.step()
            warm.step()
            return wait

        def everyone(value, operation):
            value = torch.tensor(value, device=self.kind)
            dist.all_reduce(value, operation)
            return value.item()

        def tested():
            with torch.no_grad():
                losses = [loss_of(r).item() for r in text.unseen(settings["tests"])]
            total = everyone(sum(losses) / len(losses), dist.ReduceOp.SUM)
            return total / settings["gpus"]

        points = curve(
            settings, step, tested, lambda clock: everyone(clock, dist.ReduceOp.MAX)
        )
        cuda = self.kind == "cuda"
        return {
            "points": points,
            "factor": factor,
            "parameters": sum(p.numel() for p in model.parameters()),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "version": f"torch {torch.__version__}",
        }


if __name__ == "__main__":
    serve(Trained(int(sys.argv[2]), json.loads(sys.argv[3])))
    dist.destroy_process_group()
