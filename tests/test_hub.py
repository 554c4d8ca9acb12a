"""Tests of prepare.py with datasets as the Hugging Face Hub has them: folders of parquet files,
and a server on this machine that answers what the Hub's clients ask. NANOSEEK_SLOW=1 also waits
as long as they do before they give up."""

import hashlib, io, json, os, random, re, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest

import prepare
from nanoseek import sources

datasets, pa, pq = map(pytest.importorskip, ('datasets', 'pyarrow', 'pyarrow.parquet'))

FIRST, SECOND = 'a' * 40, 'b' * 40  # commits
EOT = prepare.EOT
HERE = sources.HERE


class Hub(ThreadingHTTPServer):
    """As much of the Hub as is asked of it here. repos: {id: {path: bytes}}; trouble(request,
    path), where it returns true, has answered in its own way"""

    daemon_threads = True

    def __init__(self, repos, port=0):
        super().__init__(('127.0.0.1', port), Request)
        self.repos, self.log, self.trouble, self.delay, self.sha, self.dead = (
            repos,
            [],
            None,
            0,
            FIRST,
            False,
        )
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def die(self):
        self.dead = True
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # clients are killed here

    def fetched(self, ending='.parquet'):
        """Bytes of files, and which"""
        found = [(path, sent) for path, sent in self.log if path.endswith(ending) and sent]
        return sum(sent for _, sent in found), {
            path.partition('/resolve/')[2].partition('/')[2] for path, _ in found
        }


