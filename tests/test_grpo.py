"""Tests of grpo.py and the tasks. The reference is the formulas, token by token, in float64."""
import json
import math
import sys

import pytest
import torch

import grpo
from conftest import ROOT, metrics, run
from model import Config, Transformer
from nanoseek import chat, generate, hf, settings
from nanoseek.tokenizer import decode, train_bpe
from train import OneDevice

sys.path.insert(0, str(ROOT / 'tasks'))
import arithmetic  # noqa: E402
import brief  # noqa: E402

LETTERS = """
def problems(rng):
    while True:
        yield 'abcdefgh'[:rng.randint(1, 5)]

def is_held_out(problem):
    return len(problem) == 3

def prompt(problem):
    return problem

def reward(problem, text):
    return REWARD
"""


@pytest.fixture(params=[4])
def folder(tmp_path, request):
    """A model with random weights, MLA and experts, and a tokenizer of bytes with ChatML"""
    tokenizer = train_bpe(257, ['text'])
    place = tmp_path / 'model'
    place.mkdir()
    chat.write_companions(place, 'bpe:257', tokenizer)
    torch.manual_seed(1)
    model = Transformer(Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=16, n_routed_experts=request.param, n_shared_experts=1,
        max_position_embeddings=128, initializer_range=0.3, dropout=0.1,
        eos_token_id=tokenizer.token_to_id('<|endoftext|>')))
    model.save_pretrained(place)
    hf.write_companions(place, tokenizer, model.config, hf.read_companions(place))
    (tmp_path / 'task.py').write_text(LETTERS.replace('REWARD', 'float(len(text) % 2)'))
    return place


def options(folder, *more):
    given, = settings.load(grpo.Settings, argv=[
        f'--init_from={folder}', f'--task={folder.parent / "task.py"}', '--device=cpu',
        f'--out_dir={folder.parent / "out"}', '--batch_size=6', '--group_size=3',
        '--max_new_tokens=8', '--temperature=0.8', *more])
    return grpo.Settings(**given)


def answered(folder, *more):
    """A model and its answers to problems of five lengths, three to each, most of which end"""
    s = options(folder, *more)
    model = Transformer.from_pretrained(folder, dropout=0.0).eval()
    task = grpo.Task(s.task, folder, model)
    task.stops = list(range(60, 120))       # likely enough
    torch.manual_seed(4)
    problems = ['a', 'abcde', 'ab', 'abcd', 'ab', 'abc']
    return s, model, task, grpo.answer(model, task, problems, 3, s, s.temperature)


@pytest.fixture
def sampled(monkeypatch):
    """Return a list that gets the log-probabilities of the tokens (B,) that sampling chooses."""
    steps = []
    sample = generate.sample

    def watched(logits, sampling):
        token = sample(logits, sampling)
        steps.append((logits / sampling.temperature).log_softmax(-1).gather(1, token)[:, 0])
        return token

    monkeypatch.setattr(generate, 'sample', watched)
    return steps


def test_sampling_and_training_have_the_same_probabilities(folder, sampled):
    s, model, task, batches = answered(folder)
    steps = iter(sampled)
    theirs = pytest.importorskip('transformers').AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation='eager')
    assert [len(answers.ids) for answers in batches] == [3, 3, 6, 3, 3]
    for answers in batches:
        chosen, entropy = grpo.log_probabilities(model, answers, s.temperature)
        with torch.no_grad():
            distribution = (theirs(answers.ids).logits[:, :-1] / 0.8).log_softmax(-1)
        here = answers.mask[:, 1:]
        expected = distribution.gather(2, answers.ids[:, 1:, None])[..., 0][here]
        first = answers.mask.any(0).nonzero().min()
        when_chosen = torch.stack([next(steps) for _ in range(first, answers.ids.shape[1])], 1)
        for ours in (when_chosen[answers.mask[:, first:]], chosen):
            assert ((ours - expected).exp() - 1).abs().max() < 1e-5
        assert chosen.min() < -1                            # the model is not certain of anything
        entropies = -(distribution.exp() * distribution).sum(-1)[here]
        assert torch.allclose(entropy.double(), entropies, atol=1e-4)


