"""All that a GPU has to show: commands, one after the other, each in a process of its own with a
time of its own, and a table of what they found. One that fails is a row; the others go on.
"""
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

GOAL_NATS = 1.4697                      # of nanoGPT's shakespeare_char.py, per character
COLUMNS = ('part', 'what', 'found', 'spread', 'wanted', '')
# sequences of a step, with which all that bench.py compares fits into 80 GB together
BATCHES = {'smol135_dense': 16, 'smol135': 8, 'v3_tiny': 16}
FP8 = {'bfloat16': (), 'tensorwise': ('--fp8=tensorwise',), 'rowwise': ('--fp8=rowwise',)}
TINY = ['--hidden_size=32', '--num_hidden_layers=1', '--num_attention_heads=2', '--vocab_size=64',
        '--intermediate_size=64', '--moe_intermediate_size=32', '--batch_size=2',
        '--global_batch_size=2', '--block_size=32', '--max_position_embeddings=64',
        '--kv_lora_rank=16', '--qk_nope_head_dim=8', '--qk_rope_head_dim=8', '--v_head_dim=16',
        '--device=cpu', '--dtype=float32', '--compile=false']
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1']
SHORT = ['--eval_interval=0', '--warmup_steps=1', '--log_interval=1', '--sample_interval=0',
         '--checkpoint_interval=0']
GQA = ['--num_key_value_heads=1', '--head_dim=16']


@dataclass
class Row:
    """A line of the table"""
    what: str
    found: str
    spread: str = ''
    wanted: str = ''
    met: object = None              # True, False, or None where there is nothing to be met

    def cells(self, part, small):
        verdict = {True: 'met', False: 'missed', None: ''}[self.met]
        if small and self.wanted not in ('ok', 'the same'):
            verdict = ''                # numbers of a miniature mean nothing
        return part, self.what, self.found, self.spread, self.wanted, verdict


@dataclass
class Part:
    """A command, and what its output says. read: lines of stdout -> list of Row"""
    name: str
    command: list                   # behind python; None: it needs a GPU
    read: object
    seconds: float                  # it may take so long


class Problem(Exception):
    """Why a command found nothing, in a line"""


# --------------------------------------------------------------------- what commands say


def read_proofs(lines):
    rows = []
    for line in lines:
        proof = json.loads(line)
        said = proof['problem']
        if said is None:
            said = 'ok'
        rows.append(Row(proof['name'].replace('_', ' '), said, '', 'ok', said == 'ok'))
    return rows


def read_bench(mfu_goal=None):
    """-> a reader of bench.py --json. mfu_goal: wanted share of a matmul's rate"""
    def read(lines):
        found = json.loads(lines[-1])
        rows = []
        ours, *others = found['training']
        wanted = ''
        met = None
        if mfu_goal is not None:
            wanted = f'at least {mfu_goal:.0%}'
            met = ours['mfu'] >= mfu_goal
        rows.append(Row(f'a training step, {found["settings"]["batch_size"]} x '
                        f'{found["settings"]["block_size"]}',
                        f'{ours["ms"]:.1f} ms, MFU {ours["mfu"]:.0%}', spread_of(ours), wanted,
                        met))
        theirs = []
        for row in others:
            if 'dense' in row['name']:
                ratio = 1 / row['ratio']
                rows.append(Row('over a dense step of the same active FLOPs', f'{ratio:.2f}',
                                spread_of(row), 'at most 1.3', ratio <= 1.3))
            elif 'transformers' in row['name']:
                theirs.append(row['ratio'])
                rows.append(Row(row['name'], f'{row["ms"]:.1f} ms, {row["ratio"]:.2f} times ours',
                                spread_of(row)))
        if theirs:
            rows.append(Row('the best of transformers over ours', f'{min(theirs):.2f}', '',
                            'at least 3', min(theirs) >= 3))
        for row in found['decoding']:
            if row['name'] == 'nanoseek':
                rows.append(decoding_row(row))
        if found['settings']['memory']:
            rows += memory_rows(found['memory'])
        return rows
    return read


def read_decoding(lines):
    return [decoding_row(row) for row in json.loads(lines[-1])]


def decoding_row(row):
    speed = f'{row["tokens_per_s"]:,.0f} tokens/s'
    if row['of_copy']:
        speed += f', weights at {row["of_copy"]:.0%} of a copy'
    return Row(f'decoding, batch {row["batch"]} behind {row["context"]} tokens', speed,
               spread_of(row))


