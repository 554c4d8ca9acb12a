"""Settings: a dataclass whose commented fields become a command line, config files and --help.

    settings, model_settings = load(Settings, model.Config)     # {name: value} of what was given

Config files (Python, executed) and --name=value (or --name value) override the defaults in the
order given; the last one wins. A user's mistake ends in one line on stderr.
"""
import ast
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
import time
import traceback
import types
import typing
from pathlib import Path


@contextlib.contextmanager
def user_errors(out_of_memory='use a smaller model or --batch_size', quiet=False):
    """The context that a script runs in. A ValueError, an OSError or a missing package is a user's
    mistake: it ends the script with one line on stderr (none if quiet) and exit status 2. So does
    a lack of memory, with advice. Anything else keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')   # terminals that lack a character
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:         # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ModuleNotFoundError) as e:
        if quiet:
            time.sleep(1)           # once one rank exits, torchrun kills all; let rank 0 print
            sys.exit(2)
        give_up(e)
    except (MemoryError, RuntimeError) as e:
        words = ('out of memory', 'allocate memory', 'tried to allocate')   # torch's, by device
        if isinstance(e, RuntimeError) and not any(word in str(e) for word in words):
            raise
        give_up(f'out of memory: {out_of_memory}')


def give_up(problem):
    message = ' '.join(str(problem).split())
    print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr)
    sys.exit(2)


def require(settings, name, holds, limit):
    if not holds:
        raise ValueError(f'{name}={getattr(settings, name)}: must be {limit}')


def check_model(c):
    """Raise ValueError if no model can be built from c."""
    for field in dataclasses.fields(c):
        if field.type is int:
            least = min(field.default, 1)
            require(c, field.name, getattr(c, field.name) >= least, f'at least {least}')
    require(c, 'q_lora_rank', c.q_lora_rank is None or c.q_lora_rank > 0, 'at least 1, or none')
    heads = c.num_attention_heads
    rotated = 'qk_rope_head_dim'
    if c.attention != 'mla':
        rotated = 'head_dim'
        require(c, 'num_key_value_heads', heads % c.num_key_value_heads == 0,
                f'a divisor of num_attention_heads={heads}')
    dim = getattr(c, rotated)
    require(c, rotated, dim > 0 and dim % 2 == 0, 'even, because RoPE turns pairs')
    if c.n_routed_experts:
        size, rest = divmod(c.n_routed_experts, c.n_group)
        require(c, 'n_group', c.n_group == 1 or (rest == 0 and size > 1),
                f'a divisor of {c.n_routed_experts} experts, with groups of at least 2')
        require(c, 'topk_group', c.topk_group <= c.n_group, f'at most n_group={c.n_group}')
        reach = size * c.topk_group
        require(c, 'num_experts_per_tok', c.num_experts_per_tok <= reach,
                f'at most {reach}, those in topk_group groups')


def refuse_pointer(file):
    """Raise ValueError for the three lines that a clone without git-lfs has instead of a file."""
    with open(file, 'rb') as f:
        if f.read(40).startswith(b'version https://git-lfs'):
            raise ValueError(f'{file} is a Git LFS pointer, not the file itself: run git lfs pull')


@contextlib.contextmanager
def lock(folder):
    """Lock a folder, created if needed, against other writers. ValueError if there is one.
    The system releases the lock when the process ends."""
    from filelock import FileLock, Timeout
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(Path(folder) / '.lock', timeout=0):
            yield
    except Timeout:
        raise ValueError(f'another process is writing to {folder}: wait for it, or use another '
                         'out_dir') from None


def load(*classes, argv=None, positional='', usage=''):
    """Read a command line. Return for each dataclass a dict of the fields that were given.

    positional: names of the fields that bare arguments set, other than config files.
    ValueError for a name or a value that does not fit, OSError for a file that cannot be read.
    """
    if argv is None:
        argv = sys.argv[1:]
    if '--help' in argv or '-h' in argv:
        print(usage.strip(), *map(describe, classes), sep='\n\n')
        sys.exit(0)
    hints = {}
    for cls in classes:
        hints.update(typing.get_type_hints(cls))
    free = positional.split()
    given = {}
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if arg.startswith('--'):
            name, text = option(arg, rest, hints)
            given[name] = typed(name, text, hints, 'on the command line', literal(text))
        elif arg.endswith('.py'):
            for name, value in read_file(arg, hints).items():
                given[name] = typed(name, value, hints, f'in {arg}')
        elif free:
            given[free.pop(0)] = arg
        else:
            raise ValueError(f"unexpected argument '{arg}': config files end in .py, settings "
                             'are --name=value')
    parts = []
    for cls in classes:
        names = [field.name for field in dataclasses.fields(cls)]
        parts.append({name: given[name] for name in names if name in given})
    return parts


def option(arg, rest, hints):
    """Split --name=value, or --name with its value at the front of rest, into name and text."""
    name, equals, text = arg[2:].partition('=')
    if equals or name not in hints:
        return name, text
    if hints[name] is bool and (not rest or rest[0].lower() not in ('true', 'false')):
        return name, 'true'                                 # a bare --flag
    if not rest:
        raise ValueError(f'--{name} needs a value')
    return name, rest.pop(0)


def read_file(path, hints):
    """Execute a config file. Return what it assigns, {name: value}. Functions, modules and
    imported names are ignored, unless named like a setting."""
    if not Path(path).is_file():
        raise ValueError(f"no config file '{path}'")
    try:
        scope = runpy.run_path(path)
    except Exception as e:
        line = getattr(e, 'lineno', None)           # of a SyntaxError
        for frame in traceback.extract_tb(e.__traceback__):
            if frame.filename == path:
                line = frame.lineno
        raise ValueError(f'{path}, line {line}: {type(e).__name__}: {e}') from e
    helpers = {name for name, value in scope.items()
               if name.startswith('_') or callable(value) or isinstance(value, types.ModuleType)}
    for node in ast.walk(ast.parse(Path(path).read_bytes())):
        if isinstance(node, ast.ImportFrom):
            helpers.update(alias.asname or alias.name for alias in node.names)
    return {name: value for name, value in scope.items() if name not in helpers - hints.keys()}


def literal(text):
    """Turn '1e4' into 10000.0, 'true' into True and 'none' into None; leave other text alone."""
    words = {'true': True, 'false': False, 'none': None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if isinstance(value, str):
        return text
    return value


def typed(name, value, hints, where, *first):
    """Return the first of (*first, value) that has the field's type: 1e4 is fine for an int, and
    1 for a float. No number is below 0. ValueError if none fits, or if there is no such field."""
    if name not in hints:
        near, = difflib.get_close_matches(name, hints, 1) or ['--help']
        raise ValueError(f"unknown setting '{name}' {where}, did you mean '{near}'?")
    for candidate in (*first, value):
        if isinstance(candidate, str) and candidate.startswith('~/'):
            candidate = os.path.expanduser(candidate)
        is_number = type(candidate) in (int, float) and str not in kinds(hints[name])
        if is_number and candidate < 0:
            raise ValueError(f'{name}={value} {where}: must be at least 0')
        for kind in kinds(hints[name]):
            if typing.get_origin(kind) is typing.Literal:
                if candidate in typing.get_args(kind):
                    return candidate
            elif type(candidate) is kind:
                return candidate
            elif kind is float and type(candidate) is int:
                return float(candidate)
            elif kind is int and type(candidate) is float and candidate.is_integer():
                return int(candidate)
    raise ValueError(f'{name}={value!r} {where}: must be {in_words(hints[name])}')


def kinds(hint):
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def in_words(hint):
    if typing.get_origin(hint) is typing.Literal:
        return '|'.join(str(choice).lower() for choice in typing.get_args(hint))
    names = [getattr(kind, '__name__', str(kind)) for kind in kinds(hint)]
    return ' or '.join(names).replace('NoneType', 'none')


def describe(cls):
    """Return a line per field: name, default, type, and the comment behind it in the source."""
    source = ''.join(inspect.getsource(base) for base in cls.__mro__[:-1])
    notes = dict(re.findall(r'^    (\w+):[^#\n]*#\s*(.*)$', source, re.M))
    hints = typing.get_type_hints(cls)
    lines = [cls.__doc__]
    for field in dataclasses.fields(cls):
        setting = f'--{field.name}={field.default!r}'
        kind = in_words(hints[field.name])
        lines.append(f'  {setting:32}  {kind:14}  {notes.get(field.name, "")}')
    return '\n'.join(lines)
