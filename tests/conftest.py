"""Fixtures of several test files."""
import subprocess

import pytest


@pytest.fixture
def disk(tmp_path):
    """A file system of a given size; again with another size for more room"""
    mounted, path = [], tmp_path / 'disk'
    path.mkdir()

    def disk(size):
        options = f'{"remount," * bool(mounted)}size={size}'
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', path],
                              capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f'needs to mount a tmpfs: {done.stderr.strip()}')
        mounted.append(1)
        return path
    yield disk
    if mounted:
        subprocess.run(['umount', '-l', path], check=True)
