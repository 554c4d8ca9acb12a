"""Settings are the fields of a dataclass, one commented line each. Config files (Python, executed) and --name=value (or
--name value) override them in the order given, later wins. --help lists them.

    settings, model_settings = config.load(Settings, model.Config)     # a dict of what was given, per class
"""
import ast, contextlib, dataclasses, difflib, inspect, re, sys, types, typing
from pathlib import Path

@contextlib.contextmanager
def user_errors():
    """A user's mistake (ValueError, OSError) ends in one line on stderr and exit status 2, a bug in its traceback"""
    try:
        yield
    except (ValueError, OSError) as e:
        print(f'{Path(sys.argv[0]).name}: {" ".join(str(e).split())}', file=sys.stderr)
        sys.exit(2)

def load(*classes, argv=None, positional='', usage=''):
    """Read argv (config files, --name=value) -> a dict {name: value} of what was given for each dataclass.
    positional: names of the fields that bare arguments which are no config files go to. Raises ValueError, OSError."""
    argv, given = list(sys.argv[1:] if argv is None else argv), {}
    hints = {name: hint for c in classes for name, hint in typing.get_type_hints(c).items()}
    if '--help' in argv or '-h' in argv:
        print(usage.strip(), *map(describe, classes), sep='\n\n')
        sys.exit(0)
    while argv:
        arg = argv.pop(0)
        if arg.startswith('--'):
            name, eq, text = arg[2:].partition('=')
            if not eq and hints.get(name) is bool and (not argv or argv[0].lower() not in ('true', 'false')):
                text = 'true'                                       # a bare --flag
            elif not eq and name in hints and not argv:
                raise ValueError(f'--{name} needs a value')
            elif not eq and name in hints:
                text = argv.pop(0)
            given[name] = typed(name, text, hints, 'on the command line', literal(text))
        elif arg.endswith('.py'):
            given |= {name: typed(name, value, hints, f'in {arg}') for name, value in read_file(arg).items()}
        elif free := [name for name in positional.split() if name not in given]:
            given[free[0]] = arg
        else:
            raise ValueError(f"unexpected argument '{arg}': a config file ends in .py, a setting is --name=value")
    return [{f.name: given[f.name] for f in dataclasses.fields(c) if f.name in given} for c in classes]

def near(name, names, otherwise=''):
    return f", did you mean '{found[0]}'?" if (found := difflib.get_close_matches(name, names, 1)) else otherwise

def read_file(path):
    if not Path(path).is_file():
        raise ValueError(f"no config file '{path}'" + near(path, [str(p) for p in Path('config').glob('[!_]*.py')]))
    try:
        exec(compile(Path(path).read_text(encoding='utf-8'), path, 'exec'), scope := {'__file__': path})
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
        raise ValueError(f"unknown setting '{name}' {where}" + near(name, hints, ' (--help lists them)'))
    hint = hints[name]
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for v in (*first, value):
        for kind in kinds:
            if type(v) is kind or any(v == a and type(v) is type(a) for a in typing.get_args(kind)):    # a Literal's
                return v
            if kind in (int, float) and type(v) in (int, float) and (kind is float or v == v // 1 and abs(v) < 2**63):
                return kind(v)
    raise ValueError(f'{name}={value!r} {where}: wanted {wanted(hint)}')

def wanted(hint):
    names = [wanted(a) if isinstance(a, type) else str(a).lower() for a in typing.get_args(hint)]
    between = '|' if typing.get_origin(hint) is typing.Literal else ' or '
    return between.join(names) or hint.__name__.replace('NoneType', 'none')

def describe(cls):
    """A line per field: name, default, type and the comment behind it in the source."""
    notes = dict(re.findall(r'^    (\w+):[^#\n]*#\s*(.*)$', ''.join(map(inspect.getsource, cls.__mro__[:-1])), re.M))
    rows = [(f'  --{f.name}={f.default!r}', wanted(hint), notes.get(f.name, ''))
            for f, hint in zip(dataclasses.fields(cls), typing.get_type_hints(cls).values())]
    w = [max(len(r[i]) for r in rows) for i in (0, 1)]
    return '\n'.join([inspect.getdoc(cls).split('\n')[0], *(f'{a:{w[0]}}  {b:{w[1]}}  {c}' for a, b, c in rows)])
