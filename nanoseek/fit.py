"""How a run fits into the memory that there is: the largest micro-batch, layers that are computed
twice, a model that the ranks share. All of it is estimated before any work."""
import math
from bisect import bisect
from dataclasses import dataclass, replace

import torch

from nanoseek.estimate import memory_estimate

SAFE = 0.9              # the part of a limit that an estimate may fill


@dataclass
class Room:
    """The memory that a rank has, and how many ranks there are"""
    limit: float        # bytes that the rank may use; infinite where nobody says
    device: torch.device
    world: int = 1      # ranks of the run
    local: int = 1      # ranks of this machine; with fsdp, each has a part of the model

    @property
    def shared(self):
        """Whether the ranks of a machine have one memory, and copy their checkpoints there"""
        return self.device.type == 'cpu'


@dataclass
class Way:
    """How a run uses its memory"""
    batch_size: int
    twice: bool         # gradient_checkpointing: layers are computed twice
    sharded: bool       # parallel=fsdp: a rank has only a part of the model


# ------------------------------------------------------------------------ bytes of a rank


def rank_memory(model_class, c, s, dtype, room, sharded, memory):
    """Bytes that a rank needs at most, in a training step and while a checkpoint is written.
    memory: what memory_estimate says of one that is alone"""
    states, activations = memory
    need = states + activations
    if sharded:
        need = sharded_memory(model_class, c, dtype, states, activations, room.local)
    if room.shared:
        need += checkpoint_copy(model_class, c, s) / room.local
    return need


def sharded_memory(model_class, c, dtype, states, activations, shards):
    """Bytes of a rank with FSDP: its part of the states, the activations, and what is whole at a
    time: a block, the next one, the embedding and the head, with their gradients"""
    if shards == 1:
        return states + activations
    with torch.device('meta'):
        model = model_class(c)
    block = max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    ends = model.head.numel()
    if not c.tie_word_embeddings:
        ends *= 2
    parameter = 2
    if dtype == torch.float32:
        parameter = 4
    gradient = 4
    return states / shards + activations + (parameter + gradient) * (2 * block + ends)


def checkpoint_copy(model_class, c, s):
    """Bytes of the copy that is written in the background: weights and the optimizer's moments"""
    with torch.device('meta'):
        model = model_class(c)
    copies = {'adamw': 3, 'muon': 2}[s.optimizer]
    return 4 * copies * sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------- settings that fit themselves


class Needs:
    """What a run needs in each Way, estimated once"""

    def __init__(self, model_class, c, s, dtype, room):
        self.about = model_class, c, s, dtype, room
        self.known = {}

    def memory(self, way):
        """As memory_estimate has it"""
        model_class, c, s, dtype, room = self.about
        key = way.batch_size, way.twice
        if key not in self.known:
            s = replace(s, batch_size=way.batch_size, gradient_checkpointing=way.twice)
            self.known[key] = memory_estimate(model_class, c, s, dtype, room.device.type)
        return self.known[key]

    def bytes(self, way):
        return rank_memory(*self.about, way.sharded, self.memory(way))


def fit(model_class, c, s, dtype, room, shardings):
    """What batch_size=0 and parallel=auto come to, alike for all ranks. shardings: the values that
    Way.sharded may have -> a Way; what it needs, as memory_estimate has it; a line for people, or
    None. ValueError where nothing fits.

    The first of these that fits with one sequence is taken: a whole model for each rank; the same
    with layers computed twice; a model in parts; the same with layers computed twice. It gets the
    largest micro-batch that divides the rank's share of a step."""
    needs = Needs(model_class, c, s, dtype, room)
    if s.batch_size:
        sizes = [s.batch_size]
        repeats = [s.gradient_checkpointing]
    else:
        share = s.global_batch_size // room.world
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        repeats = sorted({s.gradient_checkpointing, True})
    if s.batch_size == 0 and room.limit == math.inf:
        way = Way(1, s.gradient_checkpointing, shardings[0])
        return way, needs.memory(way), ('batch_size=1: nothing here says how much memory there is; '
                                        'a larger one is faster')

    for sharded in shardings:
        for twice in repeats:
            ways = [Way(size, twice, sharded) for size in sizes]
            fitting = bisect(ways, SAFE * room.limit, key=needs.bytes)
            if fitting > 0:
                way = ways[fitting - 1]
                line = None
                if s.batch_size == 0 or len(shardings) > 1:
                    line = reason(s, room, needs, way, ways[fitting:])
                    if sharded and len(shardings) > 1:
                        line += '; parallel=fsdp: a whole model does not fit'
                return way, needs.memory(way), line
    smallest = ways[0]
    problem = advice(model_class, c, s, dtype, room, smallest)
    if s.batch_size == 0:
        raise ValueError(problem)
    return smallest, needs.memory(smallest), f'this may not fit: {problem}'


def reason(s, room, needs, way, larger):
    """A Way in words; larger: those that do not fit"""
    words = [f'batch_size={way.batch_size}: needs about {megabytes(needs.bytes(way))} of '
             f'{have(room)}']
    if larger:
        words[0] += f', the next larger one {megabytes(needs.bytes(larger[0]))}'
    if way.twice and not s.gradient_checkpointing:
        words.append('gradient_checkpointing=true: nothing fits without it')
    return '; '.join(words)


def megabytes(size):
    return f'{size / 2**20:,.0f} MB'


def have(room):
    if room.world == 1:
        return f'the {megabytes(room.limit)} that {room.device} has'
    return f'the {megabytes(room.limit)} that each of {room.world} ranks has'


def advice(model_class, c, s, dtype, room, way):
    """What a Way needs, what there is, and settings that would need less"""
    def need(**changes):
        changed = s
        if 'block_size' in changes:
            changed = replace(s, block_size=changes.pop('block_size'))
        return Needs(model_class, c, changed, dtype, room).bytes(replace(way, **changes))

    def smaller(name, size, least):
        """The largest half, quarter... of a setting that is enough; else the smallest there is"""
        size //= 2
        while size // 2 >= least and need(**{name: size}) > enough:
            size //= 2
        return size, need(**{name: size})

    enough = min(SAFE * room.limit, 0.8 * need())
    found = []
    if way.batch_size > 1:
        size, less = smaller('batch_size', way.batch_size, 1)
        whole = s.global_batch_size
        if whole == 0:
            whole = way.batch_size * room.world
        found.append(f'--batch_size={size} --global_batch_size={whole} ({megabytes(less)})')
    shortest = 1 + c.num_nextn_predict_layers
    if s.block_size // 2 >= shortest:
        size, less = smaller('block_size', s.block_size, shortest)
        found.append(f'--block_size={size} ({megabytes(less)})')
    if not way.twice:
        found.append(f'--gradient_checkpointing=true ({megabytes(need(twice=True))})')
    if not way.sharded and room.local > 1:
        found.append(f'--parallel=fsdp ({megabytes(need(sharded=True))})')
    if room.shared and room.local > 1:
        found.append('fewer ranks')
    if not found:
        found.append('a smaller model')
    return (f'{way.batch_size} x {s.block_size} tokens need about {megabytes(need())} of '
            f'{have(room)}; less: {", ".join(found)}')
