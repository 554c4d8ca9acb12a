"""Plot what runs logged in their metrics.jsonl. Needs matplotlib.

    python docs/plot.py out/a out/b                         # the losses by step
    python docs/plot.py out/a out/b --y=val_loss --x=elapsed_s --lines="nanoGPT:1.4697"

Each metric of --y has a panel with a curve for each run; --x is step or elapsed_s.
--lines adds levels to compare with.
"""
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def points(folder, x, y):
    """Return a metric y of a run, and where it is on the axis x: two lists."""
    lines = (Path(folder) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    entries = [json.loads(line) for line in lines if line.endswith('}')]    # the last may be cut
    entries = [entry for entry in entries if y in entry and 'event' not in entry]
    return [entry[x] for entry in entries], [entry[y] for entry in entries]


def main(folders, x='step', y='loss,val_loss', out='plot.png', lines=''):
    metrics = y.split(',')
    figure = Figure(figsize=(5 * len(metrics), 4), layout='constrained')
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        for folder in folders:
            axis.plot(*points(folder, x, metric), label=Path(folder).name, lw=1.2,
                      marker='.' if metric.startswith(('val', 'eval')) else '')
        for level in filter(None, lines.split(',')):
            name, value = level.split(':')
            axis.axhline(float(value), ls=':', color='gray')
            axis.annotate(name, (0, float(value)), xycoords=('axes fraction', 'data'),
                          ha='left', va='bottom', color='gray')
        axis.set(xlabel=x, title=metric)
        axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out, dpi=100)


if __name__ == '__main__':
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    options = dict(arg[2:].split('=', 1) for arg in sys.argv[1:] if arg.startswith('--'))
    main([arg for arg in sys.argv[1:] if not arg.startswith('--')], **options)
