"""The network of `gpu_hybrid.py` in PyTorch, fully sharded, on two levels.

`fully_shard` on a mesh of 2 x m shards parameters over "fsdp" and all-reduces the
shards of gradients over "dcn", in float32 or bfloat16. Started by `gpu_hybrid.py`, one
process a GPU; the first prints a line of JSON for each method.
"""

import gc
import hashlib
import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpu_hybrid import MOMENTUM, RATE, counted, serve
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

REDUCED = {"torch f32": torch.float32, "torch bf16": torch.bfloat16}


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        dense = lambda a, b: nn.Linear(a, b, bias=False)  # noqa: E731
        self.qkv, self.out = dense(width, 3 * width), dense(width, width)
        self.up, self.down = dense(width, 4 * width), dense(4 * width, width)

    def forward(self, x):
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = self.qkv(self.before(x)).chunk(3, dim=-1)
        q, k, v = (a.reshape(shape).transpose(1, 2) for a in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.between(x)), approximate="tanh"))


class Decoder(nn.Module):
    def __init__(self, settings):
        super().__init__()
        width = settings["width"]
        normal = lambda n: nn.Parameter(0.02 * torch.randn(n, width))  # noqa: E731
        self.embed = normal(settings["vocabulary"])
        self.place = normal(settings["length"])
        self.blocks = nn.ModuleList(
            Block(width, settings["heads"]) for _ in range(settings["layers"])
        )
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens):
        x = F.embedding(tokens, self.embed) + self.place
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embed.T


class Process:
    """One of the processes, with one GPU."""

    def __init__(self, index, settings):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(settings["port"])}
        self.settings, n = settings, settings["gpus"]
        self.kind = "cpu" if settings["cpu"] else "cuda"
        dist.init_process_group(
            "gloo" if settings["cpu"] else "nccl", rank=index, world_size=n
        )
        self.mesh = init_device_mesh(
            self.kind, (2, n // 2), mesh_dim_names=("dcn", "fsdp")
        )
        self.generator = torch.Generator().manual_seed(index)

    def wait(self):
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def train(self, method):
        """Trains by a method, and describes it."""
        settings = self.settings
        torch.manual_seed(0)
        with torch.device(self.kind):
            model = Decoder(settings)
        parameters = sum(p.numel() for p in model.parameters())
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=REDUCED[method]
        )
        for block in model.blocks:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        fully_shard(model, mesh=self.mesh, mp_policy=policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
        shape = settings["batch"], settings["length"] + 1
        high = settings["vocabulary"]
        tokens = torch.randint(high, shape, generator=self.generator).to(self.kind)
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, sent = [], None
        for i in range(settings["steps"] + 3):
            if i == 3:
                dist.barrier()
                sent = counted()
            self.wait()
            start = time.perf_counter()
            logits = model(tokens[:, :-1]).float().flatten(0, 1)
            loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.wait()
            seconds.append(time.perf_counter() - start)
        dist.barrier()
        seconds = seconds[3:]
        if sent is not None:
            sent = (counted() - sent) / len(seconds) / settings["gpus"]
        cuda = self.kind == "cuda"
        found = {
            "step_seconds": statistics.median(seconds),
            "seconds": seconds,
            "dcn_bytes": None,
            "dcn_counted": sent,
            "fsdp_bytes": None,
            "memory": torch.cuda.max_memory_allocated() if cuda else None,
            "loss": loss.item(),
            "identical": self.identical(model),
            "parameters": parameters,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "version": f"torch {torch.__version__}",
        }
        del model, optimizer, loss, logits
        gc.collect()
        return found

    def identical(self, model):
        """Whether both halves hold the same parameters, bit for bit."""
        digest = hashlib.sha256()
        for p in model.parameters():
            digest.update(p.to_local().detach().cpu().numpy().tobytes())
        everyone = [None] * self.settings["gpus"]
        dist.all_gather_object(everyone, digest.hexdigest())
        half = len(everyone) // 2
        return everyone[:half] == everyone[half:]


if __name__ == "__main__":
    serve(Process(int(sys.argv[2]), json.loads(sys.argv[3])))
    dist.destroy_process_group()
