"""One number from which a run follows: --depth, the layers of its model. What was given stays as it
is, the rest comes from the formulas below; docs/scaling.md has the runs behind each of them."""
import math

import torch

from nanoseek.estimate import flops_per_token

TOKENS_PER_WEIGHT = 20      # of a run: for each weight that a token is multiplied with
FREE = ('tokens', 'global_batch_size')      # 0 says of these no more than that none was given
H100 = 989e12               # FLOP/s of its bfloat16 matmuls, dense, by NVIDIA's data sheet


def turn(settings, model, vocab_size, model_class, config_class):
    """Fills in what --depth says and nobody else did.

    settings, model: {name: value} as they were given for train.Settings and model.Config;
    vocab_size: the dataset's -> the same two, filled. ValueError where the depth cannot be had"""
    depth = settings['depth']
    if settings.get('init_from'):
        raise ValueError(f'depth={depth}: makes a new model, and init_from brings one: take one of '
                         'them')
    model = {**shape(depth, model), **model}
    c = config_class(**{'vocab_size': vocab_size, **model})
    weights = weights_of_a_token(model_class, c)
    given = {name: value for name, value in settings.items() if value != 0 or name not in FREE}
    settings = {**training(given, c, weights), **given}
    return settings, {'max_position_embeddings': settings['block_size'], **model}


def describe(model_class, c, s, matmul_rate):
    """Lines that say what a run with these settings takes, whatever its max_steps is"""
    weights = weights_of_a_token(model_class, c)
    with torch.device('meta'):
        flops = s.tokens * flops_per_token(model_class(c), s.block_size)
    step = s.global_batch_size * s.block_size
    yield (f'depth {s.depth}: {s.tokens:,} tokens, {s.tokens / weights:.0f} for each of the '
           f'{weights / 1e6:,.2f}M weights that a token is multiplied with, in '
           f'{s.tokens / step:,.0f} steps of {step:,}; learning rate {s.learning_rate:.1e}')
    here = hours(flops / matmul_rate)
    h100 = hours(flops / H100)
    yield (f'{flops:.1e} FLOPs: {here} at 40% of the rate of a matmul here, {h100} at 40% of an '
           "H100's")


def repeats(s, data):
    """-> a line where a run reads its text more often than helps, or None"""
    text = data.windows('train', s.block_size) * s.block_size
    if s.tokens <= 4 * text:
        return None
    return (f'{s.tokens:,} tokens are {s.tokens / text:.0f} times the training split, and a text '
            'that is read more than 4 times teaches little more (arXiv 2305.16264): '
            f'--tokens={4 * text} or a smaller depth stays within that')


def hours(seconds_of_matmuls):
    seconds = seconds_of_matmuls / 0.4
    if seconds < 100:
        return f'{seconds:.0f} s'
    if seconds < 6000:
        return f'{seconds / 60:.0f} minutes'
    return f'{seconds / 3600:,.0f} hours'


def shape(depth, given):
    """-> {setting: value} of a model with that many layers. given: settings of it that stay"""
    width = given.get('hidden_size', 64 * depth)
    head = 32
    if width > 256:
        head = 64
    heads = given.get('num_attention_heads', max(width // head, 1))
    found = {
        'num_hidden_layers': depth,
        'hidden_size': width,
        'num_attention_heads': heads,
        'initializer_range': 0.02,
    }
    if given.get('attention') == 'gqa':
        found['num_key_value_heads'] = heads
        if heads % 2 == 0:
            found['num_key_value_heads'] = heads // 2
    else:
        found.update({
            'attention': 'mla',
            'kv_lora_rank': multiple_of(16, width * 3 / 8),
            'qk_nope_head_dim': head // 2,
            'qk_rope_head_dim': head // 2,
            'v_head_dim': head,
        })
    if given.get('n_routed_experts') != 0:
        dense = math.ceil(width / 24) * 64      # the width of a SwiGLU, as Config has it
        found.update({
            'n_shared_experts': 1,
            'n_routed_experts': 16,
            'num_experts_per_tok': 2,
            'moe_intermediate_size': multiple_of(16, dense / 3),
            'bias_update_speed': 1e-2,
        })
    return found


def weights_of_a_token(model_class, c):
    """The weights that a token is multiplied with: those of its experts only, and the head's"""
    with torch.device('meta'):
        model = model_class(c)
    return flops_per_token(model, 0) / 6


def training(given, c, weights):
    """-> {setting: value} of a run of the model c. given: settings that stay"""
    tokens = given.get('tokens', round(TOKENS_PER_WEIGHT * weights))
    block = given.get('block_size', max(256, nearest_power_of_2(64 * given['depth'])))
    batch = given.get('global_batch_size', sequences(tokens, block))
    steps = max(round(tokens / (batch * block)), 1)
    if given.get('max_steps'):
        steps = given['max_steps']
        tokens = steps * batch * block
    return {
        'out_dir': f'out/depth-{given["depth"]}',
        'tokens': tokens,
        'optimizer': 'muon',
        'learning_rate': learning_rate(c.hidden_size),
        'embedding_lr': 3.0,
        'schedule': 'wsd',      # with a decay_frac of 1: linear to 0, from the warm-up on
        'decay_frac': 1.0,
        'min_lr_frac': 0.0,
        'warmup_steps': min(round(0.05 * steps), 500),
        'block_size': block,
        'global_batch_size': batch,
        'batch_size': 0,        # as many of these at a time as fit
        'max_steps': steps,
        'eval_interval': math.ceil(steps / 10),
        'checkpoint_interval': math.ceil(steps / 5),
    }


def learning_rate(width):
    """Muon's peak, by the width of the model"""
    return 1e-2 * (128 / width) ** 0.75


def sequences(tokens, block):
    """Of a step, by the tokens of the whole run: 2,048 tokens for a run of 2 million, and more for
    longer ones in proportion to tokens^0.38; at least 8 sequences, one for each GPU of a machine"""
    step = 2048 * (tokens / 2e6) ** 0.38
    return max(nearest_power_of_2(step / block), 8)


def nearest_power_of_2(x):
    return 2 ** round(math.log2(max(x, 1)))


def multiple_of(step, x):
    """The multiple of step nearest to x, at least one"""
    return step * max(round(x / step), 1)
