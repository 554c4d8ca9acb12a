"""Plot runs from their metrics.jsonl: python docs/plot.py out/a [out/b ...] [--out=plot.png] [--x=tokens]. Needs
matplotlib.

Loss, bits per byte, gradient norm and learning rate of all runs, side by side; below, for each run with experts, how
the router spreads the tokens: every expert's share over the ideal at each evaluation, layers one above the other.
"""
import json, sys
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt

def read(run):
    """-> the entries of a run; a run that was killed may have cut off its last line"""
    file = Path(run) / 'metrics.jsonl' if Path(run).is_dir() else Path(run)
    if not file.is_file():
        sys.exit(f'plot.py: no {file}')
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith('}')]

def curve(axis, entries, key, **style):
    """key over steps; -> whether there is anything"""
    points = [(m['step'], m[key]) for m in entries if m.get(key) is not None and 'event' not in m]
    if points:
        axis.plot(*zip(*points), **style)
    return bool(points)

def plot_run(axes, name, entries, color):
    loss, bits, norm, rate = axes
    curve(loss, entries, 'loss', color=color, lw=1, alpha=0.5, label=f'{name}, training')
    curve(loss, entries, 'val_loss', color=color, marker='o', ms=4, label=f'{name}, validation')
    val = [m['val_bpb'] for m in entries if m.get('val_bpb') is not None]
    curve(bits, entries, 'val_bpb', color=color, marker='o', ms=4, label=f'{name}: {val[-1]:.3f}' if val else name)
    curve(norm, entries, 'grad_norm', color=color, lw=1, label=name)
    curve(rate, entries, 'lr', color=color, label=name)
    for m in entries:
        if 'event' in m:                                    # a skipped step, a rollback, a spike
            loss.axvline(m['step'], color=color, ls='--' if m['event'] == 'rollback' else ':', lw=0.8)

def plot_load(figure, axis, name, loads, x):
    layers, experts = len(loads[0][1]), len(loads[0][1][0])
    grid = [[share for layer in load for share in layer] for _, load in loads]
    image = axis.imshow(list(zip(*grid)), aspect='auto', vmin=0, vmax=2, cmap='coolwarm', interpolation='nearest')
    every = max(1, len(loads) // 8)
    axis.set(xlabel=x, ylabel='expert', title=f'{name}: tokens per expert over the ideal')
    axis.set_xticks(range(0, len(loads), every), [step for step, _ in loads][::every])
    axis.set_yticks([experts * i + (experts - 1) / 2 for i in range(layers)], [f'layer {i}' for i in range(layers)],
                    fontsize=min(10, 150 / layers))
    for i in range(1, layers):
        axis.axhline(experts * i - 0.5, color='black', lw=0.8)
    figure.colorbar(image, ax=axis)

def main(args):
    out = next((a[6:] for a in args if a.startswith('--out=')), 'plot.png')
    paths = [Path(a) for a in args if not a.startswith('--')]
    names = [p.name for p in paths]
    runs = {p.name if names.count(p.name) == 1 else str(p): read(p) for p in paths}
    x = 'tokens' if '--x=tokens' in args else 'step'
    for entries in runs.values() if x == 'tokens' else ():
        each = next((m['tokens'] // m['step'] for m in entries if 'tokens' in m), 1)
        for m in entries:
            m['step'] *= each
    loads = {name: [(m['step'], m['moe/load']) for m in entries if 'moe/load' in m] for name, entries in runs.items()}
    loads = {name: load for name, load in loads.items() if load}
    figure = plt.figure(figsize=(14, 4 + 3.2 * len(loads)), layout='constrained')
    rows = figure.add_gridspec(1 + len(loads), 4, height_ratios=[1.2] + [1] * len(loads))
    axes = [figure.add_subplot(rows[0, i]) for i in range(4)]
    for i, (name, entries) in enumerate(runs.items()):
        plot_run(axes, name, entries, f'C{i % 10}')
    titles = ('loss, nats per token', 'validation, bits per byte', 'gradient norm', 'learning rate')
    for axis, title in zip(axes, titles):
        axis.set(xlabel=x, title=title)
        axis.grid(alpha=0.3)
    axes[2].set_yscale('log')
    for axis in axes[:2]:
        if axis.lines:
            axis.legend(fontsize='small')
    for i, (name, load) in enumerate(loads.items(), 1):
        plot_load(figure, figure.add_subplot(rows[i, :]), name, load, x)
    figure.savefig(out, dpi=100)
    print(f'written to {out}')

if __name__ == '__main__':
    if len(sys.argv) < 2 or '--help' in sys.argv:
        sys.exit(__doc__)
    main(sys.argv[1:])
