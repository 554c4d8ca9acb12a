"""Plot runs from their metrics.jsonl. Needs matplotlib.

    python docs/plot.py out/a [out/b ...] [--out=plot.png] [--x=tokens]
    python docs/plot.py out/a [out/b ...] --ladder [--title=TEXT]

--x is step, tokens, flops or seconds (those of its steps: a run's median step, times their number).
--ladder draws only where runs ended, in bits per byte, over tokens, FLOPs and seconds. Runs called
KIND-SIZE-LENGTH, such as mla-moe-2-10M, are joined by a line for each size, in a colour for each
kind.

Loss, bits per byte, gradient norm and learning rate of all runs, side by side, and where there are
MTP layers how often their drafts are right; below, for each run with experts, how the router
spreads the tokens: every expert's share over the ideal at each evaluation, layers one above the
other.
"""
import json
import statistics
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402  # after the choice of its backend
from matplotlib.ticker import NullFormatter  # noqa: E402

TITLES = ('loss, nats per token', 'validation, bits per byte', 'gradient norm', 'learning rate',
          'drafts that are right')
SCALES = {'tokens': 'tokens', 'flops': 'FLOPs', 'seconds': 'seconds of training'}


def read(run):
    """-> the entries of a run's metrics.jsonl. A run that was killed may have cut off its last
    line"""
    file = Path(run)
    if file.is_dir():
        file = file / 'metrics.jsonl'
    if not file.is_file():
        sys.exit(f'plot.py: no {file}')
    lines = file.read_text(encoding='utf-8').splitlines()
    return [json.loads(line) for line in lines if line.endswith('}')]


def read_all(names):
    """-> {name: entries}. A run is called by its folder, or where two are called alike by its
    path"""
    paths = [Path(name) for name in names]
    short = [path.name for path in paths]
    runs = {}
    for path in paths:
        name = path.name
        if short.count(name) > 1:
            name = str(path)
        runs[name] = read(path)
    return runs


def each_step(entries, x):
    """-> tokens, FLOPs or seconds of one step; 1 where x is step, or the run does not say"""
    if x == 'seconds':
        times = [entry['step_ms'] for entry in entries if 'step_ms' in entry]
        if times:
            return statistics.median(times) / 1e3
    for entry in entries:
        if x != 'step' and x in entry:
            return entry[x] / entry['step']
    return 1


def over(entries, x):
    """-> the same entries with x in the place of steps"""
    each = each_step(entries, x)
    return [{**entry, 'step': entry['step'] * each} for entry in entries]


def points(entries, key):
    """-> steps, values"""
    found = [(entry['step'], entry[key]) for entry in entries
             if entry.get(key) is not None and 'event' not in entry]
    if not found:
        return [], []
    steps, values = zip(*found)
    return steps, values


def plot_curve(axis, entries, key, **style):
    """Values over steps. Nothing where there are none: the legend would have a line for it"""
    steps, values = points(entries, key)
    if values:
        axis.plot(steps, values, **style)


def plot_run(axes, name, entries, color):
    loss, bits, norm, rate, *drafts = axes
    plot_curve(loss, entries, 'loss', color=color, lw=1, alpha=0.5, label=f'{name}, training')
    plot_curve(loss, entries, 'val_loss', color=color, marker='o', ms=4,
               label=f'{name}, validation')
    label = name
    _, values = points(entries, 'val_bpb')
    if values:
        label = f'{name}: {values[-1]:.3f}'
    plot_curve(bits, entries, 'val_bpb', color=color, marker='o', ms=4, label=label)
    plot_curve(norm, entries, 'grad_norm', color=color, lw=1)
    plot_curve(rate, entries, 'lr', color=color)
    for axis in drafts:
        plot_curve(axis, entries, 'val_accept', color=color, marker='o', ms=4)
    for entry in entries:           # a skipped step, a rollback, a spike
        if 'event' in entry:
            style = ':'
            if entry['event'] == 'rollback':
                style = '--'
            loss.axvline(entry['step'], color=color, ls=style, lw=0.8)


