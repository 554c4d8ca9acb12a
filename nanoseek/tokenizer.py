"""The kinds of tokenizers, made, loaded and checked. Each becomes a tokenizers.Tokenizer, which
makes the ids here and reads prompts later.

    char          every character of the text
    bpe:N         bytes and their N - 257 most frequent merges, trained here
    gpt2          GPT-2's, through tiktoken; gpt2+code has tokens for chats and code as well
    a name        any on the Hugging Face Hub, a folder, a tokenizer.json
"""
import json
import os
import re
from pathlib import Path

import numpy as np

from nanoseek import folders

EOT = '<|endoftext|>'
# What ends a text is called in other people's tokenizers
EOT_NAMES = (EOT, '<|end_of_text|>', '</s>', '<eos>', '<｜end▁of▁sentence｜>')
CODE_TOKENS = ['<|im_start|>', '<|im_end|>', '<repo_name>', '<reponame>', '<file_sep>',
               '<filename>', '<gh_stars>', '<issue_start>', '<issue_comment>', '<issue_closed>',
               '<jupyter_start>', '<jupyter_text>', '<jupyter_code>', '<jupyter_output>',
               '<empty_output>']

PIECE = 1 << 15             # characters: longer texts are cut
LONGEST = 1 << 18           # of a piece without a place where a cut changes nothing
LONGEST_WORD = 1000         # that a BPE is trained on: its cost grows with the square


# ---------------------------------------------------------------------------- made, by kind