def test_answers_end_with_their_first_stop_and_without_one_they_earn_nothing(folder):
    s, _, task, batches = answered(folder)
    ended = []
    for problem, answers in zip(['a', 'abcde', 'ab', 'abcd', 'abc'], batches):
        prompt = task.prompt(problem)
        for ids, mask, reward in zip(answers.ids.tolist(), answers.mask.tolist(), answers.rewards):
            first = len(prompt)
            assert ids[:first] == prompt
            ends = [place for place in range(first, len(ids)) if ids[place] in task.stops]
            end = ends[0] + 1 if ends else first + s.max_new_tokens
            assert mask == [first <= place < end for place in range(len(mask))]
            said = decode(task.tokenizer, ids[first:end - 1])
            assert reward == (float(len(said) % 2) if ends else 0.0)
            ended.append(bool(ends))
    assert 0 < sum(ended) < len(ended)


REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.5, 0.0, 0.0]])


@pytest.mark.parametrize('more, expected, kept', [
    ({}, [[0.5, -0.5, -0.5, 0.5], [0] * 4, [-0.125, 0.375, -0.125, -0.125]], [True, False, True]),
    ({'drop_equal': False}, [[0.5, -0.5, -0.5, 0.5], [0] * 4, [-0.125, 0.375, -0.125, -0.125]],
     [True] * 3),
    ({'divide_by_std': True}, [[0.866, -0.866, -0.866, 0.866], [0] * 4, [-0.5, 1.5, -0.5, -0.5]],
     [True, False, True]),
    ({'baseline': False}, REWARDS.tolist(), [True, False, True])])
def test_advantages_by_hand(more, expected, kept):
    better, groups = grpo.advantages(REWARDS, grpo.Settings(**more))
    assert torch.allclose(better, torch.tensor(expected), atol=1e-3)
    assert groups.tolist() == kept


@pytest.mark.parametrize('folder', [0], indirect=True)      # experts have no float64
@pytest.mark.parametrize('more', ['', '--loss_over=answers', '--clip=0.01', '--kl=0.3'])
def test_the_gradient_is_that_of_the_formula_token_by_token(folder, more):
    s, model, task, batches = answered(folder, *more.split())
    with torch.no_grad():                                   # as after a first update
        chosen = [grpo.log_probabilities(model, answers, s.temperature)[0] for answers in batches]
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    first = Transformer.from_pretrained(folder, dropout=0.0).eval()
    batches = [(answers, torch.randn(len(answers.ids))) for answers in batches]
    old = [log_p.clone() for log_p in chosen]
    grpo.learn(model, first, batches, old, s, OneDevice(s))
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    model.double()
    first.double()
    before_update = iter(torch.cat(chosen).tolist())
    terms = []                                              # of each answer, for its tokens
    outside = 0
    for answers, better in batches:
        log_p = model(answers.ids)[0].div(s.temperature).log_softmax(-1)
        with torch.no_grad():
            before = first(answers.ids)[0].div(s.temperature).log_softmax(-1)
        for i, mask in enumerate(answers.mask):
            terms.append([])
            for place in mask.nonzero()[:, 0].tolist():
                token = answers.ids[i, place]
                new = log_p[i, place - 1, token]
                ratio = math.e ** (new - next(before_update))
                low, high = 1 - s.clip, 1 + s.clip
                outside += not low < ratio < high
                gain = min(ratio * better[i], ratio.clamp(low, high) * better[i])
                difference = before[i, place - 1, token] - new
                terms[-1].append(s.kl * (math.e ** difference - difference - 1) - gain)
    if s.loss_over == 'tokens':
        loss = sum(map(sum, terms)) / sum(map(len, terms))
    else:
        loss = sum(sum(of_answer) / len(of_answer) for of_answer in terms) / len(terms)
    loss.backward()
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) > 10
    largest = max(grad.abs().max() for grad in theirs)
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 1e-4 * largest
    assert outside > 0 or s.clip == 0.2


def start(folder, *more):
    grpo.main(options(folder, '--eval_problems=4', '--eval_interval=2', '--checkpoint_interval=2',
                      '--learning_rate=1e-2', '--warmup_steps=1', *more))