def spread_of(row):
    least, most = row['ms_range']
    return f'{least:.2f} to {most:.2f} ms'


def read_memory(lines):
    return memory_rows(json.loads(lines[-1]))


def memory_rows(found):
    if not found['ratio']:
        return [Row('memory of a step', 'could not be measured', '', 'within 10%', False)]
    text = (f'{found["estimate_bytes"] / 2**20:,.0f} MB estimated, '
            f'{found["measured_bytes"] / 2**20:,.0f} measured: {found["ratio"]:.2f}')
    return [Row('memory of a step', text, '', 'within 10%', 0.9 <= found['ratio'] <= 1.1)]


def read_profile(lines):
    found = json.loads(lines[-1])
    rows = []
    for kernel in found['kernels']:
        share = kernel['ms'] / found['total_ms']
        rows.append(Row(f'`{kernel["name"][:60]}`', f'{kernel["ms"]:.2f} ms, {share:.0%}',
                        f'{kernel["calls"]} calls'))
    return rows


def read_ended(lines):
    return [Row('it ends as it should', 'ok', '', 'ok', True)]


def read_run(folder):
    """-> a reader of a training run's metrics.jsonl"""
    def read(lines):
        steps, _ = metrics(folder)
        last = steps[-1]
        if len(steps) > 1:
            del steps[0]            # which compiles
        speeds = sorted(entry['tok_per_s'] for entry in steps)
        text = (f'loss {last["loss"]:.4f} after {last["step"]} steps, '
                f'{speeds[len(speeds) // 2]:,.0f} tokens/s, {last["memory_mb"]:,.0f} MB')
        return [Row('a run', text, f'{speeds[0]:,.0f} to {speeds[-1]:,.0f} tokens/s')]
    return read


def read_race(folder, is_right_text):
    """-> a reader of the run whose seconds count, but for those until its first step is done, which
    compiles"""
    def read(lines):
        steps, evaluations = metrics(folder)
        began = steps[0]['elapsed_s']
        best = min(entry['val_loss'] for entry in evaluations)
        for entry in evaluations:
            if entry['val_loss'] <= GOAL_NATS and is_right_text:
                spent = entry['elapsed_s'] - began
                return [Row(f'{GOAL_NATS} nats per character after', f'{spent:.1f} s', '',
                            'at most 20 s', spent <= 20)]
        spent = evaluations[-1]['elapsed_s'] - began
        text = f'{best:.4f} nats after {spent:.1f} s'
        met = False
        if not is_right_text:
            text += ', on another text than tinyshakespeare: does not compare'
            met = None
        return [Row('the best on the validation split', text, '',
                    f'{GOAL_NATS} after at most 20 s', met)]
    return read


def read_same(one, other):
    """-> a reader that compares the weights of two runs"""
    def read(lines):
        files = [sorted(Path(folder).glob('step-*/model.safetensors'))[-1]
                 for folder in (one, other)]
        same = files[0].read_bytes() == files[1].read_bytes()
        text = 'the same weights, bit for bit'
        if not same:
            text = 'other weights'
        return [Row('a run that stopped and went on', text, '', 'the same', same)]
    return read


