"""The device that computes: which one, what it can do, how fast it is, how much memory it has."""
import contextlib
import importlib.util
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch


def pick_device(s, own=None):
    """settings, and the rank's own device if it has one -> torch.device, dtype of the matmuls.
    ValueError where the device cannot be used"""
    best = 'cpu'
    if torch.cuda.is_available():
        best = 'cuda'
    elif torch.backends.mps.is_available():
        best = 'mps'
    wanted = s.device
    if own is not None:
        wanted = own
    elif wanted == 'auto':
        wanted = best
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f'device={s.device}: not usable here ({reason}); --device={best} '
                         'is') from e
    if s.dtype == 'auto':
        return device, fast_dtype(device)
    return device, getattr(torch, s.dtype)


def fast_dtype(device):
    """The dtype of matmuls in which the device is fast, and which it does not only emulate"""
    if device.type == 'cuda':
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == 'cpu':
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16
    return torch.float32


def to_device(arrays, device):
    """numpy arrays -> tensors on the device; on a GPU without waiting for the copies"""
    tensors = [torch.from_numpy(a) for a in arrays]
    if device.type == 'cuda':
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(device) for t in tensors]


# ------------------------------------------------------------------------- speed


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product, measured: what MFU is a fraction of"""
    n = 1024
    if device.type == 'cuda':
        n = 8192
    generator = torch.Generator()       # the run's own random numbers stay as they are
    a, b = torch.randn(2, n, n, generator=generator).to(device, dtype)
    times = []
    while len(times) < 8 and sum(times) < 0.5:
        began = time.perf_counter()
        (a @ b)[0, 0].item()            # waits for it
        times.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(times)


def check_fp8(recipe, device, dtype):
    """ValueError where the matmuls cannot be in float8"""
    if device.type != 'cuda' or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f'fp8={recipe}: device={device} has no FP8: it takes a GPU of compute '
                         'capability 8.9 or above')
    if dtype != torch.bfloat16:
        raise ValueError(f'fp8={recipe}: what is not FP8 must be bfloat16, not '
                         f'dtype={str(dtype)[6:]}')
    if importlib.util.find_spec('torchao') is None:
        raise ValueError(f'fp8={recipe} needs its package: pip install torchao')


def fits_fp8(module, name):
    """Linears of attention, dense and shared MLPs, with widths that are multiples of 16"""
    if not isinstance(module, torch.nn.Linear):
        return False
    if '.self_attn.' not in name and '.mlp.' not in name:
        return False
    return all(n > 0 and n % 16 == 0 for n in module.weight.shape)


def to_fp8(model, recipe, emulate=False):
    """Linears that fit multiply in float8 from now on, forward and backward. Their weights and
    names stay. emulate: rounds as float8 does, on any device"""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    if not any(fits_fp8(module, name) for name, module in model.named_modules()):
        raise ValueError(f'fp8={recipe}: no linear layer of this model has widths that are '
                         'multiples of 16')
    options = Float8LinearConfig.from_recipe_name(recipe)
    options = replace(options, emulate=emulate, pad_inner_dim=True)     # any number of rows
    convert_to_float8_training(model, config=options, module_filter_fn=fits_fp8)


def wants_compile(s, device):
    if s.compile == 'auto':
        return device.type == 'cuda'
    return s.compile


def in_a_line(error):
    """The beginning of an error's text, which may have many lines"""
    words = ' '.join(str(error).split())
    if not words:
        words = type(error).__name__
    return words[:120]


def compiled(model, forward, s, device, amp):
    """forward compiled where that is wanted and works, else as it is, and why it does not work, or
    None. amp: makes the context of a forward pass"""
    if not wants_compile(s, device):
        return forward, None
    problem = None
    idx = torch.zeros(s.batch_size, s.block_size, dtype=torch.int64, device=device)
    try:
        fast = torch.compile(forward)
        with torch.random.fork_rng():
            with amp():
                _, loss = fast(idx, idx)
            loss.backward()
    except Exception as e:      # no compiler, or one that cannot: whatever its layers raise
        problem = f'torch.compile does not work here ({in_a_line(e)})'
        fast = forward
    model.zero_grad(set_to_none=True)
    model.expert_load.zero_()
    return fast, problem


# ------------------------------------------------------------------------ memory


def is_out_of_memory(error):
    """Whether an error says so, of whatever layer of torch's"""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return 'allocate memory' in text or 'tried to allocate' in text


def peak_memory(device):
    """MB that this process has needed at most, on the GPU or in RAM; 0 where nobody counts"""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:         # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == 'darwin':
        return peak / 2 ** 20   # bytes there, KiB elsewhere
    return peak / 2 ** 10


def memory_limit(device, ranks=1):
    """Bytes that this process may have on the device; infinite where nobody says. On a GPU that is
    what is free now; on a CPU, the processes (ranks) of this machine share its memory"""
    if device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)    # the latter is this process's own
    try:
        import resource
    except ImportError:         # Windows
        return math.inf
    limits = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'), *container_limits()]
    limits = [limit / ranks for limit in limits]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space > 0:
        limits.append(address_space)
    python_and_torch = 2 ** 29
    return min(limits) - python_and_torch


def container_limits(root=Path('/')):
    """-> bytes that the containers (cgroups) around this process may have, of version 2 and 1.
    A container sees its own limit at the top, a Slurm job somewhere below"""
    try:
        lines = (root / 'proc/self/cgroup').read_text(encoding='utf-8').splitlines()
    except OSError:             # not Linux
        return []
    files = []
    for line in lines:
        _, controllers, group = line.split(':', 2)      # '0::/slice/job', '4:memory:/job'
        if controllers == '':
            top = root / 'sys/fs/cgroup'
            name = 'memory.max'
        elif 'memory' in controllers.split(','):
            top = root / 'sys/fs/cgroup/memory'
            name = 'memory.limit_in_bytes'
        else:
            continue
        inner = top / group.strip('/')
        files.append(top / name)
        for folder in (inner, *inner.parents):
            if top in folder.parents:
                files.append(folder / name)
    found = []
    for file in files:
        with contextlib.suppress(OSError, ValueError):      # 'max' is no limit
            found.append(int(file.read_text(encoding='utf-8')))
    return found
