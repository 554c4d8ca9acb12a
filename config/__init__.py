"""Settings are the fields of a dataclass, one commented line each. Config files (Python, executed) and
--name=value (or --name value) override them in the order given, later wins. --help lists them.

    settings, model_settings = config.load(Settings, model.Config)     # a dict of what was given, per class
"""
import ast, contextlib, dataclasses, difflib, inspect, re, sys, types, typing
from pathlib import Path


@contextlib.contextmanager
def user_errors():
    """A user's mistake (ValueError, OSError) ends in one line on stderr and exit status 2. A bug keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        print(f'{Path(sys.argv[0]).name}: {" ".join(str(e).split())}', file=sys.stderr)
        sys.exit(2)


def load(*classes, argv=None, positional=None, usage=''):
    """Read argv (config files, --name=value) -> a dict {name: value} of what was given for each dataclass.
    positional names the field that a bare argument which is no config file goes to. Raises ValueError, OSError."""
    argv = list(sys.argv[1:] if argv is None else argv)
    hints = {name: hint for c in classes for name, hint in typing.get_type_hints(c).items()}
    if '--help' in argv or '-h' in argv:
        print(usage.strip(), *map(describe, classes), sep='\n\n')
        sys.exit(0)
    given = {}
    while argv:
        arg = argv.pop(0)
        if not arg.startswith('--'):
            if arg.endswith('.py'):
                for name, value in read_file(arg).items():
                    given[name] = typed(name, value, hints, f'in {arg}')
            elif positional and positional not in given:
                given[positional] = arg
            else:
                raise ValueError(f"unexpected argument '{arg}': a config file ends in .py, a setting is --name=value")
            continue
        name, eq, text = arg[2:].partition('=')
        if not eq and hints.get(name) is bool and (not argv or argv[0].lower() not in ('true', 'false')):
            text = 'true'                                           # a bare --flag
        elif not eq and name in hints:
            if not argv:
                raise ValueError(f'--{name} needs a value')
            text = argv.pop(0)
        given[name] = typed(name, text, hints, 'on the command line', literal(text))
    return [{f.name: given[f.name] for f in dataclasses.fields(c) if f.name in given} for c in classes]


def read_file(path):
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, [str(p) for p in Path('config').glob('[!_]*.py')], 1)
        raise ValueError(f"no config file '{path}'" + (f", did you mean '{near[0]}'?" if near else ''))
    scope = {'__file__': path, '__name__': 'config file'}
    try:
        exec(compile(Path(path).read_text(encoding='utf-8'), path, 'exec'), scope)
    except SyntaxError as e:
        raise ValueError(f'{path}, line {e.lineno}: {e.msg}') from e
    return {k: v for k, v in scope.items() if not k.startswith('_') and not isinstance(v, types.ModuleType)}


def literal(text):
    """'1e4' -> 10000.0, 'true' -> True, 'none' -> None; other text, also quoted, stays as it is."""
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        value = ast.literal_eval({'true': 'True', 'false': 'False', 'none': 'None'}.get(text.lower(), text))
        return text if isinstance(value, str) else value
    return text


def typed(name, value, hints, where, *first):
    """The value as its field's type: 1e4 is a count where an int is wanted, 1 a float."""
    if name not in hints:
        near = difflib.get_close_matches(name, hints, 1)
        raise ValueError(f"unknown setting '{name}' {where}" + (f", did you mean '{near[0]}'?" if near else ' (--help lists them)'))
    union = typing.get_origin(hints[name]) in (typing.Union, types.UnionType)
    for v in (*first, value):
        for hint in typing.get_args(hints[name]) if union else (hints[name],):
            if typing.get_origin(hint) is typing.Literal:
                if any(v == choice and type(v) is type(choice) for choice in typing.get_args(hint)):
                    return v
            elif hint in (int, float) and type(v) in (int, float) and (hint is float or v == v // 1 and abs(v) < 2**63):
                return hint(v)
            elif type(v) is hint and hint is not float:
                return v
    raise ValueError(f'{name}={value!r} {where}: wanted {wanted(hints[name])}')


def wanted(hint):
    if typing.get_origin(hint) is typing.Literal:
        return '|'.join(str(a).lower() if not isinstance(a, str) else a for a in typing.get_args(hint))
    return ' or '.join(map(wanted, typing.get_args(hint))) if typing.get_args(hint) else hint.__name__.replace('NoneType', 'none')


def describe(cls):
    """A line per field: name, default, type and the comment behind it in the source."""
    notes = dict(re.findall(r'^    (\w+):[^#\n]*#\s*(.*)$', inspect.getsource(cls), re.M))
    hints = typing.get_type_hints(cls)
    rows = [(f'  --{f.name}={f.default}', wanted(hints[f.name]), notes.get(f.name, '')) for f in dataclasses.fields(cls)]
    width = [max(len(r[i]) for r in rows) for i in (0, 1)]
    return '\n'.join([inspect.getdoc(cls).split('\n')[0], *(f'{a:{width[0]}}  {b:{width[1]}}  {c}' for a, b, c in rows)])