class Request(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    PATH = re.compile(
        r'(?:/api)?(?:/datasets|/models)?/([\w.-]+/[\w.-]+)(?:/(revision|tree|resolve)/(\w+)/?(.*))?'
    )

    def log_message(self, *args):
        pass

    def answer(self, data, status=200, **headers):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {'Content-Length': len(data), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(data if self.command == 'GET' else b'')
        self.server.log.append((self.path, len(data) if self.command == 'GET' else 0))

    def do_GET(self):
        url, server = urlsplit(self.path), self.server
        path = unquote(url.path)
        time.sleep(server.delay)
        if server.dead or server.trouble and server.trouble(self, path):
            self.close_connection = self.close_connection or server.dead
            return
        id, what, revision, inner = self.PATH.fullmatch(path).groups()
        files = server.repos.get(id)
        if files is None:
            return self.answer({'error': 'Repository not found'}, 404, X_Error_Code='RepoNotFound')
        files = files.get(
            server.sha if revision in (None, 'main') else revision, files
        )  # {commit: files}, or files
        if what in (None, 'revision'):
            sha = revision if len(revision or '') == 40 else server.sha
            return self.answer(
                {'id': id, 'sha': sha, 'siblings': [{'rfilename': name} for name in files]}
            )
        if what == 'tree' and (
            entries := list(tree(files, inner, parse_qs(url.query)['recursive'] == ['true']))
        ):
            return self.answer(entries)
        if what == 'tree' or inner not in files:
            return self.answer({'error': 'Entry not found'}, 404, X_Error_Code='EntryNotFound')
        data, a, b = (
            files[inner],
            *(self.headers.get('Range') or 'bytes=0-').removeprefix('bytes=').split('-'),
        )
        about = {
            'ETag': f'"{hashlib.sha1(data).hexdigest()}"',
            'X_Repo_Commit': revision,
            'Accept_Ranges': 'bytes',
        }
        if 'Range' not in self.headers:
            return self.answer(data, **about)
        part = data[int(a) : int(b) + 1 if b else None]
        self.answer(
            part, 206, Content_Range=f'bytes {a}-{int(a) + len(part) - 1}/{len(data)}', **about
        )

    do_HEAD = do_POST = do_GET


def tree(files, folder, recursive):
    folders = {str(up) for name in files for up in Path(name).parents} - {'.'}
    for name in (*files, *folders):
        up = '' if (up := str(Path(name).parent)) == '.' else up
        if up == folder or recursive and (up + '/').startswith(folder + '/' if folder else ''):
            about = (
                {'type': 'directory'}
                if name in folders
                else {'type': 'file', 'size': len(files[name])}
            )
            yield {'path': name, 'oid': hashlib.sha1(name.encode()).hexdigest(), 'size': 0, **about}


def texts(count, seed=0, words=40):
    rng = random.Random(seed)
    some = [
        'the',
        'sea',
        'caf\u00e9',
        '\u65e5\u672c',
        'x = 1;',
        '\n',
        '  ',
        "don't",
        '\U0001f642',
        EOT,
        '\r\n',
        '',
    ]
    return [
        f'{seed}.{i} ' + ' '.join(rng.choices(some, k=rng.randrange(2 * words)))
        for i in range(count)
    ]


def parquet(columns, group=100):
    pq.write_table(pa.table(columns), file := io.BytesIO(), row_group_size=group)
    return file.getvalue()


def dataset(documents, files=3, folder='data', split='train', field='text', group=100, **more):
    """Files as the Hub has them; more: functions that make a value of another column"""
    n, found = -(-len(documents) // files), {}
    for i in range(files):
        part = documents[i * n : (i + 1) * n]
        found[f'{folder}/{split}-{i:05d}-of-{files:05d}.parquet'] = parquet(
            {**{name: [make() for _ in part] for name, make in more.items()}, field: part}, group
        )
    return found


def card(*configs, info=''):
    """README.md of configs (name, split, files)"""
    configs = ''.join(
        f'- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {path}\n'
        for name, split, path in configs
    )
    return {'README.md': f'---\nlicense: mit\n{info}configs:\n{configs}---\n# A dataset\n'.encode()}


CARD = card(('default', 'train', 'data/train-*'))


@pytest.fixture(scope='session')
def tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    made.train_from_iterator(
        texts(200, 99),
        trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    made.add_special_tokens([AddedToken(EOT, special=True)])
    made.encode_special_tokens = True
    return made


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'hf'))


@pytest.fixture
def hub(tokenizer):
    server = Hub(
        {
            'org/tok': {
                'tokenizer.json': tokenizer.to_str().encode(),
                'model.safetensors': b'not asked for',
            }
        }
    )
    yield server
    if not server.dead:
        server.die()


def start(folder, hub, *args, code=None, **env):
    """python prepare.py, or code that has prepare and Settings"""
    environ = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith('HF_') and not k.lower().endswith('_proxy')
    }
    environ |= {
        'HF_HOME': str(folder / 'hf'),
        'HF_HUB_DISABLE_TELEMETRY': '1',
        'PYTHONPATH': str(HERE),
        'HF_ENDPOINT': f'http://127.0.0.1:{hub.server_port}' if hub else 'http://127.0.0.1:9',
        **env,
    }
    command = [HERE / 'prepare.py'] if code is None else ['-c', code]
    return subprocess.Popen(
        [sys.executable, *command, *args],
        cwd=folder,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(*args, timeout=300, **more):
    """-> exit status, stdout, stderr"""
    process = start(*args, **more)
    try:
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err
    finally:
        process.kill()
        process.wait()


# prepare.py that notes often how far it is, and where it says that it waits, waits a hundredth of
# the time
HASTE = """
import time; sleep, waited = time.sleep, []
time.sleep = lambda seconds: (waited.append(seconds), sleep(seconds / 100))
import config, prepare
prepare.SAVE_SECONDS, prepare.BATCH = 0, 3000
if __name__ == '__main__':
    try:
        with config.user_errors():
            prepare.prepare(prepare.Settings(**config.load(prepare.Settings, positional='source')[0]))
    except KeyboardInterrupt:
        raise SystemExit(130)
    finally:
        print('waited', sum(waited))
"""
GOES_ON = 'the same command goes on from what is in data/data/.partial'
ARGS = ('--tokenizer=org/tok', '--workers=1', '--val_frac=0.1')


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()
    }


def expected(documents, tokenizer, val=0.1):
    """Splits by the documents' hashes, each document with its end"""
    found = {'train': [], 'val': [], 'test': []}
    for text in documents:
        at = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') / 2**64
        split = 'val' if at < val else 'test' if at < 2 * val else 'train'
        found[split] += tokenizer.encode(text, add_special_tokens=False).ids + [
            tokenizer.token_to_id(EOT)
        ]
    return found


def check(folder, documents, tokenizer):
    for split, ids in expected(documents, tokenizer).items():
        assert np.fromfile(folder / f'{split}.bin', '<u2').tolist() == ids


def well(folder, hub, *args, **more):
    """Prepare without a word on stderr -> stdout"""
    status, out, err = run(folder, hub, *ARGS, *args, **more)
    assert (status, err) == (0, '')
    return out


def badly(folder, hub, *args, **more):
    """Fail with one line on stderr -> it"""
    status, out, err = run(folder, hub, *ARGS, *args, **more)
    assert status == 2 and err.endswith('\n') and 'Traceback' not in err, err
    assert err.count('\n') == 1, err
    return err.strip()


# ------------------------------------------------------------------------------------------------
# A folder on this machine


INFO = """dataset_info:
- config_name: default
  features:
  - name: id
    dtype: int64
  - name: text
    dtype: string
  splits:
  - name: train
    num_examples: 250
"""


@pytest.mark.parametrize('info', ['', INFO])
def test_a_folder_of_the_hubs_form_arrives_exactly(tmp_path, tokenizer, info):
    documents = texts(250)
    repo = {
        **card(('default', 'train', 'data/train-*'), info=info),
        **dataset(documents, id=lambda: 7),
    }
    write(tmp_path / 'mine', repo)
    tokenizer.save(str(tmp_path / 'tok.json'))
    well(tmp_path, None, 'mine', '--split=train', '--tokenizer=tok.json')
    check(tmp_path / 'data/mine', documents, tokenizer)


def test_a_folder_goes_on_after_every_document(tmp_path):
    documents = texts(45)
    write(tmp_path, {**CARD, **dataset(documents, files=3, group=4, id=lambda: 7)})
    source = lambda: sources.Hub('mine', str(tmp_path), '', 'train', 'text', 'mit', None)
    first, found = source(), []
    for k, document in enumerate(first.read(None)):
        found.append(document.text)
        other = source()
        rest = [d.text for d in other.read(json.loads(json.dumps(first.position())))]
        assert rest == documents[k + 1 :] and other.done == len(documents)
    assert found == documents


@pytest.mark.slow
def test_a_folder_that_has_changed_is_read_again(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / 'tok.json'))
    for seed in range(2):
        write(tmp_path / 'mine', {**CARD, **dataset(texts(100, seed))})
        well(tmp_path, None, 'mine', '--split=train', '--tokenizer=tok.json')
        check(tmp_path / 'data/mine', texts(100, seed), tokenizer)


