"""Packaging. The folders gin/ and tasks/ are part of the package through the links t5x_cpm/gin_files and t5x_cpm/tasks."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
RUN, DEVELOP = (
    [line for line in part.splitlines() if line and not line.startswith('#')]
    for part in (ROOT / 'requirements.txt').read_text().split('# Development.'))
JAX = next(line for line in RUN if line.startswith('jax>')).removeprefix('jax')

setuptools.setup(
    name='t5x_cpm',
    version=re.search(r"__version__ = '(.*)'", (ROOT / 't5x_cpm' / '__init__.py').read_text())[1],
    description='Large encoder-decoder language models at a cost that a small team can pay: CPM-2 on JAX, gin and SeqIO.',
    license='Apache-2.0',
    python_requires='>=3.11,<3.14',  # TensorFlow 2.21 has no package for a later one
    packages=setuptools.find_namespace_packages(include=['t5x_cpm', 't5x_cpm.*']),
    package_data={'': ['*.gin', '*.txt', '*.tsv', '*.md']},  # gin files, corpus and vocabulary
    install_requires=RUN,
    extras_require={
        'gpu': [f'jax[cuda12]{JAX}'],
        'tpu': [f'jax[tpu]{JAX}'],
        'pod': ['libtpu>=0.0.42,<0.1'],  # its compiler, on any Linux machine
        # One version of torch, so that a CPU build on this machine is taken. SwitchTransformers drops tokens over an expert's
        # capacity, as published, from transformers 5.18 on; 5.0 to 5.17 drop none, and put a probability into the z-loss.
        'torch': ['torch==2.13.0', 'transformers==5.24.0', 'peft>=0.21,<0.22'],
        'dev': DEVELOP,
    },
    entry_points={'console_scripts': ['t5x_cpm = t5x_cpm.__main__:main']},
)
