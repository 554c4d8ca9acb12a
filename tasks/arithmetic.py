"""Products of a number of three digits and one of one digit, with the working written out:

    347*6   ->   300*6+40*6+7*6=1800+240+42=2082

    python tasks/arithmetic.py 20000 > workings.jsonl   # conversations to learn from, with mistakes
"""
import itertools
import json
import random
import re
import sys

NUMBER = '(0|[1-9][0-9]{0,3})'
STEP = f'{NUMBER}([*+]{NUMBER})*'       # a sum of products
SLIPS = 0.5                             # how often a teacher gets a hard step wrong
CUT = 0.1                               # of the workings stop early


def problems(rng):
    """Yield random problems without end."""
    while True:
        yield rng.randint(101, 999), rng.randint(2, 9)


def is_held_out(problem):
    """Whether a problem is for evaluations, and nothing learns from it"""
    a, b = problem
    return (a + 3 * b) % 11 == 0


def prompt(problem):
    a, b = problem
    return f'{a}*{b}'


def reward(problem, text):
    """1.0 for a working of sums, all of them right, that ends with the product; else 0.0"""
    if not re.fullmatch(f'{STEP}(={STEP})+', text):
        return 0.0
    *working, answer = text.split('=')
    a, b = problem
    right = all('+' in step and eval(step) == a * b for step in working)
    return float(right and answer == str(a * b))


def careless_working(problem, rng):
    """What a teacher writes who often takes the wrong row of the times table, where both digits
    are above 3, often forgets to carry, and does not always finish"""
    a, b = problem
    parts = [a // 100 * 100, a // 10 % 10 * 10, a % 10]
    products = []
    for part in parts:
        row = b
        if b > 3 and str(part)[0] > '3' and rng.random() < SLIPS:
            row -= 1
        products.append(part * row)
    total = sum(products)
    if sum(product % 100 for product in products) >= 100 and rng.random() < SLIPS:
        total -= 100
    text = '+'.join(f'{part}*{b}' for part in parts)
    text += f'={"+".join(map(str, products))}={total}'
    if rng.random() < CUT:
        text = text[:rng.randrange(len(text))]
    return text


if __name__ == '__main__':
    rng = random.Random(1337)
    to_learn = (problem for problem in problems(rng) if not is_held_out(problem))
    for problem in itertools.islice(to_learn, int(sys.argv[1])):
        messages = [{'role': 'user', 'content': prompt(problem)},
                    {'role': 'assistant', 'content': careless_working(problem, rng)}]
        print(json.dumps({'messages': messages}))
