"""Plot runs from their metrics.jsonl. Needs matplotlib.

    python docs/plot.py out/a [out/b ...] [--out=plot.png] [--x=tokens]

Above, curves of all runs over step, tokens, flops or elapsed_s. Below, for each run with experts,
every expert's share of the tokens over the ideal, at each evaluation.
"""
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

PANELS = {                      # title: {metric: line style}
    'loss, nats per token': {'loss': '-', 'val_loss': 'o-'},
    'validation, bits per byte': {'val_bpb': 'o-'},
    'learning rate': {'lr': '-'},
}


def read(folder, x):
    """Return the entries of a run's metrics.jsonl, each with its place on the axis x."""
    lines = (Path(folder) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    entries = [json.loads(line) for line in lines if line.endswith('}')]    # the last may be cut
    scale = next(entry[x] / entry['step'] for entry in entries if x in entry)
    return [{**entry, 'x': entry.get(x, scale * entry['step'])} for entry in entries]


def points(entries, metric):
    return [(e['x'], e[metric]) for e in entries if metric in e and 'event' not in e]


def plot_load(figure, axis, name, loads):
    """loads: (x, shares of each layer's experts) of each evaluation."""
    shares = np.array([share for _, share in loads])    # (evaluations, layers, experts)
    _, layers, experts = shares.shape
    image = axis.imshow(shares.reshape(len(shares), -1).T, aspect='auto', vmin=0, vmax=2,
                        cmap='coolwarm', interpolation='nearest')
    every = max(1, len(loads) // 8)
    axis.set_xticks(range(0, len(loads), every), [f'{x:g}' for x, _ in loads[::every]])
    middles = [experts * layer + (experts - 1) / 2 for layer in range(layers)]
    axis.set_yticks(middles, [f'layer {layer}' for layer in range(layers)])
    axis.set_title(f'{name}: tokens per expert over the ideal')
    figure.colorbar(image, ax=axis)


def main(folders, x='step', out='plot.png'):
    runs = {folder: read(folder, x) for folder in folders}
    loads = {name: points(entries, 'moe/load') for name, entries in runs.items()}
    loads = {name: load for name, load in loads.items() if load and load[0][1]}
    figure = Figure(figsize=(12, 4 + 3.2 * len(loads)), layout='constrained')
    grid = figure.add_gridspec(1 + len(loads), len(PANELS))
    axes = [figure.add_subplot(grid[0, i]) for i in range(len(PANELS))]
    for axis, (title, metrics) in zip(axes, PANELS.items()):
        axis.set(xlabel=x, title=title)
        axis.grid(alpha=0.3)
        for i, (name, entries) in enumerate(runs.items()):
            for metric, style in metrics.items():
                curve = np.array(points(entries, metric)).reshape(-1, 2)
                axis.plot(*curve.T, style, color=f'C{i % 10}', lw=1, label=name)
    axes[1].legend()
    for i, (name, load) in enumerate(loads.items(), 1):
        plot_load(figure, figure.add_subplot(grid[i, :]), name, load)
    figure.savefig(out)


if __name__ == '__main__':
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    options = dict(arg[2:].split('=', 1) for arg in sys.argv[1:] if arg.startswith('--'))
    main([arg for arg in sys.argv[1:] if not arg.startswith('--')], **options)