def test_a_run_that_stopped_continues_bit_for_bit(folder, tmp_path, capsys):
    start(folder, '--max_steps=4')
    start(folder, '--max_steps=2', f'--out_dir={tmp_path / "b"}')
    start(folder, '--max_steps=4', f'--out_dir={tmp_path / "b"}')
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith('step ') and 'groups' in line]) == 8
    a, b = (Transformer.from_pretrained(tmp_path / out / 'step-000004').state_dict()
            for out in ('out', 'b'))
    start_of_all = Transformer.from_pretrained(folder).state_dict()
    for name in a:
        assert a[name].equal(b[name])
        assert ('bias' in name) == a[name].equal(start_of_all[name])    # routers' stand still
    rewards = [metrics(tmp_path / out, 'reward') for out in ('out', 'b')]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 4


def test_several_ranks_are_refused(folder, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='runs on one device, without torchrun'):
        start(folder)


def test_the_reward_rises(folder, tmp_path):
    (tmp_path / 'task.py').write_text(LETTERS.replace('REWARD', 'float(text[:1] < "P")'))
    s = options(folder, '--max_steps=25', '--learning_rate=1e-2', '--group_size=8')
    model = Transformer.from_pretrained(folder)
    model.config.eos_token_id = [*range(32, 127)][::2]      # half of the letters
    model.save_pretrained(folder)
    grpo.main(s)
    rewards = list(metrics(s.out_dir, 'reward').values())
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1


@pytest.mark.parametrize('more, words', [
    (['--group_size=1'], 'group_size=1: must be at least 2'),
    (['--task=tasks/none.py'], 'tasks/none.py'),
    (['--init_from=nowhere'], "'nowhere' is not a folder"),
    (['--max_new_tokens=500'], 'do not fit'),
    (['REWARD'], 'the reward of'), (['LETTERS'], 'is not in the vocabulary')])
def test_a_mistake_is_one_line(folder, tmp_path, capsys, more, words):
    if more == ['REWARD']:
        more = []
        (tmp_path / 'task.py').write_text(LETTERS.replace('REWARD', 'float("nan")'))
        values = hf.read_json(folder / 'generation_config.json')
        hf.write_json(folder / 'generation_config.json', {**values, 'eos_token_id': [*range(200)]})
    if more == ['LETTERS']:
        more = []
        from nanoseek.tokenizer import char_tokenizer
        tokenizer = char_tokenizer('xyz')
        tokenizer.add_special_tokens(['<|endoftext|>'])
        (folder / 'tokenizer.json').write_text(tokenizer.to_str())
        (folder / 'chat_template.jinja').unlink()
    with pytest.raises((ValueError, OSError), match=words):
        start(folder, *more)


PRODUCT = '300*6+40*6+7*6=1800+240+42=2082'


@pytest.mark.parametrize('text, expected', [
    (PRODUCT, 1), ('300*6+47*6=2082', 1), ('347*5+347=1735+347=2082', 1), ('0+2082=2082', 1),
    ('2082', 0), ('=2082', 0), ('2082=2082', 0), ('347*6=2082', 0), ('', 0),
    (PRODUCT + '=2082', 0), (PRODUCT + ' ', 0), (PRODUCT + '\n', 0), (PRODUCT + ' or 2083', 0),
    (PRODUCT.replace('240', '230'), 0), (PRODUCT.replace('2082', '2083'), 0),
    (PRODUCT[:-1], 0), ('300*6+47*6=1800+282=', 0), ('300*6++47*6=2082', 0),
    (PRODUCT.replace('2082', '02082'), 0), ('١+2081=2082', 0)])
def test_the_verifier_of_products_is_exact(text, expected):
    assert arithmetic.reward((347, 6), text) == expected


def test_two_fifths_of_the_teacher_s_workings_are_right_and_none_is_held_out(tmp_path):
    done = run(tmp_path, 'tasks/arithmetic.py', 2000)
    right = 0
    for line in done.stdout.splitlines():
        question, working = json.loads(line)['messages']
        a, b = map(int, question['content'].split('*'))
        assert not arithmetic.is_held_out((a, b))
        right += arithmetic.reward((a, b), working['content'])
    assert 750 < right < 950


def test_the_fewer_words_the_better():
    texts = ['12', ' Twelve. ', 'It is 12', '', ' ']
    assert [brief.reward((5, 7), text) for text in texts] == [1, 1, 1 / 3, 0, 0]
