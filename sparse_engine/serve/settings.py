"""What a service is limited to."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from sparse_engine import arguments
from sparse_engine.errors import OptionError

MOST_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class Settings:
    """Limits and times of a service.

    Attributes:
        max_images: of one request.
        max_steps: of one request.
        max_body: bytes of a request's body.
        max_batch: images that are drawn together; None is twice the engine's usual batch, where it was built for that.
        batch_sizes: batches are filled up to one of these; () is powers of two on a GPU, where each size has recordings
            of its own, and any size on a CPU.
        max_wait: seconds that the first image of a batch waits for others while the engine has nothing to do.
        queue_images: images that may wait; further requests are refused (429).
        queue_seconds: of work that may wait, by what batches have taken so far.
        deadline: seconds after which a request is given up (504); a client may ask for less.
        api_key: that clients have to show; None lets everybody in.
    """

    max_images: int = 64
    max_steps: int = 1000
    max_body: int = 64 << 10
    max_batch: int | None = None
    batch_sizes: tuple[int, ...] = ()
    max_wait: float = 0.002
    queue_images: int = 256
    queue_seconds: float = 300.0
    deadline: float = 600.0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in ("max_images", "max_steps", "max_body", "queue_images") or (
                each.name == "max_batch" and value is not None
            ):
                arguments.whole_number(each.name, value, 1)
            if each.name in ("queue_seconds", "deadline", "max_wait"):
                arguments.real_number(each.name, value, MOST_SECONDS, above=-1e-9 if each.name == "max_wait" else 0)
        sizes = arguments.whole_numbers("batch_sizes", self.batch_sizes, 1) if self.batch_sizes else ()
        object.__setattr__(self, "batch_sizes", tuple(sorted(set(sizes))))
        if self.queue_images < self.max_images:
            raise OptionError(
                f"queue_images = {self.queue_images} is less than max_images = {self.max_images}: a request of so "
                "many would always be refused",
                "raise --queue-images, or lower --max-images",
            )
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise OptionError("api_key is empty, or holds what no HTTP header does", "use printable ASCII")
