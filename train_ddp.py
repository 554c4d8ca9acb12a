"""Train a model on many devices: the loop of train.py, under torchrun.

    torchrun --standalone --nproc_per_node=4 train_ddp.py config/smol135.py
    torchrun --standalone --nproc_per_node=8 train_ddp.py config/v3_mini.py --parallel=fsdp

All settings are train.py's; batch_size is of one device, global_batch_size of all. Rank 0 writes
the same checkpoints, from which any number of devices goes on, and train.py as well when
global_batch_size is set. Without GPUs the ranks are processes on the CPU and talk through gloo.
"""
import nanoseek.tuning  # noqa: F401  # first: it acts before torch is loaded

import datetime
import gc
import os
import sys
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import config
import train
from model import Config, Transformer
from nanoseek.checkpoint import checkpoints
from nanoseek.device import memory_limit, pick_device
from nanoseek.fit import Room, sharded_memory


Parallel = Literal['auto', 'ddp', 'fsdp']


@dataclass
class Settings(train.Settings):
    """Training settings"""
    parallel: Parallel = 'auto'         # ddp: all devices have all; fsdp: parts; auto: what fits
    timeout_minutes: float = 10.0       # a rank that waits longer for the others ends the run


class Ranks:
    """One process per device: what train.OneDevice is to a single one"""

    def __init__(self, s):
        self.rank = int(os.environ['RANK'])
        self.world = int(os.environ['WORLD_SIZE'])
        self.local = int(os.environ['LOCAL_WORLD_SIZE'])    # ranks of this machine
        on_gpus = torch.cuda.is_available() and s.device in ('auto', 'cuda')
        if on_gpus:
            self.device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        else:
            self.device = torch.device('cpu')
        _, self.dtype = pick_device(s, self.device)
        self.shardings = [False, True]
        if s.parallel != 'auto':
            self.shardings = [s.parallel == 'fsdp']
        elif self.dtype == torch.float16 or self.world == 1:
            self.shardings = [False]
        self.sharded = self.shardings[0]
        if self.sharded and self.dtype == torch.float16:
            raise ValueError('parallel=fsdp, dtype=float16: its scaler sees one shard only; take '
                             'bfloat16 or float32')
        self.connect(on_gpus, datetime.timedelta(minutes=s.timeout_minutes))

    def connect(self, on_gpus, timeout):
        # The store outlives a restart of the workers: without a prefix they would find the
        # addresses of the dead
        store, _, _ = next(dist.rendezvous('env://', timeout=timeout))
        options = {
            'store': dist.PrefixStore(f'restart-{restarts()}', store),
            'rank': self.rank,
            'world_size': self.world,
            'timeout': timeout,
        }
        if on_gpus:
            torch.cuda.set_device(self.device)
            dist.init_process_group('nccl', device_id=self.device, **options)
        else:
            dist.init_process_group('gloo', **options)

    def room(self, device):
        """The memory that a rank may use: as much as the one that has least"""
        ranks = 1
        if device.type == 'cpu':
            ranks = self.local
        limit = torch.tensor(memory_limit(device, ranks), dtype=torch.float64, device=device)
        dist.all_reduce(limit, dist.ReduceOp.MIN)
        return Room(limit.item(), device, self.world, self.local)

    def wrap(self, model):
        """-> what is called in the model's place"""
        # of torch 2.13, about broadcast_buffers=False: counts and biases are each rank's own
        warnings.filterwarnings('ignore', message='.*broadcast_buffers', category=FutureWarning)
        if self.sharded:
            self.model = self.shard(model)
        else:
            self.model = DistributedDataParallel(model, broadcast_buffers=False,
                                                 gradient_as_bucket_view=True)
        return self.model

    def shard(self, model):
        """FSDP2: a block is whole while it computes, in bfloat16 where matmuls are; routers stay
        float32"""
        mesh = self.mesh()
        low = None
        if self.dtype == torch.bfloat16:
            low = torch.bfloat16
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        for moe in model.moe_layers:
            fully_shard(moe.gate, mesh=mesh, mp_policy=MixedPrecisionPolicy())
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, 'hidden')       # which text samples call by itself
        return model

    def mesh(self):
        """The devices. Each of several nodes has all shards, so that only gradients travel between
        nodes (hybrid sharding)"""
        if self.local == self.world:
            return init_device_mesh(self.device.type, (self.world,), mesh_dim_names=('devices',))
        shape = (self.world // self.local, self.local)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=('nodes', 'devices'))

    def accumulate(self, last):
        """The context of a micro-step, forward and backward: between ranks, gradients travel in the
        last one only. With fsdp in all of them: whole gradients would not fit"""
        if last or self.sharded:
            return nullcontext()
        return self.model.no_sync()

    def sum(self, x):
        """A tensor summed over ranks"""
        total = x.clone()
        dist.all_reduce(total)
        return total

    def mean(self, x):
        """A number's mean over ranks; x is a tensor"""
        return self.sum(x / self.world).item()

    def all(self, flag):
        """Whether it is true on all ranks"""
        return not self.any(not flag)

    def any(self, flag):
        """Whether it is true on any rank"""
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def first(self, f):
        """What f() is on rank 0"""
        found = [None]
        if self.rank == 0:
            found = [f()]
        dist.broadcast_object_list(found, device=self.device)
        return found[0]

    def whole(self, x):
        """A tensor of which every rank may have only a part"""
        if isinstance(x, DTensor):
            return x.full_tensor()
        return x

    def part(self, x, like):
        """The part of x that this rank has of the tensor like"""
        if not isinstance(like, DTensor):
            return x
        x = x.to(like.device)
        return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)

    def close(self):
        """The end of a run. DDP's reducer goes before the group: as its last owner it would end it
        with Python's lock held, and wait forever for a thread of gloo's that wants the lock"""
        self.model = None
        gc.collect()
        dist.destroy_process_group()


