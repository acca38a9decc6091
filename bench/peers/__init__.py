"""Other runtimes, one small file each. A new one is a file and an entry here."""

from .base import Feed, Peer, PeerRunner, PeerUnavailableError, Subject
from .onnxruntime_plain import PLAIN
from .openvino import OPENVINO
from .torch_dense import COMPILED, EAGER
from .torch_semi_structured import CUSPARSELT, CUTLASS

PEERS: tuple[Peer, ...] = (PLAIN, OPENVINO, EAGER, COMPILED, CUTLASS, CUSPARSELT)

__all__ = ["PEERS", "PLAIN", "Feed", "Peer", "PeerRunner", "PeerUnavailableError", "Subject"]
