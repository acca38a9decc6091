"""Other runtimes, one small file each. A new one is a file and an entry here."""

from .base import Feed, Peer, PeerUnavailableError, Run, Subject
from .onnxruntime_plain import PLAIN
from .openvino import OPENVINO
from .torch_cpu import COMPILED, EAGER

PEERS: tuple[Peer, ...] = (PLAIN, OPENVINO, EAGER, COMPILED)

__all__ = ["PEERS", "Feed", "Peer", "PeerUnavailableError", "Run", "Subject"]
