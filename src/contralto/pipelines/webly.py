"""The main job: from noisy web images to a clean classifier, the list of wrong images, and corrected labels.

`fit_capro` is the whole job. Its stages are plain functions over a run folder that can be called one by one; each keeps
its result there, so an interrupted job continues where it stopped:

    ingest -> features -> texts -> [plain] -> vanilla -> neighbours and matching -> capro -> cleaned list -> finetune
           -> model -> evaluation -> report

Nothing that learns sees the clean labels: `fields` is the only door between the manifest and a training.
"""

import dataclasses
import hashlib
import inspect
import json
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contralto.data.dataset import EpochSampler, FeatureDataset, ImageDataset
from contralto.data.definitions import class_text, find_definitions, load_definitions
from contralto.data.images import decode_image
from contralto.data.ingest import ingest
from contralto.data.manifest import ClassInfo, Manifest
from contralto.data.sources import ByteReader
from contralto.data.text import clean_texts, drop_even_words
from contralto.encoders.features import cached_features, encode_images
from contralto.encoders.image import ImageEncoder, image_encoder
from contralto.encoders.text import text_encoder
from contralto.errors import DataError, UsageError
from contralto.neighbors.graph import adjacency, smooth
from contralto.neighbors.knn import knn
from contralto.neighbors.matching import Matching, match_scores, select_anchors
from contralto.neighbors.rerank import neighbour_graph
from contralto.systems.webly.capro import EXTENSIONS, CAPro, Stage, stage_epochs
from contralto.systems.webly.model import WebClassifier
from contralto.training.fit import fit_stage, write_atomically
from contralto.views.image import EvalView, View, strong_view, view_generator, weak_view
