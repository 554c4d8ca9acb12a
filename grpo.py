"""Reinforcement learning with a verifier (GRPO): a model learns from the rewards of its answers.

    python grpo.py config/grpo_arithmetic.py
    python grpo.py config/grpo_arithmetic.py --max_steps=0      # only evaluate the model

A task is a Python file, which is executed: problems(rng), prompt(problem), is_held_out(problem) and
reward(problem, text), see tasks/arithmetic.py. A run lives in out_dir and continues like one of
train.py. One device only.

References
  [1] DeepSeekMath, arXiv 2402.03300: GRPO
  [2] Understanding R1-Zero-Like Training (Dr. GRPO), arXiv 2503.20783
  [3] DAPO, arXiv 2503.14476
"""
import os
os.environ.setdefault('GOMP_SPINCOUNT', '3000')     # idle threads must not slow the busy ones

import math
import random
import runpy
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer
from nanoseek import checkpoint, hf, settings
from nanoseek.chat import Chat
from nanoseek.log import Log, versions
from nanoseek.optim import make_optimizer, set_learning_rate
from nanoseek.tokenizer import decode, encode, load_tokenizer
from train import OneDevice, gradient_norm, is_due


@dataclass
class Settings:
    """Settings of grpo.py"""
    task: str = 'tasks/arithmetic.py'   # the file of a task
    init_from: str = 'out/arithmetic'   # the model to start from: a run, a folder or a Hub id
    out_dir: str = 'out/grpo'           # where the run is written
    seed: int = 1337                    # of the problems and the answers
    max_steps: int = 200                # steps of the whole run; 0: evaluate the model and stop
    batch_size: int = 48                # problems of a step
    group_size: int = 8                 # answers to each
    max_new_tokens: int = 64            # the most tokens of an answer
    temperature: float = 1.0            # of the answers
    baseline: bool = True               # subtract a group's mean reward; false: imitate success
    divide_by_std: bool = False         # divide by a group's standard deviation, as [1] but not [2]
    drop_equal: bool = True             # leave out groups whose rewards are equal [3]
    loss_over: Literal['tokens', 'answers'] = 'tokens'  # what has equal weights: [3], or [1]
    kl: float = 0.0                     # weight of the divergence from the first model [1]; not [2]
    updates: int = 1                    # optimizer steps with the answers of a step
    clip: float = 0.2                   # of the ratio of probabilities, which later updates change
    optimizer: Literal['adamw', 'muon'] = 'muon'  # muon: for matrices; AdamW for everything else
    learning_rate: float = 5e-4         # after warm-up, until half of the steps are taken
    embedding_lr: float = 1.0           # embedding and head: times learning_rate
    warmup_steps: int = 10              # steps of linear warm-up
    weight_decay: float = 0.0           # on matrices
    grad_clip: float = 1.0              # largest norm of the gradient
    eval_problems: int = 200            # held-out problems of an evaluation, answered greedily
    eval_interval: int = 20             # steps between evaluations; 0: none
    checkpoint_interval: int = 50       # steps between checkpoints; 0: only one at the end
    keep_checkpoints: int = 2           # newest ones to keep, besides the best; 0: all
    resume: str = 'auto'                # auto: from out_dir's newest; never; or a checkpoint
    device: str = 'auto'                # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'bfloat16', 'float32'] = 'float32'  # of matmuls, not of weights
    wandb: bool = False                 # also log to Weights & Biases
    tensorboard: bool = False           # also log for TensorBoard, in out_dir/tensorboard
    # For train.py's optimizer: AdamW's, and a rate that is constant, then linear to 0
    beta1, beta2, eps, schedule, decay_frac, min_lr_frac = 0.9, 0.95, 1e-8, 'wsd', 0.5, 0.0

    def __post_init__(self):
        settings.require(self, 'group_size', self.group_size > 1 or not self.baseline,
                         'at least 2, as answers are compared with others of their group')


