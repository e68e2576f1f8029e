"""Many pictures, a run each: found and named, done by workers, kept in one folder with a page of all of them.

An executor does the work (``icekit.protocols.Executor``); whatever it is, a run directory is the truth of its picture.
"""

from icekit.batch.batch import BatchResult, extract_batch
from icekit.batch.progress import Progress
from icekit.batch.record import FailureRecord

__all__ = ["BatchResult", "FailureRecord", "Progress", "extract_batch"]