@pytest.mark.parametrize(
    'subset, split, field, line',
    [
        ('fr', 'train', 'text', "'{}': .*fr.*default"),
        ('', 'test', 'text', "'{}': .*test.*train"),
        ('', 'train', 'story', "'{}': no field 'story' .* but id, text$"),
    ],
)
@pytest.mark.parametrize('info', ['', INFO])
def test_a_folder_says_what_it_has(tmp_path, subset, split, field, line, info):
    write(
        tmp_path,
        {
            **card(('default', 'train', 'data/train-*'), info=info),
            **dataset(texts(9), id=lambda: 7),
        },
    )
    with pytest.raises(ValueError, match=line.format(tmp_path)):
        sources.Hub('mine', str(tmp_path), subset, split, field, 'mit', None)


def test_prepare_is_there_without_the_hubs_libraries():
    code = 'import prepare, sys; print(*{"datasets", "huggingface_hub", "pyarrow", "tokenizers"} & set(sys.modules))'
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, cwd=HERE
        ).stdout
        == '\n'
    )


# ------------------------------------------------------------------------------------------------
# A server: what is asked of it


@pytest.mark.slow
def test_all_documents_arrive_in_order_and_stay_nowhere_else(tmp_path, hub, tokenizer):
    documents = texts(600)
    hub.repos['org/data'] = {**CARD, **dataset(documents)}
    well(tmp_path, hub, 'org/data')
    check(tmp_path / 'data/data', documents, tokenizer)
    assert not any('safetensors' in path for path, _ in hub.log)
    for name, data in files(tmp_path).items():
        assert name.startswith('data/') or b'PAR1' not in data and documents[0].encode() not in data
    assert 'is complete' in well(tmp_path, hub, 'org/data')


def test_lines_of_json_arrive_too(tmp_path, hub, tokenizer):
    documents = texts(200)
    lines = [json.dumps({'id': i, 'text': text}) + '\n' for i, text in enumerate(documents)]
    hub.repos['org/data'] = {
        f'train-{i}.jsonl': ''.join(lines[i * 120 : i * 120 + 120]).encode() for i in range(2)
    }
    well(tmp_path, hub, 'org/data')
    check(tmp_path / 'data/data', documents, tokenizer)


