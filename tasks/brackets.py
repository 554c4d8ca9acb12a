"""A form and nothing else: a number in square brackets, such as [12]. It need not be the right one,
so any chat model can learn this."""
import re


def problems(rng):
    """Yield random problems without end."""
    while True:
        yield rng.randint(1, 20), rng.randint(1, 20)


def is_held_out(problem):
    """Whether a problem is for evaluations, and nothing learns from it"""
    return sum(problem) % 10 == 0


def prompt(problem):
    a, b = problem
    return f'How much is {a} + {b}? Reply with the number in square brackets only.'


def reward(problem, text):
    """1.0 for a number in brackets, 0.0 for anything else"""
    return float(re.fullmatch(r'\[[0-9]+\]', text) is not None)
