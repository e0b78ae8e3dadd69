"""Input of the trainer: sources -> documents -> tokens on disk -> packed batches.

sources.py    finds the files and reads documents out of them
documents.py  drops empty and repeated documents, splits the rest into training and validation
tokenizer.py  trains or loads the tokenizer
cache.py      keeps the tokens of both splits on disk, memory-mapped
packing.py    cuts the token stream into sequences
dataset.py    orders the sequences and iterates over batches

docs/data.md is the page for users.
"""

from train.data.dataset import Dataset, TrainIterator, build_dataset
from train.data.errors import DataError

__all__ = ["DataError", "Dataset", "TrainIterator", "build_dataset"]
