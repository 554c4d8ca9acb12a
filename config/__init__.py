"""Settings are the fields of a dataclass, one commented line each. Config files (Python, executed)
and --name=value (or --name value) override them in the order given; later wins. --help lists them.

    settings, model_settings = config.load(Settings, model.Config)  # a dict of what was given, each
"""
import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import os
import re
import sys
import traceback
import types
import typing
from pathlib import Path


class OutputLost(Exception):
    """What a script prints cannot be written, and is what the script is for"""


class Output:
    """A terminal, a file or a pipe to print to, in place of sys.stdout or sys.stderr. A letter
    that its encoding lacks is printed as its escape. When it cannot be written any more (a full
    disk, a closed pipe, a terminal that is gone), problem is the error and what is printed from
    then on is dropped: a print must not end a run. Where it is needed, OutputLost is raised"""

    def __init__(self, stream):
        self.needed = False
        self.problem = None
        if stream is None:              # closed when Python started
            self.problem = OSError(errno.EBADF, 'closed from the start')
            stream = open(os.devnull, 'w', encoding='utf-8')
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
        except OSError as e:
            self.lose(e)
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as e:
            self.lose(e)

    def lose(self, problem):
        self.problem = problem
        # What is left in buffers, Python's and other libraries', goes nowhere and raises nothing
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        if self.needed:
            raise OutputLost(problem) from problem


def guard_output():
    """From now on no print can end the process."""
    if not isinstance(sys.stdout, Output):
        sys.stdout = Output(sys.stdout)
    if not isinstance(sys.stderr, Output):
        sys.stderr = Output(sys.stderr)


@contextlib.contextmanager
def user_errors(needs_stdout=False):
    """What a script runs in. A user's mistake (ValueError, OSError) ends in one line on stderr and
    exit status 2, a bug in its traceback. needs_stdout: what is printed is what the script is for.
    If it cannot be written that is such a mistake, or ends the script without a word where the
    reader has seen enough, as head."""
    guard_output()
    stdout = sys.stdout
    before = stdout.needed
    stdout.needed = needs_stdout
    try:
        if needs_stdout and stdout.problem:
            raise OutputLost(stdout.problem)
        yield
        stdout.flush()
    except OutputLost:
        if is_closed_pipe(stdout.problem):
            sys.exit(141)               # as a shell has it for what SIGPIPE ends
        give_up(f'stdout cannot be written: {stdout.problem.strerror}')
    except (ValueError, OSError) as e:
        give_up(e)
    finally:
        stdout.needed = before


def give_up(problem):
    line = ' '.join(str(problem).split())
    print(f'{Path(sys.argv[0]).name}: {line}', file=sys.stderr)
    sys.exit(2)


def is_closed_pipe(problem):
    on_windows = os.name == 'nt' and problem.errno == errno.EINVAL
    return isinstance(problem, BrokenPipeError) or on_windows


def load(*classes, argv=None, positional='', usage=''):
    """Reads argv -> for each dataclass, a dict {name: value} of what was given. positional: names
    of the fields that bare arguments go to which are no config files. ValueError, OSError"""
    if argv is None:
        argv = sys.argv[1:]
    if '--help' in argv or '-h' in argv:
        with user_errors(needs_stdout=True):
            print(usage.strip(), *map(describe, classes), sep='\n\n')
        sys.exit(0)
    check_text(argv)
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
            for name, value in read_file(arg).items():
                given[name] = typed(name, value, hints, f'in {arg}')
        elif free:
            given[free.pop(0)] = arg
        else:
            raise ValueError(f"unexpected argument '{arg}': a config file ends in .py, a setting "
                             'is --name=value')
    found = []
    for cls in classes:
        names = [field.name for field in dataclasses.fields(cls)]
        found.append({name: given[name] for name in names if name in given})
    return found


def on_command_line(name):
    """Whether a setting is given there, rather than in a config file"""
    return any(arg.partition('=')[0] == f'--{name}' for arg in sys.argv[1:])


def check_text(argv):
    """ValueError where an argument is bytes that Python could not read as text (it keeps them as
    surrogates, which no file in UTF-8 can hold)"""
    for arg in argv:
        if any('\ud800' <= letter <= '\udfff' for letter in arg):
            encoding = sys.getfilesystemencoding()
            if encoding.lower() == 'utf-8':
                raise ValueError(f'argument {arg!r} is not UTF-8 text: rename the file, or take '
                                 'another name')
            raise ValueError(f'argument {arg!r} has letters that the locale here, {encoding}, '
                             'does not know: run it with PYTHONUTF8=1 in the environment')