def metrics(folder):
    """-> the entries of steps and those of evaluations"""
    lines = (Path(folder) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    entries = [json.loads(line) for line in lines]
    return ([entry for entry in entries if 'tok_per_s' in entry],
            [entry for entry in entries if entry.get('val_loss') is not None])


# ------------------------------------------------------------------------------- the parts


class Plan:
    """Makes the parts. s: bench.py's settings; work: a folder for runs"""

    def __init__(self, s, work):
        self.work = work
        self.small = s.small
        self.text = 'data/shakespeare/input.txt'
        self.is_right_text = bool(s.text)
        if s.text:
            self.text = str(Path(s.text).resolve())
        self.weights = s.weights
        if s.weights and Path(s.weights).is_dir():
            self.weights = str(Path(s.weights).resolve())
        self.tiny = []
        self.gqa = []               # what GQA needs besides, to be tiny
        self.sizes = ['--contexts=128,2048', '--batch_sizes=1,8,64', '--rounds=5']
        if s.small:
            self.tiny = TINY
            self.gqa = GQA
            self.sizes = ['--contexts=8', '--batch_sizes=1', '--rounds=1', '--new_tokens=4',
                          '--memory=false']

    def bench(self, *options):
        return ['bench.py', *options, *self.tiny]

    def run(self, name, config, *options, steps, script='train.py'):
        return [script, config, f'--dataset={self.work}/text', *SHORT, *options, *self.tiny,
                f'--out_dir={self.work}/{name}', f'--max_steps={steps}']

    def parts(self):
        """All of them, the most telling first"""
        found = [*self.correct(), *self.speed(), *self.fp8(), *self.memory()]
        if self.weights:
            found += self.healing()
        return found

    def correct(self):
        whole = f'{self.work}/whole'
        halves = f'{self.work}/halves'
        steady = ['config/shakespeare.py', '--schedule=wsd', '--decay_frac=0']
        proofs = ['--only=proofs']
        if self.small:
            proofs.append('--small')
        data = ['prepare.py', self.text, '--tokenizer=char', f'--out_dir={self.work}/text']
        yield Part('data', data, read_ended, 30)
        yield Part('proofs', self.bench(*proofs), read_proofs, 150)
        yield Part('resume', self.run('whole', *steady, steps=4), read_run(whole), 60)
        yield Part('resume', self.run('halves', *steady, steps=2), read_run(halves), 60)
        yield Part('resume', self.run('halves', *steady, steps=4), read_same(whole, halves), 60)
        for way in ('ddp', 'fsdp'):
            command = self.run(way, 'config/shakespeare.py', f'--parallel={way}', steps=2,
                               script='train_ddp.py')
            yield Part(way, [*TORCHRUN, *command], read_run(f'{self.work}/{way}'), 60)

    def speed(self):
        for name, goal, options in (('smol135_dense', 0.5, self.gqa),
                                    ('smol135', None, ['--vs=transformers']),
                                    ('v3_tiny', None, [])):
            command = self.bench(f'config/{name}.py', '--json', f'--batch_size={BATCHES[name]}',
                                 *self.sizes, *options)
            yield Part(name, command, read_bench(goal), 150)
        yield from self.race()
        profile = self.bench('config/smol135.py', '--only=profile',
                             f'--batch_size={BATCHES["smol135"]}')
        yield Part('profile', profile, read_profile, 90)
        names = ['smol135_dense', 'smol135']            # which have been measured compiled
        if self.small:
            names = names[:1]
        for name in names:
            eager = self.bench(f'config/{name}.py', '--only=decoding', '--compile=false',
                               *self.sizes, *self.gqa)
            yield Part(f'eager: {name}', eager, read_decoding, 90)
        yield Part('largest batch', self.run('largest', 'config/smol135.py', steps=2),
                   read_run(f'{self.work}/largest'), 90)

    def race(self):
        steps = 1000
        if self.small:
            steps = 50
        race = self.run('race', 'config/shakespeare_gpu.py', '--eval_interval=50', *self.gqa,
                        steps=steps)
        yield Part('race', race, read_race(f'{self.work}/race', self.is_right_text), 90)

    def fp8(self):
        steps = 200
        if self.small:
            steps = 3
        for kind, option in FP8.items():
            if self.small and option:
                yield Part(f'fp8: {kind}', None, None, 0)
                continue
            command = self.run(kind, 'config/smol135_dense.py', '--block_size=1024', *option,
                               '--batch_size=8', '--global_batch_size=8', *self.gqa, steps=steps)
            yield Part(f'fp8: {kind}', command, read_run(f'{self.work}/{kind}'), 90)

    def memory(self):
        """Of the configs whose memory bench.py has not measured by then"""
        names = ['shakespeare', 'shakespeare_gpu', 'smol774']
        if self.small:
            names = names[:1]
        for name in names:
            yield Part(f'memory: {name}', self.bench(f'config/{name}.py', '--only=memory'),
                       read_memory, 60)

    def healing(self):
        """SmolLM2-135M converted, and trained for a while"""
        data = f'{self.work}/smollm2'
        model = f'{self.work}/converted'
        yield Part('healing', ['prepare.py', self.text, f'--tokenizer={self.weights}',
                               f'--out_dir={data}'], read_ended, 60)
        yield Part('healing', ['convert.py', self.weights, model, '--attention=mla',
                               '--kv_lora_rank=128', '--n_routed_experts=3',
                               '--n_shared_experts=1', f'--calibration={data}'], read_ended, 120)
        yield Part('healing', ['train.py', 'config/smol135_heal.py', f'--init_from={model}',
                               f'--dataset={data}', '--sample_interval=0',
                               f'--out_dir={self.work}/healed'],
                   read_run(f'{self.work}/healed'), 180)


def choose(parts, wanted):
    """The parts of a list such as proofs,fp8; all where it is empty"""
    if not wanted:
        return parts
    names = wanted.split(',')
    known = {part.name.split(':')[0] for part in parts}
    for name in names:
        if name not in known:
            raise ValueError(f'parts={wanted}: {name!r} is none of {", ".join(sorted(known))}')
    return [part for part in parts if part.name == 'data' or part.name.split(':')[0] in names]


# --------------------------------------------------------------------------------- running


def attempt(part, here, seconds):
    """-> the rows of a part; Problem where there are none"""
    if part.command is None:
        return [Row('needs a GPU', 'not tried')]
    process = subprocess.Popen([sys.executable, *part.command], cwd=here, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8',
                               start_new_session=True, env=os.environ | {'PYTHONUTF8': '1'})
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as e:
        os.killpg(process.pid, signal.SIGKILL)      # with its children, which hold memory as well
        process.wait()
        raise Problem(f'not done after {seconds:.0f} s') from e
    errors = err.strip().splitlines()
    if process.returncode != 0:
        last = 'without a word'
        if errors:
            last = errors[-1][:150]
        raise Problem(f'status {process.returncode}: {last}')
    try:
        return part.read(out.strip().splitlines())
    except (LookupError, ValueError, OSError) as e:
        raise Problem(f'what it said cannot be read: {type(e).__name__}: {e}') from e


def clocks():
    """What nvidia-smi says of the card now, or None"""
    asked = 'driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,pstate'
    try:
        done = subprocess.run(['nvidia-smi', f'--query-gpu={asked}', '--format=csv,noheader'],
                              capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    first, *_ = done.stdout.strip().splitlines()
    return first


def machine():
    """Lines on what is measured on"""
    card = 'no GPU: in miniature on the CPU, where the numbers mean nothing'
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        card = f'{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}'
    return [card, f'torch {torch.__version__}, Python {platform.python_version()}, '
                  f'{os.cpu_count()} processors']


def measure(s, here):
    """Runs the parts, prints what it does, and writes the table again after each. s: bench.py's
    settings; here: the project's folder"""
    out = Path(s.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = tempfile.mkdtemp(prefix='nanoseek-gpu-')
    began = time.monotonic()
    end = began + 60 * s.minutes
    table = []
    head = [*machine(), f'driver, clocks, temperature, power and state at the start: {clocks()}']
    try:
        chosen = choose(Plan(s, work).parts(), s.parts)
        for number, part in enumerate(chosen, 1):
            left = end - time.monotonic()
            print(f'{number}/{len(chosen)} {part.name}: at most {min(part.seconds, left):.0f} s; '
                  f'all ends within {left / 60:.1f} minutes', flush=True)
            try:
                if left < 5:
                    raise Problem(f'no time was left of {s.minutes:g} minutes')
                rows = attempt(part, here, min(part.seconds, left))
            except Problem as e:
                rows = [Row('it failed', str(e), '', 'ok', False)]
            for row in rows:
                cells = row.cells(part.name, s.small)
                table.append(cells)
                print('    ' + ' | '.join(cell for cell in cells[1:] if cell), flush=True)
            write(out, head, table, chosen, work)
        head.append(f'at the end: {clocks()}; {time.monotonic() - began:.0f} s in all')
        write(out, head, table, chosen, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f'written to {out}')


def write(out, head, table, chosen, work):
    """The table as Markdown, and the commands"""
    lines = ['# What a GPU shows', '', *(f'- {line}' for line in head), '',
             '| ' + ' | '.join(COLUMNS) + ' |', '|---' * len(COLUMNS) + '|']
    for cells in table:
        lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |')
    lines += ['', 'The commands:', '']
    for part in chosen:
        if part.command is None:
            continue
        command = ' '.join(map(str, part.command)).replace(work, 'out/gpu')
        lines.append(f'    python {command}        # {part.name}')
    out.write_text('\n'.join(lines) + '\n', encoding='utf-8')