@pytest.mark.slow
def test_the_texts_column_is_fetched_and_little_else(tmp_path, hub, tokenizer):
    documents, blobs = texts(60), [os.urandom(400_000) for _ in range(30)]
    hub.repos['org/data'] = {
        **CARD,
        **{
            f'data/train-{i}.parquet': parquet(
                {'before': blobs, 'text': documents[i * 30 : i * 30 + 30], 'behind': blobs}
            )
            for i in range(2)
        },
    }
    well(tmp_path, hub, 'org/data')
    check(tmp_path / 'data/data', documents, tokenizer)
    # Of 2 x 24 MB: behind what is wanted, fsspec reads 5 MiB ahead.
    assert (
        hub.fetched()[0]
        < 2 * (5 * 2**20 + 300_000)
        < sum(map(len, hub.repos['org/data'].values())) / 4
    )


def test_as_many_tokens_as_wanted_are_fetched_and_no_more(tmp_path, hub, tokenizer):
    documents = texts(600)
    hub.repos['org/data'] = {**CARD, **dataset(documents, files=12)}
    well(tmp_path, hub, 'org/data', '--tokens=6e3', code=HASTE)
    ends = np.cumsum([len(tokenizer.encode(text).ids) + 1 for text in documents])
    count = int(np.searchsorted(ends, 6000)) + 1
    check(tmp_path / 'data/data', documents[:count], tokenizer)
    assert 60 < count < 300 and len(hub.fetched()[1]) <= count // 50 + 2


LAYOUTS = {  # of the repository of a known name: subset, its files, other subsets
    'cosmopedia': (
        'cosmopedia-v2',
        'cosmopedia-v2/train-{}-of-00104.parquet',
        'fineweb-edu-dedup',
        'python-edu',
    ),
    'cosmopedia-100k': ('default', 'data/train-{}-of-00002.parquet'),
    'fineweb-edu': (
        'fineweb-edu-dedup',
        'fineweb-edu-dedup/train-{}-of-00234.parquet',
        'cosmopedia-v2',
        'python-edu',
    ),
    'fineweb-edu-10bt': (
        'sample-10BT',
        'sample/10BT/{}_00000.parquet',
        'default',
        'CC-MAIN-2013-20',
    ),
    'python-edu': ('default', 'data/train-{}-of-00011.parquet'),
    'tinystories': ('default', 'data/train-{}-of-00004-2d5a1467fff1081b.parquet'),
    'openwebtext': ('plain_text', 'plain_text/train-{}-of-00080.parquet'),
}
ALL_KNOWN = """
import prepare
for name in prepare.HUB:
    prepare.prepare(prepare.Settings(name, val_frac=0.1, workers=1))
"""


