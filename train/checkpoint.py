"""Checkpoints: asynchronous, atomic, checksummed, and restored from the newest good one.

    checkpoints/200/              one whole checkpoint; the name is the optimizer step
      state/                      the arrays, written by orbax (OCDBT, uncompressed)
      data_state.json | .bin      position of the data pipeline
      meta.json                   what the caller adds; shape and dtype of every array
      manifest.json               size and SHA-256 of every file above; written last
    checkpoints/300.incomplete/   being written, or left by a kill; never read, removed by a save
    checkpoints/100.deleted/      being deleted, or left by a kill; never read, removed by a save

A folder gets its plain name by a rename after its manifest is on disk, so a plain name means whole, and a plain folder
that does not agree with its manifest was damaged later. Older ones are deleted only after that rename.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from train.config import CheckpointConfig
from train.run_directory import atomic_write, sync_folder
