"""Train a model on many devices: the loop of train.py, under torchrun.

    torchrun --standalone --nproc_per_node=4 train_ddp.py config/smol135.py
    torchrun --standalone --nproc_per_node=8 train_ddp.py config/v3_mini.py --parallel=fsdp

All settings are train.py's: batch_size is per device, global_batch_size for all of them. Rank 0
writes the same checkpoints. Any number of devices continues from one, and so does train.py if
global_batch_size is set. Without GPUs, the ranks are processes on the CPU that talk through gloo.
"""
import os
os.environ.setdefault('GOMP_SPINCOUNT', '3000')     # idle threads must not slow the busy ones

import datetime
import gc
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.nn.parallel import DistributedDataParallel

import train
from nanoseek import settings
from nanoseek.checkpoint import checkpoints
from nanoseek.device import autocast, keep_freed_memory, memory_limit, pick_device


@dataclass
class Settings(train.Settings):
    """Training settings"""
    parallel: Literal['auto', 'ddp', 'fsdp'] = 'auto'  # ddp: copies; fsdp: shards; auto: what fits
    timeout_minutes: float = 10.0       # a rank that waits longer for the others ends the run


class Ranks:
    """One process per device, with the interface of train.OneDevice"""

    def __init__(self, s):
        self.rank = int(os.environ['RANK'])
        self.world = int(os.environ['WORLD_SIZE'])
        device = s.device.replace('auto', 'cpu')
        if torch.cuda.is_available() and s.device in ('auto', 'cuda'):
            device = f'cuda:{os.environ["LOCAL_RANK"]}'
        self.device, self.dtype = pick_device(s, device)
        self.shardings = {'ddp': [False], 'fsdp': [True], 'auto': [False, True]}[s.parallel]
        if s.parallel == 'auto' and (self.dtype == torch.float16 or self.world == 1):
            self.shardings = [False]
        self.sharded = self.shardings[0]
        settings.require(s, 'parallel', not self.sharded or self.dtype != torch.float16,
                         'ddp with dtype=float16, whose scaler would see one shard only; or take '
                         'bfloat16 or float32')
        self.connect(datetime.timedelta(minutes=s.timeout_minutes))
        ranks = 1
        if self.device.type == 'cpu':
            ranks = int(os.environ['LOCAL_WORLD_SIZE'])     # they share the machine's memory
        limit = torch.tensor(memory_limit(self.device, ranks), dtype=torch.float64,
                             device=self.device)
        dist.all_reduce(limit, dist.ReduceOp.MIN)
        self.limit = limit.item()                   # bytes, alike on all ranks

    def connect(self, timeout):
        # The store outlives a restart of the workers. Without a prefix, they would find the
        # addresses of the dead
        store, _, _ = next(dist.rendezvous('env://', timeout=timeout))
        store = dist.PrefixStore(f'restart-{restarts()}', store)
        options = {'store': store, 'rank': self.rank, 'world_size': self.world, 'timeout': timeout}
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
            dist.init_process_group('nccl', device_id=self.device, **options)
        else:
            dist.init_process_group('gloo', **options)

    def autocast(self):
        return autocast(self.device, self.dtype)

    def wrap(self, model):
        # torch 2.13 warns of broadcast_buffers=False: counts and biases are each rank's own
        warnings.filterwarnings('ignore', message='.*broadcast_buffers')
        if self.sharded:
            self.model = self.shard(model)
        else:
            self.model = DistributedDataParallel(model, broadcast_buffers=False,
                                                 gradient_as_bucket_view=True)
        return self.model

    def shard(self, model):
        """Shard with FSDP2. A block is whole while it computes, in bfloat16 if that is the dtype
        of matmuls; routers stay float32."""
        mesh = init_device_mesh(self.device.type, (self.world,))
        compute = None
        if self.dtype == torch.bfloat16:
            compute = torch.bfloat16
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for moe in model.moe_layers:
            fully_shard(moe.gate, mesh=mesh, mp_policy=MixedPrecisionPolicy())
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        policy = replace(policy, cast_forward_inputs=False)     # counts of targets stay exact
        fully_shard(model, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, 'hidden')       # text samples call it directly
        return model

    def accumulate(self, last):
        if last or self.sharded:                    # whole gradients of all shards would not fit
            return nullcontext()
        return self.model.no_sync()

    def sum(self, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag):
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def first(self, function, *args):
        results = [None]
        if self.rank == 0:
            results = [function(*args)]
        dist.broadcast_object_list(results, device=self.device)
        return results[0]

    def close(self):
        """DDP's reducer must go before the process group. As the group's last owner, it would end
        it with Python's lock held, and wait forever for a gloo thread that wants that lock."""
        self.model = None
        gc.collect()
        dist.destroy_process_group()


def restarts():
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def main():
    s, given = train.load_settings(Settings, __doc__)
    if s.max_steps == 0:
        return train.show(s, given)
    if 'RANK' not in os.environ:
        raise ValueError('start it with torchrun: torchrun --standalone --nproc_per_node=2 '
                         'train_ddp.py ...')
    if restarts() and checkpoints(s.out_dir):
        s.resume = 'auto'           # never, or a checkpoint, was meant for the first start
    keep_freed_memory()
    ranks = Ranks(s)
    train.main(s, given, ranks)
    ranks.close()


if __name__ == '__main__':
    if int(os.environ.get('RANK', 0)) > 0:
        sys.stdout = open(os.devnull, 'w')          # rank 0 speaks
    others = int(os.environ.get('LOCAL_RANK', 0)) > 0
    with settings.user_errors(train.OUT_OF_MEMORY, quiet=others):
        main()
