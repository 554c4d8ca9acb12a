"""A form and nothing else: the fewer words, the better. The answer need not be right, so any chat
model can learn this."""


def problems(rng):
    """Yield random problems without end."""
    while True:
        yield rng.randint(1, 20), rng.randint(1, 20)


def is_held_out(problem):
    """Whether a problem is for evaluations, and nothing learns from it"""
    return sum(problem) % 10 == 0


def prompt(problem):
    a, b = problem
    return f'How much is {a} + {b}? Answer in one word.'


def reward(problem, text):
    """1.0 for one word, 1 / n for n words, 0.0 for none"""
    words = len(text.split())
    return 1 / words if words else 0.0
