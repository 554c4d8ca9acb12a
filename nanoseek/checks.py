"""What does not go together in a run: said before anything is done, each in a ValueError that names
the setting, its value, the limit and the way out."""
import importlib.util
from pathlib import Path

from nanoseek.tokenizer import load_tokenizer


def check_logs(s):
    """Where the run is written, and by what"""
    for package in ('wandb', 'tensorboard'):
        if getattr(s, package) and importlib.util.find_spec(package) is None:
            raise ValueError(f'{package}=true needs its package: pip install {package}')
    if Path(s.out_dir).exists() and not Path(s.out_dir).is_dir():
        raise ValueError(f'out_dir={s.out_dir}: a file has this name')


def check_batch(s, world):
    """global_batch_size and what a micro-step of all ranks takes of it"""
    devices = 'device' if world == 1 else 'devices'
    if s.batch_size:
        rows = s.batch_size * world
        of = f'batch_size={s.batch_size} x {world} {devices}'
    else:
        rows = world
        of = f'{world} {devices}'
    if s.global_batch_size % rows == 0:
        return
    below = s.global_batch_size // rows * rows
    near = f'{below + rows}'
    if below > 0:
        near = f'{below} or {below + rows}'
    raise ValueError(f'global_batch_size={s.global_batch_size}: must be a multiple of {of}, such '
                     f'as {near}')


def check_sizes(s, c, data):
    """Settings, the model's Config and the dataset"""
    if data.vocab_size > c.vocab_size:
        raise ValueError(f'the vocabulary of dataset={s.dataset} has {data.vocab_size:,} tokens, '
                         f'the model only vocab_size={c.vocab_size:,}: raise it, or set it to 0 to '
                         "take the dataset's")
    if s.block_size <= c.num_nextn_predict_layers:
        raise ValueError(f'block_size={s.block_size}: must be above the MTP depth, '
                         f'{c.num_nextn_predict_layers}')
    if s.block_size > c.max_position_embeddings:
        raise ValueError(f'block_size={s.block_size} is above max_position_embeddings='
                         f'{c.max_position_embeddings}: lower the one or raise the other')
    if s.doc_attention_mask:
        check_mask(s, c, data)


def check_mask(s, c, data):
    """A mask that keeps documents apart needs the token that ends them"""
    if c.attention == 'linear':
        raise ValueError('doc_attention_mask=true: attention=linear has no mask: take gqa or mla')
    if data.eot_id is None:
        raise ValueError(f'doc_attention_mask=true: dataset={s.dataset} has no end-of-text token: '
                         'prepare it with a tokenizer that has one, such as bpe:1024')
    if data.eot_id not in c.stop_ids[:1]:
        raise ValueError(f'doc_attention_mask=true: a text of dataset={s.dataset} ends with token '
                         f'{data.eot_id}, for the model with eos_token_id={c.eos_token_id}: set '
                         f'--eos_token_id={data.eot_id}')


def check_tokenizer(s, folder, data):
    """A model knows its own tokens only: the same ids that mean something else would train, and
    badly. folder: of the model that init_from names"""
    if not (folder / 'tokenizer.json').is_file():
        return
    theirs = load_tokenizer(folder)
    texts = [source.meta['source']['name'] for source, _ in data.sources.values()]
    for token, i in load_tokenizer(data.directory).get_vocab().items():
        if theirs.token_to_id(token) != i:
            raise ValueError(
                f'dataset={s.dataset} was made with another tokenizer than '
                f'init_from={s.init_from}, where {token!r} is not {i} but '
                f'{theirs.token_to_id(token)}: run python prepare.py '
                f'{" and ".join(texts)} --tokenizer={s.init_from} --out_dir=data/NAME')