def char_tokenizer(characters):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    vocab = {c: i for i, c in enumerate(sorted(characters))}
    # BPE would drop a new character silently; WordLevel whose unknown token is not in the
    # vocabulary refuses it.
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def byte_level(model):
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's regex
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(size, texts):
    """A BPE of bytes with a vocabulary of that size, or smaller where no pair of tokens is left
    that comes twice."""
    from tokenizers import models, pre_tokenizers, trainers
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, special_tokens=[EOT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(short_words(texts), trainer)
    return tokenizer


def short_words(texts):
    """Yields the texts, cut where a word or a run of white space is too long to train on"""
    longest = re.compile(r'\S{%d}|\s{%d}' % (LONGEST_WORD, LONGEST_WORD))
    for text in texts:
        begin = 0
        for found in longest.finditer(text):
            yield text[begin:found.end()]
            begin = found.end()
        yield text[begin:]


def gpt2_tokenizer():
    """tiktoken's GPT-2. It has each token's rank, where the tokenizers format has merges."""
    from tokenizers import models
    ranks = load_tiktoken()._mergeable_ranks        # {token's bytes: id}, in order of merging
    letters = byte_letters()

    def spell(token):
        return ''.join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            left, right = last_merge(token, ranks)
            merges.append((spell(left), spell(right)))
    vocab = {spell(token): i for token, i in ranks.items()}
    tokenizer = byte_level(models.BPE(vocab, merges))
    tokenizer.add_special_tokens([EOT])
    return tokenizer


def last_merge(token, ranks):
    """The two tokens that are merged at last into one: merges by rank until two are left"""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def load_tiktoken():
    import tiktoken
    try:
        return tiktoken.get_encoding('gpt2')
    except OSError as e:
        raise ValueError(f"tokenizer 'gpt2': tiktoken could not download its vocabulary "
                         f'({type(e).__name__}) and has none in TIKTOKEN_CACHE_DIR; '
                         '--tokenizer=bpe:N needs no network') from e


def byte_letters():
    """{byte: the character that stands for it in the vocabulary of a BPE of bytes}"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]       # stand for themselves
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    for i, byte in enumerate(others):
        letters[byte] = chr(256 + i)
    return letters


def other_tokenizer(name):
    """That of a folder, a tokenizer.json or the Hub"""
    if Path(name).exists() or name.endswith('.json'):
        tokenizer = load_tokenizer(name)
    else:
        tokenizer = load_tokenizer(folders.hub_folder(name, ['tokenizer.json']))
    if tokenizer.num_special_tokens_to_add(is_pair=False):
        tokenizer.post_processor = None     # no <bos> in the token files, so none in prompts
    return tokenizer


# -------------------------------------------------------------------------- loaded, and used

def load_tokenizer(path):
    """A tokenizer.json, or the folder of a dataset or a model with one -> tokenizers.Tokenizer.
    Where a text spells a special token, it is that token only if the folder says so."""
    file = Path(path)
    if file.is_dir():
        file = file / 'tokenizer.json'
    if not file.is_file():
        raise ValueError(f"no file '{file}'")
    tokenizer = parse_tokenizer(file.read_bytes(), file)
    tokenizer.encode_special_tokens = not special_in_text(Path(path))
    return tokenizer


def special_in_text(folder):
    """Whether a special token that is spelled in a text is that token and not its letters: as
    prepare.py's setting says of a dataset, and the tokenizer's own configuration of a model"""
    if (folder / 'meta.json').is_file():
        meta = folders.read_json(folder / 'meta.json')
        return meta.get('recipe', {}).get('special_in_text', False)
    return (folder / 'config.json').is_file() and folders.special_in_text(folder)


def parse_tokenizer(data, name):
    """The bytes of a tokenizer.json -> tokenizers.Tokenizer"""
    from tokenizers import Tokenizer
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as e:                          # tokenizers raises nothing more special
        raise ValueError(f"'{name}' is not a tokenizer in Hugging Face's format: {e}") from e
    tokenizer.encode_special_tokens = True          # '<|endoftext|>' in a text is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer, text):
    """text -> list of ids. ValueError for a character that has none"""
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except Exception:
        unknown = [c for c in text if tokenizer.token_to_id(c) is None]
        if not unknown:
            raise
        raise unknown_character(unknown[0], tokenizer.get_vocab_size()) from None


def unknown_character(c, count):
    return ValueError(f'character {c!r} (U+{ord(c):04X}) is not in the vocabulary of this '
                      f'tokenizer, which has {count} characters')


def decode(tokenizer, ids):
    """ids -> text, with special tokens spelled out"""
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


# ------------------------------------------------------------------------ large texts to ids

# A lone white space, or before punctuation
CUT = re.compile(r'(?<=\S)\s(?=\S)|(?<=\w)(?=[^\w\s])')


def cut(tokenizer, blocks, size=PIECE, context=200):
    """Blocks of a text -> pieces of it that give the same ids as the whole: it is cut about every
    `size` characters, where both sides make the same tokens together and apart. A text that has
    no such place for long is cut anywhere. Depends on the text behind the last cut alone.
    tokenizer: None, where any lone white space is good enough"""
    blocks = at_least(blocks, LONGEST)
    text = ''
    begin = 0                                   # of the piece
    at = 0                                      # the last place that was looked at
    more = True
    while True:
        end = len(text)
        if more:
            end -= context
        end = min(end, begin + LONGEST)
        found = CUT.search(text, at + size, end)
        if found:
            at = found.start()
            left = text[max(begin, at - context):at]
            right = text[at:at + context]
            if tokenizer is None or cut_changes_nothing(tokenizer, left, right):
                yield text[begin:at]
                begin = at
        elif end == begin + LONGEST:
            at = last_resort(tokenizer, text, end, context)
            yield text[begin:at]
            begin = at
        elif more:
            block = next(blocks, None)
            if block is None:
                more = False
            else:
                text = text[begin:] + block
                at -= begin
                begin = 0
        else:
            break
    if begin < len(text):
        yield text[begin:]


def last_resort(tokenizer, text, end, context):
    """-> the last place in front of end where a cut changes nothing; without any near it, end"""
    if tokenizer is not None:
        for at in range(end, end - context, -1):
            if cut_changes_nothing(tokenizer, text[at - context:at], text[at:at + context]):
                return at
    return end


def at_least(blocks, size):
    """Blocks of a text -> larger ones, so that nothing is looked at again and again"""
    parts = []
    total = 0
    for block in blocks:
        parts.append(block)
        total += len(block)
        if total >= size:
            yield ''.join(parts)
            parts = []
            total = 0
    yield ''.join(parts)


def cut_changes_nothing(tokenizer, left, right):
    try:
        apart = encode(tokenizer, left) + encode(tokenizer, right)
        return encode(tokenizer, left + right) == apart
    except ValueError:                          # of a character, which is found again later
        return True


class Encoder:
    """Texts -> ids, by the fastest way there is, checked. folder: with tokenizer.json; name: the
    kind of the tokenizer"""

    def __init__(self, folder, name, special_in_text=False):
        self.tokenizer = load_tokenizer(Path(folder) / 'tokenizer.json')
        self.tokenizer.encode_special_tokens = not special_in_text
        self.name = name
        self.tiktoken = None
        self.table = None
        self.lost = None                        # bytes without a token; None: nobody knows
        if name in ('gpt2', 'gpt2+code'):
            self.tiktoken = self.own_tiktoken()
            self.options = {'allowed_special': set(), 'disallowed_special': ()}
            if special_in_text:
                self.options['allowed_special'] = self.tiktoken.special_tokens_set
        elif name == 'char' and not special_in_text:
            self.table = character_table(self.tokenizer)
        if not special_in_text:
            self.lost = lost_bytes(self.tokenizer)

    def own_tiktoken(self):
        """tiktoken's GPT-2 with the special tokens of tokenizer.json"""
        import tiktoken
        gpt2 = load_tiktoken()
        special = {}
        for i, token in self.tokenizer.get_added_tokens_decoder().items():
            special[token.content] = i
        return tiktoken.Encoding(self.name, pat_str=gpt2._pat_str,
                                 mergeable_ranks=gpt2._mergeable_ranks, special_tokens=special)

    def pieces(self, text):
        """A text -> pieces of it that are encoded each on its own"""
        if len(text) <= 2 * PIECE:
            return [text]
        if self.table is not None:              # characters can be cut anywhere
            return [text[i:i + PIECE] for i in range(0, len(text), PIECE)]
        return list(cut(self.tokenizer, [text]))

    def encode(self, texts, check):
        """texts -> an array of ids (n,) uint32 for each. ValueError unless the ids give the text
        back; for gpt2 also unless they are what tokenizer.json makes. A text that cannot lose
        anything is checked only where check is set"""
        if self.table is not None:
            return [self.characters(text) for text in texts]
        if self.tiktoken is not None:
            made = [self.tiktoken.encode_to_numpy(text, **self.options) for text in texts]
        else:
            made = self.encode_batch(texts)
        for text, ids in zip(texts, made):
            if check or self.may_lose(text):
                self.check_round_trip(text, ids.tolist())
        return made

    def encode_batch(self, texts):
        try:
            found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception:
            for text in texts:
                encode(self.tokenizer, text)            # whose error names the character
            raise
        return [np.array(piece.ids, np.uint32) for piece in found]

    def characters(self, text):
        points = np.frombuffer(text.encode('utf-32-le'), np.uint32)
        known = points < len(self.table)
        if not known.all() or (self.table[points] < 0).any():
            raise next(unknown_character(c, len(self.tokenizer.get_vocab()))
                       for c in text if self.tokenizer.token_to_id(c) is None)
        return self.table[points].astype(np.uint32)

    def may_lose(self, text):
        if self.lost is None:
            return True
        data = text.encode()
        return len(self.lost) > 0 and len(data.translate(None, self.lost)) < len(data)

    def check_round_trip(self, text, ids):
        back = decode(self.tokenizer, ids)
        if back != text:
            at = len(os.path.commonprefix([text, back]))
            raise ValueError(
                f"tokenizer '{self.name}' does not give the text back: behind "
                f'{text[max(at - 20, 0):at]!r} {text[at:at + 20]!r} becomes {back[at:at + 20]!r};'
                ' take another, such as bpe:1024')
        if self.tiktoken is not None and encode(self.tokenizer, text) != ids:
            raise ValueError(f"tokenizer '{self.name}': tokenizer.json and tiktoken disagree on "
                             f'{text[:80]!r}')


def character_table(tokenizer):
    """-> the id of each code point, or -1 (n,) int64, for a tokenizer of characters"""
    vocab = {c: i for c, i in tokenizer.get_vocab().items() if len(c) == 1}
    table = np.full(max(map(ord, vocab)) + 1, -1, np.int64)
    for c, i in vocab.items():
        table[ord(c)] = i
    return table


def lost_bytes(tokenizer):
    """The bytes that a BPE of bytes has no token for, where it is proven that it loses nothing
    else: nothing comes before it that changes a text, no added token is found in a text, and
    nothing but its bytes comes back. Else None: every text is to be checked."""
    parts = json.loads(tokenizer.to_str())
    model = parts['model']
    before = parts['pre_tokenizer'] or {'type': None}
    steps = before.get('pretokenizers', [before])
    for token in parts['added_tokens']:
        plain = not (token['lstrip'] or token['rstrip'] or token['single_word'])
        if not token['special'] or not plain:
            return None
    plain_model = (
        model['type'] == 'BPE' and not model.get('dropout') and not model.get('byte_fallback')
        and not model.get('continuing_subword_prefix') and not model.get('end_of_word_suffix'))
    byte_level_last = steps[-1]['type'] == 'ByteLevel'
    known_steps = all(step['type'] in ('ByteLevel', 'Digits')
                      and not step.get('add_prefix_space') for step in steps)
    decoder = parts['decoder'] or {'type': None}
    if (plain_model and byte_level_last and known_steps and decoder['type'] == 'ByteLevel'
            and not parts['normalizer']):
        missing = [byte for byte, letter in byte_letters().items()
                   if tokenizer.token_to_id(letter) is None]
        return bytes(missing)
    return None