@pytest.mark.slow
def test_known_names_ask_for_the_right_repository_subset_and_split(tmp_path, hub, tokenizer):
    assert list(LAYOUTS) == list(prepare.HUB)
    hub.repos[prepare.SMOLLM2] = hub.repos.pop('org/tok')
    documents, configs = {}, {}
    for seed, (name, (subset, path, *others)) in enumerate(LAYOUTS.items()):
        documents[name], id = texts(80, seed), prepare.HUB[name][0]
        configs[id] = {
            **dict.fromkeys(others, 'other/*'),
            **configs.get(id, {}),
            subset: path.replace('{}', '*'),
        }
        hub.repos.setdefault(id, {'other/000.parquet': parquet({'text': ['wrong'] * 9})})
        for i in range(2):
            part = documents[name][i * 40 : i * 40 + 40]
            hub.repos[id][path.format(f'{i:05d}')] = parquet({'id': list(range(40)), 'text': part})
        hub.repos[id] |= card(
            *((other, 'train', path) for other, path in sorted(configs[id].items()))
        )
    status, out, err = run(tmp_path, hub, code=ALL_KNOWN)
    assert (status, err) == (0, '')
    for name in prepare.HUB:
        check(tmp_path / 'data' / name, documents[name], tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize('local', [True, False])
def test_subset_split_and_text_field_are_what_is_taken(tmp_path, hub, tokenizer, local):
    repo = (
        card(('de', 'train', 'de/train-*'), ('en', 'train', 'en/train-*')).pop('README.md').decode()
    )
    also = '  - split: validation\n    path: en/validation-*\n'
    repo = {'README.md': repo.replace('en/train-*\n', 'en/train-*\n' + also).encode()}
    for seed, (folder, split) in enumerate(
        (('de', 'train'), ('en', 'train'), ('en', 'validation'))
    ):
        repo |= dataset(texts(90, seed), 2, folder, split, 'story', text=lambda: 'wrong')
    write(tmp_path / 'mine', repo if local else {})
    hub.repos['org/data'] = repo
    source = 'mine' if local else 'org/data'
    for seed, args in ((1, ()), (2, ('--split=validation',))):
        well(
            tmp_path, hub, source, '--subset=en', '--text_field=story', f'--out_dir=o{seed}', *args
        )
        check(tmp_path / f'o{seed}', texts(90, seed), tokenizer)


# ------------------------------------------------------------------------------------------------
# A server: what it does not have


REFUSED = {  # what there is instead of a dataset; arguments; what the line says
    'no dataset': ((), "'org/none'.*(not found|404)", 'org/none'),
    'login': ((), '(?i)org/data.*(401|restricted|gated|authenticated)', 'org/data'),
    'gated': ((), '(?i)org/data.*(403|restricted|gated|forbidden)', 'org/data'),
    'no subset': (('--subset=fr',), 'fr.*default', 'org/data'),
    'no split': (('--split=test',), 'test.*train', 'org/data'),
    'no field': (
        ('--text_field=story',),
        r"no field 'story' \(--text_field=NAME.*\), but id, text",
        'org/data',
    ),
    'a script': ((), 'org/script', 'org/script'),
    'no file': ((), 'org/empty', 'org/empty'),
    'no tokenizer': (('--tokenizer=org/none',), "'org/none'.*(not found|404)", 'org/data'),
    'no such tokenizer': (('--tokenizer=org/script',), 'tokenizer.json', 'org/data'),
}


@pytest.mark.slow
@pytest.mark.parametrize('what', REFUSED)
def test_what_is_not_there_is_one_line_and_leaves_nothing(tmp_path, hub, what):
    args, line, source = REFUSED[what]
    hub.repos |= {
        'org/data': {**CARD, **dataset(texts(60), id=lambda: 7)},
        'org/empty': {'README.md': b'# Nothing'},
        'org/script': {'script.py': b'import datasets', 'README.md': b'# A script'},
    }
    status, about = {'login': (401, {}), 'gated': (403, {'X_Error_Code': 'GatedRepo'})}.get(
        what, (0, {})
    )
    refusal = {'error': 'Access is restricted'}
    hub.trouble = lambda request, path: (
        status and (request.answer(refusal, status, **about) or True)
    )
    said = badly(tmp_path, hub, source, *args)
    assert re.search(line, said), said
    assert {p.name for p in tmp_path.iterdir()} <= {'hf'}


# ------------------------------------------------------------------------------------------------
# A server: it fails, we are killed


def silent(request, path):
    time.sleep(5)
    request.close_connection = True
    return True


def short(request, path):
    request.send_response(206)
    request.send_header('Content-Length', '100000')
    request.end_headers()
    request.wfile.write(b'PAR1')
    request.close_connection = True
    return True


FAILURES = {
    '500': lambda request, path: request.answer(b'', 500) or True,
    '429': lambda request, path: request.answer(b'', 429, Retry_After=3) or True,
    'garbage': lambda request, path: request.answer(b'x' * 100000) or True,
    'dead': lambda request, path: request.server.die() or True,
    'silent': silent,
    'short': short,
}
WHERE = {'api': '/api/', 'first': '-00000-of', 'last': '-00002-of'}
QUICK = [
    ('500', 'api'),
    ('silent', 'api'),
    ('dead', 'api'),
    ('garbage', 'first'),
    ('short', 'first'),
    ('429', 'last'),
    ('garbage', 'last'),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    'how, when',
    [
        (how, when)
        if (how, when) in QUICK
        else pytest.param(
            how,
            when,
            marks=pytest.mark.skipif(
                not os.environ.get('NANOSEEK_SLOW'), reason='NANOSEEK_SLOW is not set'
            ),
        )
        for how in FAILURES
        for when in WHERE
    ],
)
def test_a_server_that_fails_is_one_line_soon(tmp_path, hub, how, when):
    hub.repos['org/data'] = {**CARD, **dataset(texts(600))}
    hub.trouble = lambda request, path: WHERE[when] in path and FAILURES[how](request, path)
    status, out, err = run(
        tmp_path, hub, 'org/data', *ARGS, code=HASTE, HF_HUB_DOWNLOAD_TIMEOUT='1'
    )
    (line,) = err.splitlines()
    assert status == 2 and line.endswith(GOES_ON) == (when == 'last'), err
    assert (
        'after document 400' if when == 'last' else 'the Hugging Face Hub did not give it'
    ) in line
    assert float(re.search('waited (.*)', out)[1]) <= (160 if how == '429' else 60)
    says = {
        '500': '500',
        '429': '429',
        'garbage': 'Parquet|Expecting value',
        'dead': 'refused|disconnected',
        'silent': 'timed out',
        'short': 'closed',
    }
    assert re.search(says[how], line), line
    assert (tmp_path / 'data').exists() == (when == 'last')


@pytest.mark.skipif(not os.environ.get('NANOSEEK_SLOW'), reason='NANOSEEK_SLOW is not set')
def test_a_dead_server_is_given_up_after_a_minute(tmp_path, hub):
    hub.repos['org/data'] = {**CARD, **dataset(texts(600))}
    hub.trouble = lambda request, path: '-00002-of' in path and (hub.die() or True)
    began = time.time()
    status, out, err = run(tmp_path, hub, 'org/data', *ARGS)
    assert (
        status == 2
        and 'no more came after document 400' in err.splitlines()[-1]
        and time.time() - began < 75
    )


def undisturbed(folder, repos, *args):
    """The files that come of it without trouble"""
    folder.mkdir()
    other = Hub(repos)
    well(folder, other, *args)
    other.die()
    return files(folder / 'data/data')


@pytest.mark.slow
def test_a_server_that_comes_back_is_asked_for_the_rest_and_all_is_byte_identical(
    tmp_path, hub, tokenizer
):
    documents = texts(600, words=700)
    hub.repos['org/data'] = {**CARD, **dataset(documents, files=6, group=20)}
    hub.trouble = lambda request, path: '-00004-of' in path and (hub.die() or True)
    status, out, err = run(tmp_path, hub, 'org/data', *ARGS, code=HASTE)
    assert status == 2 and 'no more came after document 400' in err
    back = Hub(hub.repos, hub.server_port)
    assert 'going on behind token' in well(tmp_path, back, 'org/data')
    back.die()
    check(tmp_path / 'data/data', documents, tokenizer)
    # The columns' names are in the first file; the file is begun again in which it stopped.
    assert back.fetched()[1] <= {f'data/train-{i:05d}-of-00006.parquet' for i in (0, 3, 4, 5)}
    assert files(tmp_path / 'data/data') == undisturbed(tmp_path / 'other', hub.repos, 'org/data')


@pytest.mark.slow
def test_an_interrupted_preparation_goes_on_with_the_revision_that_it_began_with(
    tmp_path, hub, tokenizer
):
    documents = texts(600)
    hub.repos['org/data'] = {
        FIRST: {**CARD, **dataset(documents)},
        SECOND: {**CARD, **dataset(texts(600, 1))},
    }
    hub.trouble = lambda request, path: '-00002-of' in path and FAILURES['500'](request, path)
    run(tmp_path, hub, 'org/data', *ARGS, code=HASTE)
    hub.trouble, hub.sha, hub.log = None, SECOND, []
    assert 'going on behind token' in well(tmp_path, hub, 'org/data')
    check(tmp_path / 'data/data', documents, tokenizer)
    assert json.loads((tmp_path / 'data/data/meta.json').read_text())['source']['revision'] == FIRST
    well(tmp_path, hub, 'org/data', '--resume=never')
    check(tmp_path / 'data/data', texts(600, 1), tokenizer)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_byte_identical(tmp_path, hub, tokenizer):
    documents = texts(600)
    hub.repos['org/data'], hub.delay = (
        {**CARD, **dataset(documents + documents[:50], files=13)},
        0.04,
    )
    args = ('org/data', *ARGS, '--workers=2', '--shard_tokens=5000', '--deduplicate=true')
    for file in (3, 3, 7, 10):
        hub.log, process = [], start(tmp_path, hub, *args, code=HASTE)
        while (
            f'data/train-{file:05d}-of-00013.parquet' not in hub.fetched()[1]
            and process.poll() is None
        ):
            time.sleep(0.01)
        time.sleep(random.Random(file).random() / 5)
        process.send_signal(signal.SIGINT if file == 7 else signal.SIGKILL)
        said = process.communicate()[1]  # of a killed one, a worker that begins may say much
        assert file != 7 or (process.returncode, said) == (130, GOES_ON + '\n')
    assert not (tmp_path / 'data/data/meta.json').exists()
    assert 'going on behind token' in well(tmp_path, hub, *args)
    train = prepare.TokenData(tmp_path / 'data/data').splits['train']
    assert train[: len(train)].tolist() == expected(documents, tokenizer)['train']
    assert files(tmp_path / 'data/data') == undisturbed(tmp_path / 'other', hub.repos, *args)
