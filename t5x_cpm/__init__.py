"""t5x_cpm: large encoder-decoder language models at a cost that a small team can pay."""

__version__ = '0.1.0'
