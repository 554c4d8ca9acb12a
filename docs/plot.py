"""Plot runs: python docs/plot.py out/shakespeare [more runs] [--out=plot.png]. Needs matplotlib.

Loss, bits per byte, learning rate and gradient norm of every run; for one run with experts, how their load spreads: at
each evaluation every expert's share of the tokens over the ideal one, layers side by side.
"""
import json, sys
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt

def main(args):
    out = next((a[6:] for a in args if a.startswith('--out=')), 'plot.png')
    runs = {Path(a).name: [json.loads(line) for line in open(Path(a) / 'metrics.jsonl')] for a in args if not a.startswith('--')}
    loads = [(m['step'], m['moe/load']) for entries in runs.values() for m in entries if 'moe/load' in m]
    heat = len(runs) == 1 and loads
    figure, axes = plt.subplots(1, 3 if heat else 2, figsize=(15 if heat else 10, 4), layout='constrained')
    for name, entries in runs.items():
        train, val = [m for m in entries if 'loss' in m], [m for m in entries if 'val_loss' in m]
        line, = axes[0].plot([m['step'] for m in train], [m['loss'] for m in train], alpha=0.5, lw=1, label=f'{name}, training')
        axes[0].plot([m['step'] for m in val], [m['val_loss'] for m in val], 'o-', color=line.get_color(), label=f'{name}, validation')
        for m in val[-1:]:
            axes[0].annotate(f'{m["val_bpb"]:.3f} bits per byte', (m['step'], m['val_loss']), (-10, 25), textcoords='offset points', ha='right')
        axes[1].plot([m['step'] for m in train], [m['grad_norm'] for m in train], color=line.get_color(), lw=1, label='gradient norm')
        axes[1].plot([m['step'] for m in train], [1e3 * m['lr'] for m in train], '--', color=line.get_color(), label='learning rate x 1000')
        if heat and 'moe/load_max' in train[-1]:
            axes[1].plot([m['step'] for m in train], [m['moe/load_max'] for m in train], color='tab:red', label='busiest expert / ideal')
            axes[1].plot([m['step'] for m in train], [m['moe/load_min'] for m in train], color='tab:green', label='idlest expert / ideal')
    axes[0].set(xlabel='step', ylabel='nats per token', title='loss')
    axes[1].set(xlabel='step', ylim=(0, 3), title='optimizer and expert load' if heat else 'optimizer')
    for axis in axes[:2]:
        axis.legend()
        axis.grid(alpha=0.3)
    if heat:
        grid = [[share for layer in load for share in layer] for _, load in loads]
        image = axes[2].imshow(list(zip(*grid)), aspect='auto', vmin=0, vmax=2, cmap='coolwarm', interpolation='nearest')
        layers, experts = len(loads[0][1]), len(loads[0][1][0])
        axes[2].set(xlabel='step', ylabel='expert', title='tokens per expert over the ideal')
        axes[2].set_xticks(range(0, len(loads), max(1, len(loads) // 6)), [s for s, _ in loads][::max(1, len(loads) // 6)])
        axes[2].set_yticks([experts * i + (experts - 1) / 2 for i in range(layers)], [f'layer {i}' for i in range(layers)])
        for i in range(1, layers):
            axes[2].axhline(experts * i - 0.5, color='black', lw=0.8)
        figure.colorbar(image, ax=axes[2])
    figure.savefig(out, dpi=110)
    print(f'written to {out}')

if __name__ == '__main__':
    if len(sys.argv) < 2 or '--help' in sys.argv:
        sys.exit(__doc__)
    main(sys.argv[1:])
