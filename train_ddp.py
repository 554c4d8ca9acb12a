"""Train a model on many devices: the loop of train.py, under torchrun.

    torchrun --standalone --nproc_per_node=4 train_ddp.py config/smol135.py
    torchrun --standalone --nproc_per_node=8 train_ddp.py config/v3_mini.py --parallel=fsdp

All settings are train.py's; batch_size is of one device, global_batch_size of all. Rank 0 writes the same checkpoints,
from which any number of devices goes on, train.py as well, when global_batch_size is set. Without GPUs the ranks are
processes on the CPU and talk through gloo.
"""
import nanoseek.tuning  # noqa: F401  # first: it acts before torch is loaded

import datetime, os, sys, warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import config
import train
from model import Config, Transformer
from nanoseek.device import pick_device
from nanoseek.estimate import memory_estimate

RESTARTS = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))    # how often torchrun has started the workers again

@dataclass
class Settings(train.Settings):
    """Training settings"""
    parallel: Literal['ddp', 'fsdp'] = 'ddp'  # ddp: every device has all; fsdp: parameters, gradients, AdamW in shards
    timeout_minutes: float = 10.0       # a rank that waits longer for the others ends the run

class Ranks:
    """One process per device: what train.OneDevice is to a single one"""
    def __init__(self, s):
        self.rank, self.world, local, here = (
            int(os.environ[n]) for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'))
        self.shape = (self.world // here, here) if here < self.world else (self.world,)     # nodes, devices of a node
        cuda = torch.cuda.is_available() and s.device in ('auto', 'cuda')
        self.device = torch.device('cuda', local) if cuda else torch.device('cpu')
        self.sharded, self.settings = s.parallel == 'fsdp', s
        if self.sharded and pick_device(s, self.device)[1] == torch.float16:
            raise ValueError('parallel=fsdp, dtype=float16: its scaler sees one shard only; take bfloat16 or float32')
        if cuda:
            torch.cuda.set_device(self.device)
        wait = datetime.timedelta(minutes=s.timeout_minutes)
        # The store outlives a restart of the workers: without a prefix they would find the addresses of the dead
        store = dist.PrefixStore(f'restart-{RESTARTS}', next(dist.rendezvous('env://', timeout=wait))[0])
        dist.init_process_group('nccl' if cuda else 'gloo', store=store, rank=self.rank, world_size=self.world,
                                device_id=self.device if cuda else None, timeout=wait)

    def wrap(self, model):
        """-> what is called in the place of the model"""
        warnings.filterwarnings('ignore', message='.*broadcast_buffers', category=FutureWarning)    # of torch 2.13
        self.model = self.shard(model) if self.sharded else DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True)   # counts and biases are each rank's own
        return self.model

    def shard(self, model):
        """FSDP2: a block is whole while it computes, in bfloat16 where matmuls are; routers stay float32. With several
        nodes each has all shards, so that only gradients travel between them (hybrid sharding)"""
        mesh = init_device_mesh(self.device.type, self.shape, mesh_dim_names=('nodes', 'devices')[-len(self.shape):])
        low = torch.bfloat16 if pick_device(self.settings, self.device)[1] == torch.bfloat16 else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        for moe in model.moe_layers:
            fully_shard(moe.gate, mesh=mesh, mp_policy=MixedPrecisionPolicy())
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, 'hidden')
        return model

    def accumulate(self, last):
        """The context of a micro-step, forward and backward: between ranks, gradients travel after the last one only"""
        return nullcontext() if last or self.sharded else self.model.no_sync()  # fsdp: whole gradients would not fit

    def sum(self, x):
        """x summed over ranks"""
        dist.all_reduce(x := x.clone())
        return x

    def all(self, flag):
        """Whether it is true on all ranks"""
        return not self.any(not flag)

    def any(self, flag):
        """Whether it is true on any rank"""
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def first(self, f):
        """What f() is on rank 0"""
        found = [f() if self.rank == 0 else None]
        dist.broadcast_object_list(found, device=self.device)
        return found[0]

    def whole(self, x):
        """A tensor of which every rank may have a part only"""
        return x.full_tensor() if isinstance(x, DTensor) else x

    def part(self, x, like):
        """The part of x that this rank has of the tensor like"""
        return x if not isinstance(like, DTensor) else distribute_tensor(
            x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

def costs(s, c, dtype):
    """Lines of a table: memory and traffic of a device, for numbers of devices from 1 to 512, with batch_size each. A
    ring all-reduce of n bytes sends 2n (N-1)/N per device, an all-gather or a reduce-scatter half of that."""
    states, activations = memory_estimate(Transformer, c, s, dtype, pick_device(s)[0].type)
    with torch.device('meta'):
        model = Transformer(c)
    P, size = sum(p.numel() for p in model.parameters()), 4 if dtype == torch.float32 else 2    # bytes that compute
    block = max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    whole = 2 * block + model.head.numel() * (1 if c.tie_word_embeddings else 2)    # this block, the next, and the ends
    yield 'devices | micro-steps | ddp: memory, sent per step | fsdp: memory, sent per step (GB)'
    for n in (2 ** i for i in range(10)):
        micro = max((s.global_batch_size or s.batch_size * n) // (s.batch_size * n), 1)
        local, nodes = min(n, 8), max(n // 8, 1)        # shards in a node of eight, gradients between nodes
        sharded = states / local + (size + 4) * whole * (n > 1) + activations
        sent = micro * P * ((2 * size + 4) * (local - 1) / local + 8 / local * (nodes - 1) / nodes)
        yield (f'{n:7} | {micro:11} | {(states + activations) / 1e9:11.2f}, {8 * P * (n - 1) / n / 1e9:13.2f} | '
               f'{sharded / 1e9:12.2f}, {sent / 1e9:13.2f}')

def main():
    given, model_settings = config.load(Settings, Config, usage=__doc__)
    settings = Settings(**given)
    if settings.max_steps == 0:
        (one := train.OneDevice()).costs = costs
        train.setup(settings, model_settings, one)
    if 'RANK' not in os.environ:
        raise ValueError('start it with torchrun: torchrun --standalone --nproc_per_node=2 train_ddp.py ...')
    if RESTARTS and train.checkpoints(settings.out_dir):
        settings.resume = 'auto'        # never, or from a certain one, was for the first start
    return settings, model_settings

@contextmanager
def silent_errors():
    """config.user_errors of the other ranks of a node: one line is enough"""
    try:
        yield
    except (ValueError, OSError):
        sys.exit(2)

if __name__ == '__main__':
    if int(os.environ.get('RANK', 0)):
        sys.stdout = open(os.devnull, 'w')      # rank 0 speaks
    if int(os.environ.get('LOCAL_RANK', 0)):
        config.user_errors = silent_errors
    with config.user_errors():
        settings, model_settings = main()
        ranks = Ranks(settings)
    try:
        train.main(settings, model_settings, ranks)
        dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
