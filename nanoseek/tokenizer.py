"""The kinds of tokenizers, made, loaded and checked. Each becomes a tokenizers.Tokenizer, which
makes the ids here and reads prompts later.

    char          every character of the text
    bpe:N         bytes and their N - 257 most frequent merges, trained here
    gpt2          GPT-2's, through tiktoken; gpt2+code has tokens for chats and code as well
    a name        any on the Hugging Face Hub, a folder, a tokenizer.json
"""
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
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

# Characters
PIECE = 1 << 15             # longer texts are cut into pieces of about so many
LONGEST = 1 << 18           # without a place where a cut changes nothing, any other will do
CONTEXT = 200               # on both sides of a cut, to see whether it makes a difference
GROUP = 1 << 20             # that a tokenizer gets at a time, at 330 bytes of memory each
WORD = 1 << 11              # a BPE is trained on words of at most twice as many


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


ONE_WORD = re.compile(r'\w+|\s+|[^\w\s]+')


def short_words(texts):
    """Yields the texts, cut where a word or a run of white space is too long to train on: what
    that takes grows with the square. All other texts stay whole."""
    for text in texts:
        begin = 0
        for at in range(0, len(text) - WORD + 1, WORD):
            if ONE_WORD.fullmatch(text, at, at + WORD):
                if at > begin:
                    yield text[begin:at]
                yield text[at:at + WORD]
                begin = at + WORD
        if begin < len(text):
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


def cut(tokenizer, blocks, size=PIECE, longest=LONGEST):
    """Blocks of a text -> pieces of it that give the same ids as the whole.

    The text is cut about every `size` characters, where both sides make the same tokens together
    and apart. Where `longest` characters have no such place, it is cut where both sides at least
    give the text back. Depends on the text behind the last cut alone. tokenizer: None, where any
    lone white space is good enough"""
    text = ''
    begin = 0                                   # of the piece
    reach = longest
    for block in itertools.chain(blocks, [None]):
        more = block is not None
        if more:
            text = text[begin:] + block
            begin = 0
        while True:
            left = len(text) - begin
            if left < size or (more and left < reach + CONTEXT):
                break
            at = find_cut(tokenizer, text, begin, size, reach)
            if at is not None:
                yield text[begin:at]
                begin = at
                reach = longest
            elif left > reach:
                reach *= 2                      # such a tokenizer gets longer pieces
            else:
                break
    if begin < len(text):
        yield text[begin:]


def find_cut(tokenizer, text, begin, size, longest):
    """-> where the piece that begins there can end, or None"""
    end = min(begin + longest, len(text))
    at = begin + size
    candidates = False
    while found := CUT.search(text, at, end):
        if changes_nothing(tokenizer, text, begin, found.start()):
            return found.start()
        at = found.start() + size
        candidates = True
    if len(text) - begin <= longest:
        return None
    if candidates:                              # some are nearer to each other
        for found in itertools.islice(CUT.finditer(text, begin + size, end), 100):
            if changes_nothing(tokenizer, text, begin, found.start()):
                return found.start()
    anywhere = range(end, end - 20, -1)         # far on: all until there has been looked at
    for allows in (changes_nothing, gives_text_back):
        for at in anywhere:
            if allows(tokenizer, text, begin, at):
                return at
    return None


def changes_nothing(tokenizer, text, begin, at):
    """Whether both sides of a place make the same ids together and apart"""
    if tokenizer is None:
        return True
    left = text[max(begin, at - CONTEXT):at]
    right = text[at:at + CONTEXT]
    try:
        apart = encode(tokenizer, left) + encode(tokenizer, right)
        return encode(tokenizer, left + right) == apart
    except ValueError:                          # of a character, which is found again later
        return True


def gives_text_back(tokenizer, text, begin, at):
    """Whether the ids of both sides of a place, one behind the other, are the text's"""
    left = text[max(begin, at - CONTEXT):at]
    right = text[at:at + CONTEXT]
    ids = encode(tokenizer, left) + encode(tokenizer, right)
    return decode(tokenizer, ids) == left + right


