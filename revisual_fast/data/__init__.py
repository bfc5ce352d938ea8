"""From data files to token ids. :mod:`revisual_fast.data.processor`, which needs transformers, is imported by name."""

from revisual_fast.data.images import ImageRef
from revisual_fast.data.records import BadRecordError, BadRecords, Record, load_dataset
from revisual_fast.data.sampler import Sampler

__all__ = ["BadRecordError", "BadRecords", "ImageRef", "Record", "Sampler", "load_dataset"]
