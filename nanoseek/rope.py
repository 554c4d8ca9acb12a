"""RoPE scalings: how a model trained on short contexts reads longer ones. config.json names one as
rope_scaling: {'rope_type': 'yarn', 'factor': 4.0, ...}."""
import math

import torch


def scaled(freq, config):
    """Return RoPE's frequencies (d/2,) after scaling, and a factor for cosines and sines."""
    if not config.rope_scaling:
        return freq, 1.0
    scale, _ = SCALINGS[config.rope_scaling['rope_type']]
    return scale(freq, config.rope_theta, config.rope_scaling)


def yarn(freq, theta, settings):
    """Pairs that turn often within the original context keep their frequency, pairs that hardly
    turn are slowed down by `factor`, those between are interpolated: YaRN, arXiv 2309.00071."""
    factor = settings['factor']
    length = settings['original_max_position_embeddings']
    dim = 2 * len(freq)

    def pair_that_turns(times):
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(settings.get('beta_fast') or 32)), 0)
    last = min(math.ceil(pair_that_turns(settings.get('beta_slow') or 1)), dim - 1)
    ramp = ((torch.arange(dim // 2) - first) / max(last - first, 0.001)).clamp(0, 1)
    freq = freq / factor * ramp + freq * (1 - ramp)
    scale = yarn_mscale(factor, 1)
    if settings.get('mscale') and settings.get('mscale_all_dim'):
        scale = (yarn_mscale(factor, settings['mscale'])
                 / yarn_mscale(factor, settings['mscale_all_dim']))
    return freq, settings.get('attention_factor') or scale


def yarn_mscale(factor, mscale):
    """Return how much a longer context sharpens YaRN's attention."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def linear(freq, theta, settings):
    return freq / settings['factor'], 1.0       # positions move closer together


def llama3(freq, theta, settings):
    """Pairs that turn more than high_freq_factor times in the original context keep their
    frequency; below low_freq_factor they slow down: transformers' modeling_rope_utils."""
    turns = settings['original_max_position_embeddings'] * freq / (2 * math.pi)         # (d/2,)
    low = settings['low_freq_factor']
    kept = ((turns - low) / (settings['high_freq_factor'] - low)).clamp(0, 1)
    return freq / settings['factor'] * (1 - kept) + freq * kept, 1.0


LENGTHS = ('factor', 'original_max_position_embeddings')
SCALINGS = {            # rope_type: the function, the settings it needs
    'linear': (linear, ('factor',)),
    'llama3': (llama3, (*LENGTHS, 'low_freq_factor', 'high_freq_factor')),
    'yarn': (yarn, LENGTHS),
}


def check_scaling(settings):
    """Raise ValueError unless rope_scaling, if there is any, is known and complete."""
    if not settings:
        return
    kind = settings.get('rope_type')
    if kind not in SCALINGS:
        raise ValueError(f'rope_scaling with rope_type={kind!r} is not supported: must be one of '
                         f'default, {", ".join(SCALINGS)}')
    for name in SCALINGS[kind][1]:
        value = settings.get(name)
        if not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f'rope_scaling of type {kind}: {name}={value}: must be a number '
                             'above 0')
