"""The device that computes: what it can do, how fast it is, how much memory it has."""
import contextlib
import ctypes
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch


def pick_device(s, given=None):
    """Return the torch.device of the settings, or the given one, and the dtype of its matmuls."""
    best = 'cpu'
    if torch.accelerator.is_available():
        best = torch.accelerator.current_accelerator().type
    name = given or s.device.replace('auto', best)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f'device={name} cannot be used here; --device={best} can '
                         f'({one_line(e)})') from e
    return device, fast_dtype(device) if s.dtype == 'auto' else getattr(torch, s.dtype)


def fast_dtype(device):
    """Return the fastest dtype of matmuls that the device runs natively."""
    if device.type == 'cuda':
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == 'cpu':
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16
    return torch.float32


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(arrays, device):
    """Return numpy arrays as tensors on the device. On a GPU, nothing waits for the copies."""
    tensors = [torch.from_numpy(a).contiguous() for a in arrays]    # compiled for one layout
    if device.type == 'cuda':
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(device) for t in tensors]


def matmul_rate(device, dtype):
    """Return the measured FLOP/s of a large matmul, of which MFU is a fraction."""
    n = 8192 if device.type == 'cuda' else 1024
    a, b = torch.randn(2, n, n, generator=torch.Generator()).to(device, dtype)  # not the run's
    times = []
    while len(times) < 8 and sum(times) < 0.5:
        start = time.perf_counter()
        (a @ b)[0, 0].item()            # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(times)


def fits_fp8(module, name):
    """Whether it is a linear layer of attention or a dense or shared MLP, in multiples of 16."""
    is_linear = isinstance(module, torch.nn.Linear) and ('self_attn' in name or 'mlp' in name)
    return is_linear and all(n > 0 and n % 16 == 0 for n in module.weight.shape)


def to_fp8(model, recipe, device):
    """Make the linear layers that fit multiply in float8. Their weights and names stay."""
    if device.type != 'cuda' or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f'fp8={recipe} needs a GPU of compute capability 8.9 or above, which '
                         f'device={device} is not')
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    options = replace(Float8LinearConfig.from_recipe_name(recipe), pad_inner_dim=True)
    convert_to_float8_training(model, config=options, module_filter_fn=fits_fp8)


def wants_compile(s, device):
    return s.compile is True or (s.compile == 'auto' and device.type == 'cuda')


def compile_model(model, forward, s, device, dtype):
    """Return forward, compiled if that is wanted and works, and a problem in one line or None."""
    if not wants_compile(s, device):
        return forward, None
    compiled = torch.compile(forward)
    idx = torch.zeros(s.batch_size, s.block_size, dtype=torch.int64, device=device)
    problem = None
    try:
        with torch.random.fork_rng(), autocast(device, dtype):
            _, loss = compiled(idx, idx, model.target_counts(idx).float())
        loss.backward()
    except Exception as e:              # any layer of torch, or the compiler that it calls
        problem = f'torch.compile does not work here ({one_line(e)})'
        compiled = forward
    model.zero_grad(set_to_none=True)
    model.expert_load.zero_()
    return compiled, problem


def one_line(error):
    return ' '.join(repr(error).split())[:120]


def keep_freed_memory():
    """Make glibc keep freed blocks of up to 8 MB: new pages slow a CPU's steps, docs/lab.md."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        libc.mallopt(-3, 2**23)         # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)     # M_TRIM_THRESHOLD


def peak_memory(device):
    """Return the most MB that this process has used."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == 'darwin' else peak / 2**10


def memory_limit(device, ranks=1):
    """Return the bytes free on a GPU, or a CPU process's share of the machine or its cgroup."""
    if device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    limits = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / ranks]
    with contextlib.suppress(OSError, ValueError):          # no Linux, or 'max'
        group = Path('/proc/self/cgroup').read_text().rpartition('0::/')[2].strip()
        limits.append(int(Path('/sys/fs/cgroup', group, 'memory.max').read_text()) / ranks)
    return min(limits) - 2**29                              # Python and torch