class Task:
    """A task's file, and the tokens of the model in a folder"""

    def __init__(self, file, folder, model):
        self.file = runpy.run_path(file)
        self.tokenizer = load_tokenizer(folder)
        self.stops = hf.stop_ids(folder, model.config)
        self.chat = None
        with suppress(ValueError):          # no chat template: prompts as they are
            self.chat = Chat(folder, self.tokenizer)

    def problems(self, seed, held_out=False):
        """Yield problems to learn from, or held-out ones, without end."""
        for problem in self.file['problems'](random.Random(seed)):
            if self.file['is_held_out'](problem) == held_out:
                yield problem

    def prompt(self, problem):
        """Return the ids of a problem's prompt, a list."""
        text = self.file['prompt'](problem)
        if self.chat is None:
            return encode(self.tokenizer, text)
        return self.chat.prompt([{'role': 'user', 'content': text}])

    def reward(self, problem, ids):
        reward = float(self.file['reward'](problem, decode(self.tokenizer, ids)))
        if not math.isfinite(reward):
            raise ValueError(f'the reward of {problem} is {reward}: must be finite')
        return reward


class Answers(NamedTuple):
    """n answers behind prompts of one length, those to one problem side by side"""
    ids: Tensor             # (n, T)
    mask: Tensor            # (n, T) bool: the tokens of answers, with the one that ends them
    rewards: Tensor         # (n,)


@torch.no_grad()
def answer(model, task, problems, copies, s, temperature=0.0):
    """Return a list of Answers, one for each length of prompts: `copies` to each problem."""
    by_length = {}
    for problem in problems:
        prompt = task.prompt(problem)
        by_length.setdefault(len(prompt), []).extend([(problem, prompt)] * copies)
    batches = []
    for length, pairs in by_length.items():
        idx = torch.tensor([prompt for _, prompt in pairs], device=model.head.device)
        ids = model.generate(idx, s.max_new_tokens, temperature, stop=task.stops)   # (n, T)
        new = torch.arange(ids.shape[1], device=ids.device) >= length               # (T,)
        is_stop = torch.isin(ids, ids.new_tensor(task.stops)) & new
        mask = (is_stop.cumsum(1) - is_stop.int() == 0) & new           # up to the first stop
        rewards = torch.zeros_like(ids[:, 0], dtype=torch.float32)      # 0 without an end
        for i in is_stop.any(1).nonzero()[:, 0].tolist():
            rewards[i] = task.reward(pairs[i][0], ids[i][mask[i] & ~is_stop[i]].tolist())
        batches.append(Answers(ids, mask, rewards))
    return batches


def advantages(rewards, s):
    """rewards (problems, group_size) -> how much better each answer is than its group, of the same
    shape, and which groups to learn from (problems,)"""
    kept = torch.ones_like(rewards[:, 0], dtype=torch.bool)
    if s.drop_equal:
        kept = rewards.amax(1) > rewards.amin(1)
    if s.baseline:
        rewards = rewards - rewards.mean(1, keepdim=True)
    if s.divide_by_std:
        rewards = rewards / (rewards.std(1, keepdim=True) + 1e-6)
    return rewards, kept


def log_probabilities(model, answers, temperature):
    """Return the log-probabilities of the answers' tokens, and the entropies of the distributions
    that they are from, (tokens,) both."""
    here = answers.mask[:, 1:]
    h, _ = model.hidden(answers.ids)
    logits = F.linear(h[:, :-1][here], model.head).float() / temperature        # (tokens, V)
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(1, answers.ids[:, 1:][here][:, None])[:, 0]
    return chosen, -(log_p.exp() * log_p).sum(-1)


def learn(model, first_model, batches, old, s, dist):
    """Compute the gradient. batches: Answers and their advantages (n,). old: a list of the tokens'
    log-probabilities before the first update, which fills it. Return the tokens' mean entropy."""
    total = torch.cat([answers.mask.sum(1) for answers, _ in batches])  # of each answer, in tokens
    entropy = 0.0
    for i, (answers, better) in enumerate(batches):
        length = answers.mask.sum(1)
        weight = 1 / total.sum()
        if s.loss_over == 'answers':
            weight = (1 / length / len(total)).repeat_interleave(length)            # (tokens,)
        with dist.autocast():
            log_p, entropies = log_probabilities(model, answers, s.temperature)     # (tokens,)
        if i == len(old):
            old.append(log_p.detach())
        advantage = better.repeat_interleave(length)
        ratio = (log_p - old[i]).exp()
        clipped = ratio.clamp(1 - s.clip, 1 + s.clip)
        gain = torch.minimum(ratio * advantage, clipped * advantage)                # [1] eq. 3
        if s.kl:
            with torch.no_grad(), dist.autocast():
                before, _ = log_probabilities(first_model, answers, s.temperature)
            step = before - log_p
            gain = gain - s.kl * (step.exp() - step - 1)                            # [1] eq. 4
        (-gain * weight).sum().backward()
        entropy += entropies.detach().sum().item() / total.sum().item()
    return entropy


