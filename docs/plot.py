"""Plot runs: python docs/plot.py out/shakespeare [more runs] [--out=plot.png]. Needs matplotlib.

Loss, bits per byte, learning rate and gradient norm of every run; for one run with experts, how their load spreads: at
each evaluation every expert's share of the tokens over the ideal one, layers side by side.
"""
import json, sys
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt

def read(run):
    return [json.loads(line) for line in open(Path(run) / 'metrics.jsonl')]

def plot_loss(axis, name, train, val):
    line, = axis.plot([m['step'] for m in train], [m['loss'] for m in train], alpha=0.5, lw=1,
                      label=f'{name}, training')
    end = f' ({val[-1]["val_bpb"]:.3f} bits per byte)' if val else ''
    axis.plot([m['step'] for m in val], [m['val_loss'] for m in val], 'o-', color=line.get_color(),
              label=f'{name}, validation{end}')
    return line.get_color()

def plot_optimizer(axis, color, train, experts):
    curves = [('gradient norm', 'grad_norm', 1, '-', color), ('learning rate x 1000', 'lr', 1e3, '--', color)]
    if experts:
        curves += [('busiest expert / ideal', 'moe/load_max', 1, '-', 'tab:red'),
                   ('idlest expert / ideal', 'moe/load_min', 1, '-', 'tab:green')]
    for label, key, scale, style, color in curves:
        axis.plot([m['step'] for m in train], [scale * m[key] for m in train], style, color=color, label=label)

def plot_load(figure, axis, loads):
    layers, experts = len(loads[0][1]), len(loads[0][1][0])
    grid = [[share for layer in load for share in layer] for _, load in loads]
    image = axis.imshow(list(zip(*grid)), aspect='auto', vmin=0, vmax=2, cmap='coolwarm', interpolation='nearest')
    every = max(1, len(loads) // 6)
    axis.set(xlabel='step', ylabel='expert', title='tokens per expert over the ideal')
    axis.set_xticks(range(0, len(loads), every), [step for step, _ in loads][::every])
    axis.set_yticks([experts * i + (experts - 1) / 2 for i in range(layers)], [f'layer {i}' for i in range(layers)])
    for i in range(1, layers):
        axis.axhline(experts * i - 0.5, color='black', lw=0.8)
    figure.colorbar(image, ax=axis)

def main(args):
    out = next((a[6:] for a in args if a.startswith('--out=')), 'plot.png')
    runs = {Path(a).name: read(a) for a in args if not a.startswith('--')}
    loads = [(m['step'], m['moe/load']) for entries in runs.values() for m in entries if 'moe/load' in m]
    heat = len(runs) == 1 and bool(loads)
    figure, axes = plt.subplots(1, 3 if heat else 2, figsize=(15 if heat else 10, 4), layout='constrained')
    for name, entries in runs.items():
        train, val = [m for m in entries if 'loss' in m], [m for m in entries if 'val_loss' in m]
        plot_optimizer(axes[1], plot_loss(axes[0], name, train, val), train, heat)
    axes[0].set(xlabel='step', ylabel='nats per token', title='loss')
    axes[1].set(xlabel='step', ylim=(0, 3), title='optimizer and expert load' if heat else 'optimizer')
    for axis in axes[:2]:
        axis.legend()
        axis.grid(alpha=0.3)
    if heat:
        plot_load(figure, axes[2], loads)
    figure.savefig(out, dpi=110)
    print(f'written to {out}')

if __name__ == '__main__':
    if len(sys.argv) < 2 or '--help' in sys.argv:
        sys.exit(__doc__)
    main(sys.argv[1:])
