"""Many images: a job is a folder of chunks, each drawn and committed by itself, by whoever comes to it.

    from sparse_engine.bulk import sample_many

    sample_many("model.sengine", "out", 50_000, labels="balanced", machines=Machines(workers=2))

A chunk's content depends on the job and the kernels alone. So to resume is to draw the chunks that are missing, to draw
one twice is harmless, and the bytes are the same for any number of workers.
"""

from .formats import FORMATS, finish
from .job import Job, Shard
from .run import Machines, Progress, Summary, sample_many

__all__ = ["FORMATS", "Job", "Machines", "Progress", "Shard", "Summary", "finish", "sample_many"]