def evaluate(model, task, s, dist):
    """Return the mean reward of greedy answers to held-out problems."""
    problems = islice(task.problems(s.seed, held_out=True), s.eval_problems)
    with dist.autocast():
        batches = answer(model, task, problems, 1, s)
    return torch.cat([answers.rewards for answers in batches]).mean().item()


def main(s):
    # A user's mistake ends the run here
    if os.environ.get('WORLD_SIZE', '1') != '1':
        raise ValueError('grpo.py runs on one device, without torchrun')
    dist = OneDevice(s)
    identity = {name: getattr(s, name) for name in (
        'task', 'init_from', 'seed', 'batch_size', 'group_size', 'optimizer')}
    start = checkpoint.find(s, identity)
    first = hf.hub_folder(checkpoint.of_run(s.init_from))
    folder = start or first
    model = Transformer.from_pretrained(folder, dropout=0.0).to(dist.device).eval()
    task = Task(s.task, folder, model)
    if s.max_steps == 0:
        print(f'reward {evaluate(model, task, s, dist):.3f} on held-out problems')
        return
    first_model = None
    if s.kl:
        first_model = Transformer.from_pretrained(first).to(dist.device).eval()
    optimizer = make_optimizer(s, model, dist.dtype)
    run = checkpoint.Run(model, optimizer, torch.amp.GradScaler(enabled=False), identity, folder)
    if start:
        run.load(start)
    log = Log(s, run, {**asdict(s), **asdict(model.config), **versions()})
    checkpoint.clear(s.out_dir, run.step)
    if start:
        log.say(f'continuing from {start}, to step {s.max_steps}')

    while run.step < s.max_steps:
        began = time.time()
        set_learning_rate(optimizer, run.step, s)

        # Problems and answers, which depend on the weights, the seed and the step alone
        torch.manual_seed(s.seed + (run.step << 32))
        problems = islice(task.problems(f'{s.seed} {run.step}'), s.batch_size)
        with dist.autocast():
            batches = answer(model, task, problems, s.group_size, s, s.temperature)
        learned = []                                    # Answers and advantages
        for answers in batches:
            better, kept = advantages(answers.rewards.view(-1, s.group_size), s)
            if kept.any():
                rows = kept.repeat_interleave(s.group_size)
                learned.append((Answers(*(x[rows] for x in answers)), better[kept].flatten()))
        entry = {'reward': torch.cat([answers.rewards for answers in batches]).mean().item(),
                 'length': torch.cat([a.mask.sum(1) for a in batches]).float().mean().item(),
                 'groups': sum(len(better) for _, better in learned) // s.group_size}

        # The update. Routers' biases stand still
        old = []
        for _ in range(s.updates if learned else 0):
            entropy = learn(model, first_model, learned, old, s, dist)
            norm = gradient_norm(model)
            if norm.isfinite():
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), s.grad_clip, norm)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            entry.update(entropy=entropy, grad_norm=norm.item())
        run.step += 1

        # Log, evaluate, save
        last = run.step == s.max_steps
        numbers = ' | '.join(f'{name} {value:.3g}' for name, value in entry.items())
        log.say(f'step {run.step:5d}/{s.max_steps} | {numbers} | {time.time() - began:.2f} s')
        log.add(step=run.step, **entry)
        error = None
        if is_due(s.eval_interval, run.step, last):
            reward = evaluate(model, task, s, dist)
            run.losses = {'reward on held-out problems': reward}
            error = 1 - reward
            log.say(f'step {run.step:5d} | reward {reward:.3f} on held-out problems')
            log.add(step=run.step, eval_reward=reward)
        if is_due(s.checkpoint_interval, run.step, last) or last:
            run.card = {'started from': s.init_from, 'task': s.task}
            log.say(checkpoint.save(run, s, task.tokenizer, dist, error))
    log.close()


if __name__ == '__main__':
    with settings.user_errors('use a smaller --batch_size or --group_size'):
        given, = settings.load(Settings, usage=__doc__)
        main(Settings(**given))
