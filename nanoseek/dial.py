"""--depth: one number, the layers of the model, from which a run follows. Settings that are given
stay; the rest comes from the formulas below. docs/scaling.md has the runs behind each of them."""
import math

from model import Config
from nanoseek.cost import flops_per_token, on_meta

TOKENS_PER_WEIGHT = 20      # of a run, for each weight that a token is multiplied with


def turn(given, model_given, vocab_size):
    """Return {name: value} for train.Settings and for model.Config: what was given, and what
    follows from given['depth']. vocab_size: the dataset's"""
    depth = given['depth']
    if given.get('init_from'):
        raise ValueError(f'depth={depth} makes a new model, and init_from={given["init_from"]} '
                         'loads one: use one of them')
    model = {**shape(depth, model_given), **model_given}
    c = Config(**{'vocab_size': vocab_size, **model})
    unset = ('tokens', 'global_batch_size')     # at 0
    given = {name: value for name, value in given.items() if value != 0 or name not in unset}
    run = {**training(given, c), **given}
    return run, {'max_position_embeddings': run['block_size'], **model}


def shape(depth, given):
    """Return {setting: value} for a model of that many layers. given: its settings that stay"""
    width = given.get('hidden_size', 64 * depth)
    head = 64 if width > 256 else 32
    heads = given.get('num_attention_heads', max(width // head, 1))
    model = {'num_hidden_layers': depth, 'hidden_size': width, 'num_attention_heads': heads,
             'initializer_range': 0.02}
    if given.get('attention') == 'gqa':
        model['num_key_value_heads'] = heads // 2 if heads % 2 == 0 else heads
    else:
        model.update({
            'attention': 'mla',
            'kv_lora_rank': 16 * max(round(width * 3 / 8 / 16), 1),
            'qk_nope_head_dim': head // 2,
            'qk_rope_head_dim': head // 2,
            'v_head_dim': head})
    if given.get('n_routed_experts') != 0:
        model.update({
            'n_shared_experts': 1,
            'n_routed_experts': 16,
            'num_experts_per_tok': 2,
            # a third of a dense SwiGLU, as in Config
            'moe_intermediate_size': 16 * max(round(math.ceil(width / 24) * 64 / 3 / 16), 1),
            'bias_update_speed': 1e-2,
        })
    return model


def training(given, c):
    """Return {setting: value} for a run of the model c. given: settings that stay"""
    depth = given['depth']
    tokens = given.get('tokens', round(TOKENS_PER_WEIGHT * weights_of_a_token(c)))
    block = given.get('block_size', max(256, nearest_power_of_2(64 * depth)))
    step = 2048 * (tokens / 2e6) ** 0.38        # tokens; at least 8 sequences, for 8 GPUs
    batch = given.get('global_batch_size', max(nearest_power_of_2(step / block), 8))
    steps = max(round(tokens / (batch * block)), 1)
    if given.get('max_steps'):
        steps = given['max_steps']
        tokens = steps * batch * block
    return {
        'out_dir': f'out/depth-{depth}',
        'tokens': tokens,
        'optimizer': 'muon',
        'learning_rate': 1e-2 * (128 / c.hidden_size) ** 0.75,
        'embedding_lr': 3.0,
        'schedule': 'wsd',      # with a decay_frac of 1: linear to 0 after the warm-up
        'decay_frac': 1.0,
        'min_lr_frac': 0.0,
        'warmup_steps': min(round(0.05 * steps), 500),
        'block_size': block,
        'global_batch_size': batch,
        'batch_size': 0,        # as many of them at a time as fit
        'max_steps': steps,
        'eval_interval': math.ceil(steps / 10),
        'checkpoint_interval': math.ceil(steps / 5),
    }


def weights_of_a_token(c):
    return flops_per_token(on_meta(c), 0) / 6       # its experts' only, and the head's


def nearest_power_of_2(x):
    return 2 ** round(math.log2(x))


def describe(c, s, matmul_rate):
    """Return two lines: the run, and how long it takes here. matmul_rate: FLOP/s"""
    flops = s.tokens * flops_per_token(on_meta(c), s.block_size)
    step = s.global_batch_size * s.block_size
    return [
        f'depth {s.depth}: {s.tokens:,} tokens in {s.tokens / step:,.0f} steps of {step:,}; '
        f'learning rate {s.learning_rate:.1e}',
        f"{flops:.1e} FLOP: {flops / matmul_rate / .4 / 60:,.1f} minutes at 40% of a matmul's rate"]