def groups(texts):
    """Yields lists of texts that have GROUP characters or a little more together"""
    group = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group = []
            size = 0
    if group:
        yield group


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
        # A thread has a heap of its own. The library allocates a string for every token, and is a
        # fifth slower where Python's objects have left holes
        self.thread = ThreadPoolExecutor(1)

    def own_tiktoken(self):
        """tiktoken's GPT-2 with the special tokens of tokenizer.json"""
        import tiktoken
        gpt2 = load_tiktoken()
        special = {}
        for i, token in self.tokenizer.get_added_tokens_decoder().items():
            special[token.content] = i
        return tiktoken.Encoding(self.name, pat_str=gpt2._pat_str,
                                 mergeable_ranks=gpt2._mergeable_ranks, special_tokens=special)

    def cut(self, blocks):
        """Blocks of a text -> yields pieces of it that are encoded each on its own"""
        if self.table is None:
            yield from cut(self.tokenizer, blocks)
            return
        for block in blocks:                    # characters can be cut anywhere
            for begin in range(0, len(block), PIECE):
                yield block[begin:begin + PIECE]

    def pieces(self, text):
        if len(text) <= 2 * PIECE:
            return [text]
        return list(self.cut([text]))

    def encode_each(self, texts, check):
        """As encode, texts -> (ids, None) for each, or (None, what is wrong with it)"""
        try:
            return [(ids, None) for ids in self.encode_whole(texts, check)]
        except BaseException as e:
            if not is_of_text(e):
                raise
        found = []
        for text in texts:                      # which one is it?
            try:
                ids, = self.encode_whole([text], check)
                found.append((ids, None))
            except BaseException as e:
                if not is_of_text(e):
                    raise
                found.append((None, in_words(e)))
        return found

    def encode_whole(self, texts, check):
        """As encode, for texts of any length"""
        pieces = [self.pieces(text) for text in texts]
        made = iter(self.encode(itertools.chain.from_iterable(pieces), check))
        found = []
        for parts in pieces:
            ids = [next(made) for _ in parts]
            if len(ids) != 1:
                ids = [np.concatenate([np.zeros(0, np.uint32), *ids])]
            found += ids
        return found

    def encode(self, texts, check):
        """texts -> an array of ids (n,) uint32 for each. ValueError unless the ids give the text
        back; for gpt2 also unless they are what tokenizer.json makes. A text that cannot lose
        anything is checked only where check is set"""
        if self.table is not None:              # where each character has its own id
            return [self.characters(text) for text in texts]
        found = []
        for group in groups(texts):
            made = self.encode_group(group)
            for text, ids in zip(group, made):
                if check or self.may_lose(text):
                    self.check_round_trip(text, ids.tolist())
            found += made
        return found

    def encode_group(self, texts):
        if self.tiktoken is not None:
            return [self.tiktoken.encode_to_numpy(text, **self.options) for text in texts]
        return self.thread.submit(self.encode_batch, texts).result()

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


def is_of_text(error):
    """Whether it is the text's fault, whatever a tokenizer made of it. A panic in Rust is no
    Exception; a lack of memory is the machine's."""
    if isinstance(error, MemoryError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == 'PanicException'


def in_words(error):
    if isinstance(error, ValueError):
        return str(error)
    return f'{type(error).__name__}: {error}'


def character_table(tokenizer):
    """-> the id of each code point, or -1 (n,) int64, for a tokenizer of characters"""
    vocab = {c: i for c, i in tokenizer.get_vocab().items() if len(c) == 1}
    table = np.full(max(map(ord, vocab)) + 1, -1, np.int64)
    for c, i in vocab.items():
        table[ord(c)] = i
    return table


def lost_bytes(tokenizer):
    """The bytes that a BPE of bytes has no token for, where it is proven that it loses nothing
    else. Else None: every text is to be checked."""
    parts = json.loads(tokenizer.to_str())
    for token in parts['added_tokens']:
        strips = token['lstrip'] or token['rstrip'] or token['single_word']
        if strips or not token['special']:      # which is found in a text
            return None
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    one_to_one = len(set(vocab.values())) == len(vocab)
    if not (one_to_one and is_plain_byte_level(parts)):
        return None
    letters = byte_letters()
    return bytes(byte for byte in letters if tokenizer.token_to_id(letters[byte]) is None)


def is_plain_byte_level(parts):
    """Whether a tokenizer.json is a BPE of bytes and nothing that changes a text is in front of
    it or behind it. What is not named here is not understood."""
    model = parts['model']
    special = ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback',
               'ignore_merges')
    if model['type'] != 'BPE' or any(model.get(name) for name in special):
        return False
    if parts['normalizer']:
        return False
    nothing = {'type': None}
    first = parts['pre_tokenizer'] or nothing
    *before, last = first.get('pretokenizers', [first])
    if last['type'] != 'ByteLevel' or last.get('add_prefix_space') is not False:
        return False
    if any(step['type'] != 'Digits' for step in before):
        return False
    decoder = parts['decoder'] or nothing
    return decoder['type'] == 'ByteLevel'