def restarts():
    """How often torchrun has started the workers again"""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def costs(s, c, dtype, memory):
    """Lines of a table: memory and traffic of a device, for 1 to 512 devices, with batch_size each.
    memory: of one device, as memory_estimate has it. A ring all-reduce of n bytes sends 2n (N-1)/N
    per device, an all-gather or a reduce-scatter half of that"""
    states, activations = memory
    with torch.device('meta'):
        model = Transformer(c)
    P = sum(p.numel() for p in model.parameters())
    size = 2                    # bytes of a parameter that computes
    if dtype == torch.float32:
        size = 4
    yield 'devices | micro-steps | ddp: memory, sent per step | fsdp: memory, sent per step (GB)'
    for n in (2 ** i for i in range(10)):
        local = min(n, 8)           # shards are in a node of eight
        nodes = max(n // 8, 1)      # gradients travel between nodes
        batch = s.global_batch_size
        if batch == 0:
            batch = s.batch_size * n
        micro = max(batch // (s.batch_size * n), 1)
        copies = states + activations
        sharded = sharded_memory(Transformer, c, dtype, states, activations, local)
        ddp_sent = 8 * P * (n - 1) / n
        in_node = (2 * size + 4) * (local - 1) / local
        between = 8 / local * (nodes - 1) / nodes
        fsdp_sent = micro * P * (in_node + between)
        yield (f'{n:7} | {micro:11} | {copies / 1e9:11.2f}, {ddp_sent / 1e9:13.2f} | '
               f'{sharded / 1e9:12.2f}, {fsdp_sent / 1e9:13.2f}')


def load_settings():
    s, model_settings = train.load_settings(Settings, __doc__)
    if s.max_steps == 0:
        c, dtype, memory = train.show_model(s, model_settings)
        print(*costs(s, c, dtype, memory), sep='\n')
        sys.exit(0)
    if 'RANK' not in os.environ:
        raise ValueError('start it with torchrun: torchrun --standalone --nproc_per_node=2 '
                         'train_ddp.py ...')
    if restarts() and checkpoints(s.out_dir):
        s.resume = 'auto'       # never, or from a certain one, was for the first start
    return s, model_settings


@contextmanager
def silent_errors():
    """config.user_errors of the other ranks of a node: one line is enough"""
    config.guard_output()
    try:
        yield
    except (ValueError, OSError):
        sys.exit(2)


def main():
    errors = config.user_errors
    if int(os.environ.get('LOCAL_RANK', 0)) > 0:
        errors = silent_errors
    if int(os.environ.get('RANK', 0)) > 0:
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')    # rank 0 speaks
    with errors():
        s, model_settings = load_settings()
        ranks = Ranks(s)
    train.main(s, model_settings, ranks, errors)
    ranks.close()


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