def plot_load(figure, axis, name, entries, x):
    """Every expert's share over the ideal, as colours"""
    steps, loads = points(entries, 'moe/load')
    shares = np.array(loads)                            # (evaluations, layers, experts)
    evaluations, layers, experts = shares.shape
    rows = shares.reshape(evaluations, layers * experts).T
    image = axis.imshow(rows, aspect='auto', vmin=0, vmax=2, cmap='coolwarm',
                        interpolation='nearest')
    axis.set(xlabel=x, ylabel='expert', title=f'{name}: tokens per expert over the ideal')
    every = max(1, len(steps) // 8)
    axis.set_xticks(range(0, len(steps), every), steps[::every])
    middles = [experts * layer + (experts - 1) / 2 for layer in range(layers)]
    names = [f'layer {layer}' for layer in range(layers)]
    axis.set_yticks(middles, names, fontsize=min(10, 150 / layers))
    for layer in range(1, layers):
        axis.axhline(experts * layer - 0.5, color='black', lw=0.8)
    figure.colorbar(image, ax=axis)


def plot(runs, x, out):
    with_experts = []
    for name, entries in runs.items():
        if any('moe/load' in entry for entry in entries):
            with_experts.append(name)
    below = len(with_experts)
    columns = 4
    if any('val_accept' in entry for entries in runs.values() for entry in entries):
        columns = 5
    figure = plt.figure(figsize=(3.5 * columns, 4 + 3.2 * below), layout='constrained')
    rows = figure.add_gridspec(1 + below, columns, height_ratios=[1.2] + [1] * below)
    axes = [figure.add_subplot(rows[0, i]) for i in range(columns)]
    for i, (name, entries) in enumerate(runs.items()):
        plot_run(axes, name, entries, f'C{i % 10}')
    for axis, title in zip(axes, TITLES):
        axis.set(xlabel=x, title=title)
        axis.grid(alpha=0.3)
    loss, bits, norm, *_ = axes
    norm.set_yscale('log')
    for axis in (loss, bits):
        if axis.lines:
            axis.legend(fontsize='small')
    for i, name in enumerate(with_experts, 1):
        plot_load(figure, figure.add_subplot(rows[i, :]), name, runs[name], x)
    figure.savefig(out, dpi=100)


def plot_ladder(runs, title, out):
    """How runs of many lengths and sizes end: validation bits per byte over each of SCALES. Names
    have three parts between dashes at least, as in mla-moe-2-10M: runs that differ in the last one
    only are joined by a line, and lines that differ in the one before it have one colour"""
    figure, axes = plt.subplots(1, len(SCALES), figsize=(15, 5), sharey=True, layout='constrained')
    lines = {}
    for name, entries in runs.items():
        if not points(entries, 'val_bpb')[1]:
            sys.exit(f'plot.py: {name} has no evaluation')
        line, _, _ = name.rpartition('-')
        lines.setdefault(line, []).append(entries)
    kinds = list(dict.fromkeys(kind_of(line) for line in lines))
    for axis, (x, label) in zip(axes, SCALES.items()):
        for line, members in lines.items():
            color = f'C{kinds.index(kind_of(line)) % 10}'
            ends = sorted(end(entries, x) for entries in members)
            axis.plot(*zip(*ends), color=color, marker='o', ms=4)
            axis.annotate(line.rpartition('-')[2], ends[0], (0, 6), textcoords='offset points',
                          color=color, ha='center')
        axis.set(xlabel=label, xscale='log')
        axis.xaxis.set_minor_formatter(NullFormatter())     # its labels would overlap
        axis.grid(alpha=0.3, which='both')
    for i, kind in enumerate(kinds):
        axes[0].plot([], [], color=f'C{i % 10}', marker='o', ms=4, label=kind)
    axes[0].legend()
    axes[0].set_ylabel('validation, bits per byte')
    figure.suptitle(title)
    figure.savefig(out, dpi=100)


def end(entries, x):
    """-> where on the scale x a run ended, and with how many bits per byte"""
    steps, values = points(over(entries, x), 'val_bpb')
    return steps[-1], values[-1]


def kind_of(line):
    return line.rpartition('-')[0] or line


def main(args):
    out = 'plot.png'
    x = 'step'
    title = ''
    names = []
    for arg in args:
        if arg.startswith('--out='):
            out = arg.removeprefix('--out=')
        elif arg.startswith('--title='):
            title = arg.removeprefix('--title=')
        elif arg.startswith('--x='):
            x = arg.removeprefix('--x=')
            if x not in ('step', *SCALES):
                sys.exit(f'plot.py: --x={x}: step, {", ".join(SCALES)} are known')
        elif not arg.startswith('--'):
            names.append(arg)
    runs = read_all(names)
    if '--ladder' in args:
        plot_ladder(runs, title, out)
    else:
        plot({name: over(entries, x) for name, entries in runs.items()}, x, out)
    print(f'written to {out}')


if __name__ == '__main__':
    if len(sys.argv) < 2 or '--help' in sys.argv:
        sys.exit(__doc__)
    main(sys.argv[1:])