def option(arg, rest, hints):
    """--name=value, or --name with its value first in rest, from which it is taken -> name, text"""
    name, equals, text = arg[2:].partition('=')
    if equals or name not in hints:
        return name, text
    if hints[name] is bool and (not rest or rest[0].lower() not in ('true', 'false')):
        return name, 'true'                                 # a bare --flag
    if not rest:
        raise ValueError(f'--{name} needs a value')
    return name, rest.pop(0)


def near(name, names, otherwise=''):
    """A suggestion for a name that is not one of names"""
    found = difflib.get_close_matches(name, names, 1)
    if found:
        return f", did you mean '{found[0]}'?"
    return otherwise


def read_file(path):
    """Executes a config file -> {name: value} of what it assigns"""
    if not Path(path).is_file():
        files = [str(file) for file in Path('config').glob('[!_]*.py')]
        raise ValueError(f"no config file '{path}'" + near(path, files))
    scope = {'__file__': path}
    try:
        exec(compile(Path(path).read_text(encoding='utf-8'), path, 'exec'), scope)
    except SyntaxError as e:
        raise ValueError(f'{path}, line {e.lineno}: {e.msg}') from e
    except UnicodeDecodeError as e:
        raise ValueError(f'{path} is not UTF-8 text: {e}') from e
    except Exception as e:                                  # whatever its code raises
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__)
                 if frame.filename == path]
        raise ValueError(f'{path}, line {lines[-1]}: {type(e).__name__}: {e}') from e
    found = {}
    for name, value in scope.items():
        if not name.startswith('_') and not isinstance(value, types.ModuleType):
            found[name] = value
    return found


def literal(text):
    """'1e4' -> 10000.0, 'true' -> True, 'none' -> None; other text, also quoted, stays as it is."""
    words = {'true': True, 'false': False, 'none': None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    if isinstance(value, str):
        return text
    return value


def typed(name, value, hints, where, *first):
    """The value, or rather one of first, as its field's type: 1e4 is a count where an int is
    wanted, 1 a float. ValueError where it is neither, or no field has the name"""
    if name not in hints:
        raise ValueError(f"unknown setting '{name}' {where}"
                         + near(name, hints, ' (--help lists them)'))
    for candidate in (*first, value):
        for kind in kinds(hints[name]):
            if typing.get_origin(kind) is typing.Literal:
                if is_one_of(candidate, typing.get_args(kind)):
                    return candidate
            elif type(candidate) is kind:
                return candidate
            elif kind is float and type(candidate) is int:
                return float(candidate)
            elif kind is int and type(candidate) is float and is_whole(candidate):
                return int(candidate)
    raise ValueError(f'{name}={value!r} {where}: wanted {wanted(hints[name])}')


def kinds(hint):
    """The types of `int | None`, or the one type that it is"""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def is_one_of(value, choices):
    """As `in`, but 1 is not True"""
    return any(value == choice and type(value) is type(choice) for choice in choices)


def is_whole(number):
    return abs(number) < 2**63 and number == int(number)


def wanted(hint):
    """A type in words"""
    if typing.get_origin(hint) is typing.Literal:
        return '|'.join(str(choice).lower() for choice in typing.get_args(hint))
    names = [getattr(kind, '__name__', str(kind)) for kind in kinds(hint)]
    return ' or '.join(names).replace('NoneType', 'none')


def describe(cls):
    """A line for each field: name, default, type and the comment behind it in the source."""
    source = ''.join(inspect.getsource(base) for base in cls.__mro__[:-1])
    notes = dict(re.findall(r'^    (\w+):[^#\n]*#\s*(.*)$', source, re.M))
    hints = typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        rows.append((f'  --{field.name}={field.default!r}', wanted(hints[field.name]),
                     notes.get(field.name, '')))
    first = max(len(row[0]) for row in rows)
    second = max(len(row[1]) for row in rows)
    lines = [inspect.getdoc(cls).split('\n')[0]]
    for name, kind, note in rows:
        lines.append(f'{name:{first}}  {kind:{second}}  {note}')
    return '\n'.join(lines)
