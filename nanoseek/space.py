"""A Hugging Face Space: a folder with an app, what it needs, and a card."""
import shutil
from pathlib import Path

APP = """\
import demo

demo.main(demo.Settings(checkpoint='model', host='0.0.0.0'))
"""
CARD = """\
---
title: {title}
sdk: gradio
sdk_version: {version}
app_file: app.py
pinned: false
tags: [nanoseek]
---
# {title}

{about}

`pip install -r requirements.txt && python app.py` shows it on your own machine.
"""
FILES = ('demo.py', 'sample.py', 'model.py', 'config/__init__.py', 'LICENSE')


def write_space(directory, model_folder, name, about, gradio_version):
    """directory: a new one; model_folder: what the Space shows; name: how
    the user called it, or empty. ValueError where something is in the way"""
    source = Path(__file__).resolve().parent.parent
    directory = Path(directory)
    model_folder = Path(model_folder)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f'space={directory}: is not empty')
    for name in FILES:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, directory / name)
    no_caches = shutil.ignore_patterns('__pycache__')
    shutil.copytree(source / 'nanoseek', directory / 'nanoseek', ignore=no_caches)
    without_trainer = shutil.ignore_patterns('trainer')
    shutil.copytree(model_folder, directory / 'model', ignore=without_trainer)
    needed = (source / 'requirements.txt').read_text(encoding='utf-8')
    requirements = f'{needed.rstrip()}\ngradio=={gradio_version}\n'
    (directory / 'requirements.txt').write_text(requirements, encoding='utf-8')
    (directory / 'app.py').write_text(APP, encoding='utf-8')
    if model_folder.name.startswith('step-'):
        name = model_folder.parent.name
    title = f'nanoseek {Path(name).name}'.strip()
    card = CARD.format(title=title, version=gradio_version, about=about)
    (directory / 'README.md').write_text(card, encoding='utf-8')
